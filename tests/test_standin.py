"""kdpp's own denoisers and schedules give what k-diffusion's give, to the last bit."""

import math
from types import SimpleNamespace

import pytest
import torch

import kdpp
import needs
from kdpp import standin
from kdpp.kdiffusion import PARTS
from kdpp.lab.schedules import alphas_cumprod
from problems import seeded

DTYPES = [torch.float32, torch.float64]
LEVELS = [0.0, 1e-3, 0.0292, 0.03, 0.5, 1.0, 7.0, 14.6, 14.6146, 80.0, math.inf]


def pair(name):
    """kdpp's own of this name, and k-diffusion's."""
    (part,) = (part for part, names in PARTS.items() if name in names)
    return getattr(standin, name), getattr(getattr(kdpp.kdiffusion, part), name)


def same(found, expected):
    """Bit for bit, NaN included, of the same dtype and shape."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class Network(torch.nn.Module):
    """A function of all that a network is given, of any kind; ``w`` only if it is handed on."""

    def __init__(self, outputs=1, dtype=torch.float32):
        super().__init__()
        self.outputs = outputs
        self.alphas_cumprod = alphas_cumprod().to(dtype)

    def forward(self, x, t, cond=None, w=0.0):
        away = 0.0 if cond is None else cond[:, None, None, None]
        level = (0.01 * t.to(x.dtype))[:, None, None, None]
        output = torch.tanh(x + away + level + w)
        return torch.cat([output / n for n in range(1, self.outputs + 1)], 1)

    apply_model = forward


def openai(make, dtype, **options):
    network = Network(2, dtype)
    diffusion = SimpleNamespace(alphas_cumprod=network.alphas_cumprod.numpy())
    return make(network, diffusion, **options)


KINDS = {
    "CompVisDenoiser": lambda make, dtype, **options: make(Network(1, dtype), **options),
    "CompVisVDenoiser": lambda make, dtype, **options: make(Network(1, dtype), **options),
    "DiscreteEpsDDPMDenoiser": lambda make, dtype, quantize=False: make(
        Network(), alphas_cumprod().to(dtype), quantize
    ),
    "DiscreteVDDPMDenoiser": lambda make, dtype, quantize=False: make(
        Network(), alphas_cumprod().to(dtype), quantize
    ),
    "OpenAIDenoiser": openai,
    "VDenoiser": lambda make, dtype: make(Network()),
    "Denoiser": lambda make, dtype: make(Network(), sigma_data=0.5),
}
DISCRETE = [name for name in KINDS if name not in ("VDenoiser", "Denoiser")]


def compared(name, dtype, **options):
    return [KINDS[name](make, dtype, **options) for make in pair(name)]


@needs.k_diffusion
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_the_estimate(name, dtype):
    """At levels in and outside the schedule, with a table and a latent of either precision."""
    ours, theirs = compared(name, dtype)
    sigma = torch.tensor(LEVELS[:-1], dtype=dtype)
    cond = seeded(len(sigma), seed=1).to(dtype)
    for x in (seeded(len(sigma), 3, 2, 2, seed=2), seeded(len(sigma), 3, 2, 2, seed=2).float()):
        for extra in ({"cond": cond}, {"cond": cond, "w": 0.5}):
            same(ours(x, sigma, **extra), theirs(x, sigma, **extra))
        for found, expected in zip(ours.get_scalings(sigma), theirs.get_scalings(sigma)):
            same(found, expected)


@needs.k_diffusion
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DISCRETE)
def test_the_timesteps(name, dtype, quantize):
    """σ → t, between the levels, on them and beyond them; t → σ; the schedule and its buffers."""
    ours, theirs = compared(name, dtype, quantize=quantize)
    for sigma in (torch.tensor(LEVELS, dtype=dtype), torch.tensor(LEVELS), ours.sigmas[::7]):
        same(ours.sigma_to_t(sigma), theirs.sigma_to_t(sigma))
        for asked in (False, True):
            same(ours.sigma_to_t(sigma, asked), theirs.sigma_to_t(sigma, asked))
    same(ours.sigma_to_t(torch.tensor(3.0)), theirs.sigma_to_t(torch.tensor(3.0)))
    for t in (torch.linspace(0, 999, 50, dtype=dtype), torch.tensor([0, 500, 999])):
        same(ours.t_to_sigma(t), theirs.t_to_sigma(t))
    for n in (None, 1, 10):
        same(ours.get_sigmas(n), theirs.get_sigmas(n))
    same(ours.sigma_min, theirs.sigma_min)
    same(ours.sigma_max, theirs.sigma_max)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@needs.k_diffusion
def test_the_continuous_timesteps_and_a_network_of_known_variance():
    ours, theirs = compared("VDenoiser", torch.float32)
    same(ours.sigma_to_t(torch.tensor(LEVELS)), theirs.sigma_to_t(torch.tensor(LEVELS)))
    same(ours.t_to_sigma(torch.linspace(0, 1, 9)), theirs.t_to_sigma(torch.linspace(0, 1, 9)))
    diffusion = SimpleNamespace(alphas_cumprod=alphas_cumprod().numpy())
    ours, theirs = (
        make(Network(), diffusion, has_learned_sigmas=False) for make in pair("OpenAIDenoiser")
    )
    x, sigma = seeded(2, 3, 2, 2, seed=3), torch.tensor([3.0, 0.3])
    same(ours(x, sigma), theirs(x, sigma))


@needs.k_diffusion
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("get_sigmas_karras", [{}, {"rho": 3.0}]),
        ("get_sigmas_exponential", [{}]),
        ("get_sigmas_polyexponential", [{}, {"rho": 0.7}]),
    ],
)
def test_the_schedules(name, options):
    """Of numbers, and of tensors of either precision."""
    ours, theirs = pair(name)
    for n in (1, 2, 7, 50):
        for low, high in ((0.03, 14.6), (0.002, 80), (1, 1)):
            for kind in (float, torch.tensor, lambda v: torch.tensor(v, dtype=torch.float64)):
                for more in options:
                    same(ours(n, kind(low), kind(high), **more),
                         theirs(n, kind(low), kind(high), **more))  # fmt: skip


@needs.k_diffusion
def test_the_vp_schedule_and_the_shapes():
    (ours, theirs), options = pair("get_sigmas_vp"), {"beta_d": 9.0, "beta_min": 0.2, "eps_s": 0.01}
    same(ours(7), theirs(7))
    same(ours(7, **options), theirs(7, **options))
    x = seeded(3, 2, seed=4)
    for n in (2, 3, 5):
        same(*(append(x, n) for append in pair("append_dims")))
    for append in pair("append_dims"):
        with pytest.raises(ValueError, match=r"2 dim.*1"):
            append(x, 1)
    same(*(append(x[0]) for append in pair("append_zero")))


def test_every_denoiser_of_an_exact_network_is_exact():
    """Of Gaussian data of variance v: D = v/(v + σ²)·x, whatever the network predicts."""
    variance, sigma = 0.3, torch.tensor([0.05, 0.7, 10.0], dtype=torch.float64)
    x = seeded(3, 2, 2, 2, seed=5)
    level = sigma[:, None, None, None]
    expected = variance / (variance + level**2) * x

    class Exact(torch.nn.Module):
        alphas_cumprod = alphas_cumprod().double()

        def __init__(self, predicts):
            super().__init__()
            self.predicts = predicts

        def forward(self, z, t, cond=None):
            torch.testing.assert_close(z, x / (1 + level**2).sqrt())
            noise = (x - expected) / level
            alpha, beta = 1 / (1 + level**2).sqrt(), level / (1 + level**2).sqrt()
            return noise if self.predicts == "ε" else alpha * noise - beta * expected

        apply_model = forward

    for name, predicts in (("CompVisDenoiser", "ε"), ("CompVisVDenoiser", "v"), ("VDenoiser", "v")):
        found = getattr(standin, name)(Exact(predicts))(x, sigma, cond=None)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_schedules_formulas():
    """Karras: σ^(1/ρ) in equal steps; exponential: log σ; VP: t; all end at 0."""
    karras = standin.get_sigmas_karras(6, 0.03, 14.6)
    roots = karras[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(5) / 5)
    logs = standin.get_sigmas_exponential(6, 0.03, 14.6)[:-1].log()
    torch.testing.assert_close(logs.diff(), (logs[-1] - logs[0]).expand(5) / 5)
    poly = standin.get_sigmas_polyexponential(6, 0.03, 14.6, rho=1.0)
    torch.testing.assert_close(poly[:-1].log(), logs)
    vp = standin.get_sigmas_vp(3)
    t = torch.tensor([1.0, 0.5005, 1e-3])
    torch.testing.assert_close((1 + vp[:-1] ** 2).log(), 19.9 * t**2 / 2 + 0.1 * t)
    for sigmas in (karras, poly, vp):
        assert sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()


def test_every_part_is_there():
    """What `kdpp.kdiffusion` hands out is what `kdpp.standin` has, once each."""
    names = [name for part in PARTS.values() for name in part]
    assert sorted(names) == sorted(standin.__all__)
