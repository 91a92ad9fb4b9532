"""Editing images: start from a noised one (SDEdit), or keep a region of it (inpainting).

Both work with every sampler, kdpp's and k-diffusion's: `image_to_image` only makes the start, and
`inpaint` only wraps the model. σ is the standard deviation of the noise, ``x = x0 + σ n``, or of a
flow model (``model.flow`` is True) τ in [0, 1], ``x = (1-τ) x0 + τ n``. Images are latents in model
space.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from kdpp.algebra import wrapped
from kdpp.checks import check_flow_levels, check_latent, check_sigmas
from kdpp.denoisers import shaped
from kdpp.guidance import TeacherGuidedDenoiser, space_of
from kdpp.kinds import Denoiser, OwnCFG, Transparent, check_denoiser, holds_samples
from kdpp.noise import host_noise
from kdpp.plan import FLOW
from kdpp.solver import solver_of

__all__ = ["Inpainted", "image_to_image", "inpaint", "truncate"]

Result = TypeVar("Result")


def truncate(sigmas: Tensor, strength: float) -> Tensor:
    """The last part of a schedule: ``max(1, round(strength·steps))`` steps of it.

    Args:
        sigmas: 1-D, non-increasing noise levels, ``steps + 1`` of them.
        strength: in (0, 1]: 1 keeps the whole schedule; the smaller, the closer to the image.

    Raises:
        TypeError: sigmas is not a tensor or list of real numbers.
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
            schedule's last level above 0 and its first.
        model: the model that this sampler takes.
        image: ``(batch, *shape)``, floating point. Never written to.
        sigmas: 1-D, non-increasing levels. The higher ``σ_0 = sigmas[0]``, the less of the image is
            left. To cut a text-to-image schedule: `truncate`.
        args, options: handed to the sampler: ``extra_args``, ``callback``, ``disable``, …
        noise: n, standard normal, of the image's shape; by default drawn as k-diffusion's samplers
            draw theirs.

    Returns:
        What the sampler returns.

    Raises:
        TypeError: image or noise is not a floating-point tensor, sigmas are not real numbers, or
            sample cannot be called.
        ValueError: the image is an empty batch, or noise has another shape; sigmas is empty, not
            1-D, holds a number that is negative or not finite, increases, or has levels above 1
            for a flow model.

    Source: Meng et al. 2022, "SDEdit"; with a distilled model Meng et al. 2023, section 4.2.3.
    """
    if not callable(sample):
        raise TypeError(f"sample is {sample!r}; it must be a sampler, (model, x, sigmas, …)")
    check_image(image)
    levels, sigmas = check_sigmas(sigmas)
    if not levels:
        raise ValueError("sigmas is empty; its first level says how much noise the image gets")
    flow = space_of(model) is FLOW
    if flow:
        check_flow_levels(levels)
    start = noised(image, levels[0], fitting_noise(image, noise), flow)
    if makes_levels(sample):
        low = min((level for level in levels if level > 0.0), default=0.0)
        return sample(model, start, low, levels[0], *args, **options)
    return sample(model, start, sigmas, *args, **options)


def makes_levels(sample: Callable[..., Any]) -> bool:
    """Whether a sampler makes its own levels: it takes sigma_min and sigma_max, and no sigmas."""
    try:
        return solver_of(sample)[0].own_levels is not None
    except ValueError:  # not one of kdpp's
        return "sigma_min" in inspect.signature(sample).parameters


class Inpainted(Transparent):
    """A denoiser that knows a part of the image; `inpaint` makes one.

    With the mask m, 0 where the image x0* is known::

        D'(x, σ) = (1 - m) x0* + m D((1 - m)(x0* + σ n) + m x, σ)

    The network sees the known region at the right noise level, with the same noise n at every
    call, whatever the sampler has made of x there. The estimate there is the image, so any sampler
    whose last step goes to σ = 0 ends on it. A flow model sees ``(1-τ) x0* + τ n``.

    Args:
        denoiser: ``(x, sigma, **extra_args) -> denoised``.
        image, mask, noise: as in `inpaint`; noise must be given.
        flow: whether x and sigma are a flow model's.
    """

    _inner = "inner_model"

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
        self.holds_samples = len(image) > 1

    def forward(
        self, x: Tensor, sigma: Tensor, *, sample_rows: Tensor | None = None, **extra_args: Any
    ) -> Tensor:
        """The estimate of x0.

        Args:
            sample_rows: which samples of the batch x holds, whole numbers ``(len(x),)``. None: x is
                the whole batch, or several copies of it one after the other, as by CFG.

        Raises:
            ValueError: x does not fit the image, or the denoiser's output does not fit x.
        """
        if sample_rows is not None:
            sample_rows = sample_rows.to(x.device, non_blocking=True)
            if holds_samples(self.inner_model):
                extra_args["sample_rows"] = sample_rows
        image, mask, noise = (
            self._for(x, part, sample_rows) for part in (self.image, self.mask, self.noise)
        )
        level = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
        seen = torch.lerp(noised(image, level, noise, self.flow), x, mask)
        denoised = shaped(self.inner_model(seen, sigma, **extra_args), "inpainted model", x)
        return torch.lerp(image, denoised, mask)

    def uncond_denoised(self) -> Tensor:
        """The unconditional estimate of an `OwnCFG` inside, with the image in the known region."""
        own_cfg: Any = self.inner_model
        denoised: Tensor = own_cfg.uncond_denoised()
        image, mask = (self._for(denoised, part) for part in (self.image, self.mask))
        return torch.lerp(image, denoised, mask)

    def _for(self, x: Tensor, part: Tensor, rows: Tensor | None = None) -> Tensor:
        """``part`` for x's samples, dtype and device."""
        if x.shape[1:] != part.shape[1:] or (rows is None and len(x) % len(part)):
            raise ValueError(
                f"the model got x of shape {tuple(x.shape)}, and the image to inpaint has shape "
                f"{tuple(part.shape)}; they must be alike (the image's batch may be 1)"
            )
        part = part.to(x)
        if len(part) == 1:
            return part
        if rows is not None:
            return part[rows % len(part)]
        copies = len(x) // len(part)
        return part if copies == 1 else part.repeat(copies, *[1] * (x.ndim - 1))


def inpaint(model: Any, image: Tensor, mask: Tensor, noise: Tensor | None = None) -> Any:
    """The same model, but it keeps the image where the mask is 0; see `Inpainted`.

    Student and teachers of a `kdpp.TeacherGuidedDenoiser` see the same known region, with the same
    noise. The new wrapper has the settings of the old one, which stays as it is. What a sampler
    returns equals the image where the mask is 0: exactly with kdpp's samplers (LMS: up to
    rounding), up to rounding with k-diffusion's. The schedule must end in 0.

    Args:
        model: a `kdpp.TeacherGuidedDenoiser`, a `kdpp.OwnCFG` (its unconditional estimate, for
            CFG++, keeps the image too) or any other denoiser.
        image: ``(batch, *shape)`` or ``(1, *shape)``, floating point.
        mask: broadcastable to the image, values in [0, 1] or bool: 0 keeps, 1 makes anew; in
            between both are blended.
        noise: standard normal, of the image's shape; by default drawn as k-diffusion's samplers
            draw theirs. To start from the noised image, give `image_to_image` the same.

    Returns:
        A `kdpp.TeacherGuidedDenoiser`, a `kdpp.OwnCFG`, a `kdpp.WeightedSum` or a denoiser, as the
        model is.

    Raises:
        TypeError: image or noise is not a floating-point tensor, or mask not a real or bool one;
            the model is not a denoiser, or does its own CFG unmarked.
        ValueError: mask or noise of a shape that does not fit; a mask outside [0, 1]; an empty
            batch; or a teacher in another latent space (with ``maps``), where the mask has no
            meaning.

    Source: the known region's replacement of Song et al. 2021, "Score-based generative modeling",
    appendix I.2, with one fixed noise.
    """
    check_image(image)
    noise = fitting_noise(image, noise)
    known = (image, mask, noise, space_of(model) is FLOW)
    if not isinstance(model, TeacherGuidedDenoiser):
        check_denoiser(model, "model")
        return wrapped(model, lambda denoiser: inpaint_denoiser(denoiser, *known))
    if any(teacher.maps is not None for teacher in model.teachers):
        raise ValueError(
            "a teacher with maps works in another latent space, where the mask has no meaning; "
            "inpaint takes none"
        )
    return model.with_denoisers(lambda denoiser: inpaint_denoiser(denoiser, *known))


def inpaint_denoiser(
    model: Denoiser, image: Tensor, mask: Tensor, noise: Tensor, flow: bool
) -> Denoiser:
    """One denoiser, inpainted; what is marked by `OwnCFG` stays marked."""
    inpainted = Inpainted(model, image, mask, noise, flow)
    if not isinstance(model, OwnCFG):
        return inpainted
    marked = OwnCFG(inpainted, inpainted.uncond_denoised if model.uncond_denoised else None)
    marked.divisible = model.divisible
    return marked


def noised(image: Tensor, sigma: Any, noise: Tensor, flow: bool) -> Tensor:
    """``x0 + σ n``, or in flow form ``(1-σ) x0 + σ n``."""
    signal = image * (1.0 - sigma) if flow else image
    return torch.add(signal, noise * sigma)


def check_image(image: Any) -> None:
    """`check_latent` of an image; ValueError for a batch of none, too."""
    check_latent(image, "image")
    if len(image) == 0:
        raise ValueError(f"image has shape {tuple(image.shape)}; its batch is empty")


def fitting_noise(image: Tensor, noise: Any) -> Tensor:
    """The noise, drawn if it is None; TypeError or ValueError unless it fits the image."""
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
    """The mask in the image's shape and dtype; TypeError or ValueError unless it fits."""
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
