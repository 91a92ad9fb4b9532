"""Editing images: start from a noised one (SDEdit), or keep a region of it (inpainting).

Both work with every sampler, kdpp's and k-diffusion's: `image_to_image` only makes the start, and
`inpaint` only wraps the model. σ is the standard deviation of the noise, ``x = x0 + σ n``, or of a
flow model (``model.flow`` is True) τ in [0, 1], ``x = (1-τ) x0 + τ n``. Images are latents in model
space.
"""

from __future__ import annotations

import copy
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdpp.checks import check_sigmas
from kdpp.denoisers import Denoiser, OwnCFG, refuse_unmarked_cfg, shaped
from kdpp.guidance import TeacherGuidedDenoiser
from kdpp.noise import host_noise
from kdpp.plan import FLOW

__all__ = ["Inpainted", "image_to_image", "inpaint", "truncate"]

Result = TypeVar("Result")


def truncate(sigmas: Tensor, strength: float) -> Tensor:
    """The last part of a schedule: ``max(1, round(strength·steps))`` steps of it.

    Args:
        sigmas: 1-D, non-increasing noise levels, of ``steps + 1`` entries.
        strength: in (0, 1]: 1 keeps the whole schedule; the smaller, the closer to the image.

    Raises:
        ValueError: sigmas are not such levels, or the strength is outside its range.
    """
    levels, sigmas = check_sigmas(sigmas)
    number = isinstance(strength, numbers.Real) and not isinstance(strength, bool)
    if not (number and 0.0 < strength <= 1.0):
        raise ValueError(f"strength is {strength!r}; it must be a number in (0, 1]")
    kept = max(1, round(strength * (len(levels) - 1)))
    return sigmas[-(kept + 1) :]


def image_to_image(
    sample: Callable[..., Result],
    model: Any,
    image: Tensor,
    sigmas: Tensor,
    *args: Any,
    noise: Tensor | None = None,
    **options: Any,
) -> Result:
    """SDEdit: ``sample(model, image + σ_0 n, sigmas, …)``, from a noised image instead of noise.

    For a flow model, whose levels are τ, the start is ``(1-τ_0) image + τ_0 n``.

    Args:
        sample: any sampler that takes ``(model, x, sigmas, …)``, kdpp's or k-diffusion's; or, as
            DPM-Solver fast and adaptive, ``(model, x, sigma_min, sigma_max, …)``, which get the
            schedule's first level and its last above 0.
        model: what that sampler takes.
        image: ``(batch, *shape)``, floating point. Never written to.
        sigmas: 1-D, non-increasing levels; ``σ_0 = sigmas[0]`` says how much of the image goes. To
            cut a text-to-image schedule: `truncate`.
        args, options: handed to the sampler: ``extra_args``, ``callback``, ``disable``, …
        noise: n, standard normal, of the image's shape; by default from where k-diffusion's
            samplers draw theirs.

    Returns:
        What the sampler returns.

    Raises:
        TypeError: image or noise is not a floating-point tensor.
        ValueError: noise of another shape; sigmas without a level, or not levels of a sampler for
            this kind of model.

    Source: Meng et al. 2022, "SDEdit"; with a distilled model Meng et al. 2023, section 4.2.3.
    """
    check_image(image)
    levels, sigmas = check_sigmas(sigmas)
    if not levels:
        raise ValueError("sigmas is empty; its first level says how much noise the image gets")
    check_levels(levels, model)
    start = noised(image, levels[0], fitting_noise(image, noise), is_flow(model))
    if "sigma_min" in inspect.signature(sample).parameters:
        low = min((level for level in levels if level > 0.0), default=0.0)
        return sample(model, start, low, levels[0], *args, **options)
    return sample(model, start, sigmas, *args, **options)


class Inpainted(nn.Module):
    """A denoiser that knows a part of the image; `inpaint` makes one.

    With the mask m, 0 where the image x0* is known::

        D'(x, σ) = (1 - m) x0* + m D((1 - m)(x0* + σ n) + m x, σ)

    The network sees the known region at the right noise level, with the same noise n at every
    call, whatever the sampler has made of x there; and the estimate there is the image, so that
    any sampler whose last step goes to σ = 0 ends on it. For a flow model ``(1-τ) x0* + τ n`` is
    seen.

    Args:
        denoiser: ``(x, sigma, **extra_args) -> denoised``. It may be called on a multiple of the
            batch, as by classifier-free guidance: the stacked copies get the same region.
        image, mask, noise: as in `inpaint`; noise must be given.
        flow: whether x and sigma are a flow model's.
    """

    image: Tensor
    mask: Tensor
    noise: Tensor

    def __init__(
        self, denoiser: Denoiser, image: Tensor, mask: Tensor, noise: Tensor, flow: bool = False
    ) -> None:
        super().__init__()
        check_image(image)
        self.inner_model = denoiser
        self.register_buffer("image", image, persistent=False)
        self.register_buffer("mask", fitting_mask(image, mask), persistent=False)
        self.register_buffer("noise", fitting_noise(image, noise), persistent=False)
        self.flow = flow

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The estimate of x0.

        Raises:
            ValueError: x does not fit the image, or the denoiser's output does not fit x.
        """
        level = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
        known = noised(self._for(x, self.image), level, self._for(x, self.noise), self.flow)
        seen = torch.lerp(known, x, self._for(x, self.mask))
        return self.keep(shaped(self.inner_model(seen, sigma, **extra_args), "inpainted model", x))

    def keep(self, denoised: Tensor) -> Tensor:
        """An estimate with the image in the known region."""
        image, mask = self._for(denoised, self.image), self._for(denoised, self.mask)
        return torch.lerp(image, denoised, mask)

    def _for(self, x: Tensor, part: Tensor) -> Tensor:
        """``part`` for x's batch, dtype and device."""
        if x.shape[1:] != part.shape[1:] or len(x) % len(part):
            raise ValueError(
                f"the model got x of shape {tuple(x.shape)}, and the image to inpaint has shape "
                f"{tuple(part.shape)}; they must be alike (the image's batch may be 1)"
            )
        copies = 1 if len(part) == 1 else len(x) // len(part)
        part = part.to(x)
        return part if copies == 1 else part.repeat(copies, *[1] * (x.ndim - 1))


def inpaint(model: Any, image: Tensor, mask: Tensor, noise: Tensor | None = None) -> Any:
    """The same model, but it keeps the image where the mask is 0; see `Inpainted`.

    Student and teachers of a `kdpp.TeacherGuidedDenoiser` see the same known region, with the same
    noise, and the new wrapper has the settings of the old one, which stays as it is. What a sampler
    returns equals the image where the mask is 0: exactly with kdpp's samplers (LMS: up to
    rounding), up to rounding with k-diffusion's; its schedule must end in 0.

    Args:
        model: a `kdpp.TeacherGuidedDenoiser`, a `kdpp.OwnCFG` (its unconditional estimate, for
            CFG++, keeps the image too) or any other denoiser.
        image: ``(batch, *shape)`` or ``(1, *shape)``, floating point.
        mask: broadcastable to the image, values in [0, 1] or bool: 0 keeps, 1 makes anew; in
            between both are blended.
        noise: standard normal, of the image's shape; by default from where k-diffusion's samplers
            draw theirs. To start from the noised image, give `image_to_image` the same.

    Returns:
        A model of the same kind.

    Raises:
        TypeError: image, mask or noise is no tensor of a fitting dtype; the model is not callable
            or does its own CFG unmarked.
        ValueError: mask or noise of a shape that does not fit, a mask outside [0, 1], or a teacher
            in another latent space (with ``maps``), where the mask has no meaning.

    Source: the known region's replacement of Song et al. 2021, "Score-based generative modeling",
    appendix I.2, with one fixed noise.
    """
    check_image(image)
    noise = fitting_noise(image, noise)
    known = (image, mask, noise, is_flow(model))
    if not isinstance(model, TeacherGuidedDenoiser):
        refuse_unmarked_cfg(model, "model")
        return inpaint_denoiser(model, *known)
    if any(teacher.maps is not None for teacher in model.teachers):
        raise ValueError("inpaint takes no teacher with maps: the mask is the student's latent's")
    return model.with_denoisers(lambda denoiser: inpaint_denoiser(denoiser, *known))


def inpaint_denoiser(
    model: Denoiser, image: Tensor, mask: Tensor, noise: Tensor, flow: bool
) -> Denoiser:
    """One denoiser, an `OwnCFG` inside its mark."""
    if not isinstance(model, OwnCFG):
        return Inpainted(model, image, mask, noise, flow)
    inpainted = Inpainted(model.model, image, mask, noise, flow)
    latest = model.uncond_denoised
    twin = copy.copy(model)
    twin._modules = model._modules.copy()  # copy.copy shares it
    twin.model = inpainted
    twin.uncond_denoised = None if latest is None else lambda: inpainted.keep(latest())
    return twin


def is_flow(model: Any) -> bool:
    if isinstance(model, TeacherGuidedDenoiser):
        return model.space is FLOW
    return bool(getattr(model, "flow", False))


def check_levels(levels: Sequence[float], model: Any) -> None:
    """ValueError for levels of σ given to a flow model."""
    if is_flow(model) and max(levels, default=0.0) > 1.0:
        raise ValueError(
            f"sigmas holds {max(levels):g}; the model is a flow model, whose levels lie in [0, 1] "
            "(for levels of σ = τ/(1-τ), bring it over with kdpp.models.as_ve)"
        )


def noised(image: Tensor, sigma: Any, noise: Tensor, flow: bool) -> Tensor:
    """``x0 + σ n``, or in flow form ``(1-σ) x0 + σ n``."""
    signal = image * (1.0 - sigma) if flow else image
    return torch.add(signal, noise * sigma)


def check_image(image: Any) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"image is a {type(image).__name__}; it must be a tensor (batch, *shape)")
    if not image.is_floating_point():
        raise TypeError(f"image has dtype {image.dtype}; a latent must be floating point")
    if image.ndim == 0 or len(image) == 0:
        raise ValueError(f"image has shape {tuple(image.shape)}; it must be a batch")


def fitting_noise(image: Tensor, noise: Any) -> Tensor:
    """The noise, drawn where none is given, if it fits the image."""
    if noise is None:
        one = image.new_ones(())
        noise = host_noise(image)(one, one)
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        what = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise is {what}; it must be a floating-point tensor")
    if noise.shape != image.shape:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; it must be the image's, {tuple(image.shape)}"
        )
    return noise.to(image)


def fitting_mask(image: Tensor, mask: Any) -> Tensor:
    """The mask in the image's shape and dtype, if it fits and lies in [0, 1]."""
    if not isinstance(mask, Tensor) or mask.is_complex():
        what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {what}; it must be a real or bool tensor")
    try:
        fitting = mask.to(image).expand(image.shape)
    except RuntimeError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; it must broadcast to the image's, "
            f"{tuple(image.shape)}"
        ) from None
    if not ((fitting >= 0) & (fitting <= 1)).all():
        low, high = float(fitting.min()), float(fitting.max())
        raise ValueError(f"mask holds values from {low!r} to {high!r}; they must lie in [0, 1]")
    return fitting
