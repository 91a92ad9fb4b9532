"""Where a run starts: timesteps for sigmas, levels beyond the training, latents without noise."""

import math
import warnings

import pytest
import torch
from torch import nn

import kdpp
from kdpp.checks import check_number, check_sigmas
from kdpp.editing import image_to_image, truncate
from kdpp.rollouts import encode, mixed_rollout
from problems import NeverCalled, karras, seeded

external = kdpp.kdiffusion.external
SHAPE = (4, 8, 8)
SIGMAS = karras(4).float()


class Network(nn.Module):
    """An ε-network of Stable Diffusion's schedule: levels from 0.03 to 14.6."""

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)

    def apply_model(self, x, t):
        return 0.9 * x


def student():
    return external.CompVisDenoiser(Network())


def sample(x, sigmas, model=None, **settings):
    pair = kdpp.TeacherGuidedDenoiser(
        student() if model is None else model, student(), teacher_cfg_scale=1.0, **settings
    )
    return kdpp.sample_euler_tg(pair, x, sigmas, disable=True)


def latent(sigma, batch=2, seed=1):
    return sigma * seeded(batch, *SHAPE, seed=seed, dtype=torch.float32)


# ------------------------------------------------------------------------------- timesteps

TIMESTEPS = {
    "few steps": [999, 759, 519, 279],
    "ending in 0": [999.0, 749.0, 499.0, 249.0, 0.0],
    "late ones": [499, 259, 19, 0],
}


@pytest.mark.parametrize("steps", TIMESTEPS.values(), ids=TIMESTEPS)
@pytest.mark.parametrize("inside", [None, kdpp.LCMDenoiser, kdpp.OwnCFG])
def test_timesteps_are_not_sigmas(steps, inside):
    """Refused before any work, where the student tells how far it was trained."""
    model = student() if inside is None else inside(student())
    message = r"the student was trained on levels from 0\.029.* to 14\.6.*timesteps.*t_to_sigma"
    with pytest.raises(ValueError, match=message):
        sample(latent(steps[0]), torch.tensor(steps), model)
    with pytest.raises(ValueError, match=message):
        mixed_rollout(model, student(), latent(1.0), torch.tensor(steps), switch=0)
    rising = torch.tensor([step for step in steps if step][::-1])
    with pytest.raises(ValueError, match=message):
        encode(model, latent(1.0), rising, disable=True)


def test_what_the_message_says_to_do():
    """t_to_sigma of the timesteps is a schedule without a word."""
    model = student()
    sigmas = torch.cat(
        [model.t_to_sigma(torch.tensor([999.0, 759.0, 519.0, 279.0])), torch.zeros(1)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample(latent(sigmas[0]), sigmas).isfinite().all()


@pytest.mark.parametrize("top", [16.5, 80.0, 999.5])
def test_a_level_beyond_the_training_is_said(top):
    """A warning: a model can be asked there, and what it says is its own affair."""
    with pytest.warns(UserWarning, match=rf"sigmas holds {top:g}, and the student was trained on"):
        sample(latent(top), torch.tensor([top, 5.0, 1.0, 0.0]))


def test_levels_that_are_no_slip():
    """Up to the end, or a tenth above it; whole numbers; a student that tells no range."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for top in (14.0, 14.6146, 15.0, 16.0):
            sample(latent(top), torch.tensor([top, 7.0, 3.0, 1.0, 0.0]))
        sample(latent(999.0), torch.tensor([999.0, 7.0, 0.0]), lambda x, sigma: 0.5 * x)
        sample(latent(14.6), SIGMAS[-1:])
        kdpp.sample_euler_tg(
            kdpp.TeacherGuidedDenoiser(
                kdpp.FlowDenoiser(lambda x, t: x), kdpp.FlowDenoiser(lambda x, t: x),
                teacher_cfg_scale=1.0,
            ),
            latent(1.0), torch.tensor([1.0, 0.5, 0.0]), disable=True,
        )  # fmt: skip


# ------------------------------------------------------------------------------- latents


@pytest.mark.parametrize("size", [1.0, 0.13, 7.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_latent_without_its_noise_is_said(size, dtype):
    """Unscaled noise, an image alone, noise of half the level: the message says how to start."""
    x = latent(size).to(dtype)
    message = r"x has a root mean square of .* sigmas starts at 14\.6.*noise \* sigmas\[0\]"
    with pytest.warns(UserWarning, match=message):
        sample(x, SIGMAS, lambda x, sigma: 0.5 * x)
    with pytest.warns(UserWarning, match=message):
        mixed_rollout(student(), student(), x.float(), SIGMAS, switch=0, disable=True)


def test_latents_that_are_no_slip():
    """Noise at its level, images with noise, late starts, encoded images, zeros, few numbers."""
    image = seeded(2, *SHAPE, seed=3, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(20):
            sample(latent(SIGMAS[0], seed=seed), SIGMAS)
        sample(latent(14.6).half(), SIGMAS)
        for strength in (0.1, 0.3, 0.6, 1.0):
            pair = kdpp.TeacherGuidedDenoiser(student(), student(), teacher_cfg_scale=1.0)
            levels = truncate(karras(10).float(), strength)
            image_to_image(kdpp.sample_euler_tg, pair, 0.1 * image, levels, disable=True)
        for late in (2.0, 0.9, 0.1):  # a hires pass: what is there is mostly image
            sample(image, torch.tensor([late, late / 2, 0.0]))
        up = karras(40).float()[:-1].flip(0)
        sample(0.76 * latent(up[-1]), up.flip(0))  # docs/rollouts.md: encoded digits' deviation
        encode(student(), image, up, disable=True)
        sample(torch.zeros(2, *SHAPE), SIGMAS)
        sample(torch.ones(90, 1, 7, 9), SIGMAS)
        sample(latent(1.0)[:0], SIGMAS)


def test_a_latent_elsewhere_is_not_waited_for():
    """Looking at it would read it back from the device; on meta that raises."""
    x = torch.empty(2, *SHAPE, device="meta")
    found = sample(x, SIGMAS, lambda x, sigma: x / 2, teacher_scale=0.0)
    assert found.device.type == "meta"


def test_the_latent_is_looked_at_once(monkeypatch):
    """Before the loop: one number, however many steps."""
    read, norm = [], torch.linalg.vector_norm
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x: read.append(1) or norm(x))
    sample(latent(14.6), karras(12).float())
    assert len(read) == 1


# ------------------------------------------------------------------------------- numbers


NO_NUMBERS = {
    "400 digits": 10**400, "minus 400 digits": -(10**400), "inf": math.inf, "nan": math.nan,
    "bool": True, "str": "1", "None": None, "complex": 1j,
}  # fmt: skip


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_a_number_is_finite(value):
    """A whole number too large for a float is none, either."""
    with pytest.raises(ValueError, match=r"scale is .* a finite number"):
        check_number("scale", value)
    with pytest.raises(ValueError, match=r"scale is .* a number in \[0, 1\]"):
        check_number("scale", value, 0.0, 1.0)


@pytest.mark.parametrize(
    "guidance",
    [
        {"renoise": 10**400},
        {"teacher_steps": kdpp.NoiseRange(0, 10**400)},
        {"teacher_scale": 10**400},
    ],
    ids=lambda guidance: next(iter(guidance)),
)
def test_guidance_of_400_digits_is_refused(guidance):
    (name,) = guidance
    with pytest.raises(ValueError, match=name):
        model = kdpp.TeacherGuidedDenoiser(
            NeverCalled(), NeverCalled(), teacher_cfg_scale=1.0, **guidance
        )
        kdpp.sample_euler_tg(model, torch.ones(2, 1, 2, 2), [2.0, 1.0, 0.0], disable=True)


@pytest.mark.parametrize("option", ["eta", "s_noise"])
def test_an_option_of_400_digits_is_refused(option):
    with pytest.raises(ValueError, match=rf"{option} is 1000.*; it must be a number ≥ 0"):
        kdpp.SOLVERS["euler_ancestral"].plan([2.0, 1.0], **{option: 10**400})


def test_a_cfg_scale_of_400_digits_is_refused():
    pair = kdpp.TeacherGuidedDenoiser(NeverCalled(), NeverCalled(), teacher_scale=0.0)
    extra = {"cond": torch.ones(2), "uncond": torch.ones(2), "cond_scale": 10**400}
    with pytest.raises(ValueError, match="cond_scale"):
        kdpp.sample_euler_tg(pair, latent(14.6), SIGMAS, extra)


@pytest.mark.parametrize("sigmas", [None, "karras", [[1.0], [2.0, 3.0]], ["1"], object()])
def test_what_holds_no_levels_is_no_schedule(sigmas):
    with pytest.raises(TypeError, match=r"sigmas is .* a 1-D tensor of levels"):
        check_sigmas(sigmas)
