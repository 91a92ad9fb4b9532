"""A k-diffusion script: a CFGDenoiser round a CompVisDenoiser, callback, progress bar."""

import k_diffusion as K
import torch

import kdpp.digits

NETWORKS = {"student": kdpp.digits.load_student, "teacher": kdpp.digits.load_teacher}


class CFGDenoiser(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, uncond, cond, cond_scale):
        x_in, sigma_in = torch.cat([x] * 2), torch.cat([sigma] * 2)
        uncond, cond = self.inner_model(x_in, sigma_in, cond=torch.cat([uncond, cond])).chunk(2)
        return uncond + (cond - uncond) * cond_scale


def load(name):
    return CFGDenoiser(K.external.CompVisDenoiser(NETWORKS[name]()))


def preview(info):
    print(f"step {info['i']}: sigma {float(info['sigma']):6.3f}", end="")
    print(f", denoised to a standard deviation of {float(info['denoised'].std()):.3f}")


torch.manual_seed(0)
digits = torch.arange(10)
extra_args = {"cond": digits, "uncond": torch.full_like(digits, 10), "cond_scale": 1.5}
sigmas = K.sampling.get_sigmas_exponential(6, 0.1, 14.6)
x = torch.randn(10, 1, 8, 8) * sigmas[0]
model = load("student")
sample = K.sampling.sample_dpmpp_2s_ancestral
images = sample(model, x, sigmas, extra_args=extra_args, callback=preview, disable=False)
