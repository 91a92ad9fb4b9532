"""The wrapper: a student, its teachers, and the settings of their guidance.

What a guided step does with them is in `kdpp.guided_step`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from kdpp.algebra import wrapped
from kdpp.asking import bind
from kdpp.checks import check_count, check_number
from kdpp.kinds import Denoiser, check_denoiser, is_flow, trained_range
from kdpp.noise import NoiseSampler
from kdpp.plan import FLOW, VE, Space
from kdpp.reflection import Reflection
from kdpp.steps import NoiseRange, Steps, read_steps

__all__ = ["NoiseRange", "Teacher", "TeacherGuidedDenoiser", "sds_scale", "space_of"]

Scale = float | Sequence[float] | Callable[[int, float], float]
Renoise = str | float | Callable[[int, float, float], float]
LatentMap = Callable[[Tensor], Tensor]
Combine = Callable[[Tensor, Sequence[Tensor], Sequence[float]], Tensor]


def sds_scale(
    step_size: float, largest: float = 1.0, *, flow: bool = False
) -> Callable[[int, float], float]:
    """λ of a gradient step of ``step_size`` on the SDS loss: ``min(largest, step_size/σ_s²)``.

    The loss ‖x - x̂_ψ‖² ᾱ_s/(1 - ᾱ_s) has the weight 1/σ_s²; with a constant λ the paper drops it.
    For a flow model's levels, ``flow=True``: σ_s = τ/(1-τ). Raises ValueError for a negative step.
    Source: Park et al. 2025, section 3.
    """
    check_number("step_size", step_size, 0.0, math.inf)
    noise = FLOW.sigma if flow else VE.sigma

    def scale(step: int, sigma: float) -> float:
        level = noise(sigma)
        if level == 0.0:
            return largest if step_size else 0.0
        return min(largest, step_size / level / level)  # the square of a small level would be 0

    return scale


@dataclass(frozen=True)
class Teacher:
    """A teacher with settings of its own, where one set of keywords does not serve all.

    The fields are `TeacherGuidedDenoiser`'s keywords for a single teacher, and:

    - ``draws``: fresh draws of ε, each with a call of its own; their estimates are averaged.
    - ``extra_args``: entries that take the place of the sampler's, such as its own ``cond``.
    - ``maps``: (there, back) for a teacher in another latent space: the student's estimate goes
      there clean, is noised and denoised there, and the teacher's estimate comes back. Needs
      ``renoise_eta=1``: the student's noise has no image in the other space.
    - ``observe``: the teacher is asked at its steps, and callbacks are told what it says; the
      images are those without it, whatever its ``scale``.

    Raises TypeError or ValueError for a setting outside its range.
    """

    denoiser: Denoiser
    scale: Scale = 0.1
    steps: Steps = 1
    cfg_scale: float = 7.5
    renoise: Renoise = "next"
    renoise_eta: float = 1.0
    draws: int = 1
    extra_args: Mapping[str, Any] | None = None
    maps: tuple[LatentMap, LatentMap] | None = None
    observe: bool = False

    def __post_init__(self) -> None:
        check_denoiser(self.denoiser, "teacher")
        # Copies: what was checked is not changed from outside.
        if isinstance(self.scale, list):
            object.__setattr__(self, "scale", tuple(self.scale))
        object.__setattr__(self, "steps", read_steps("teacher_steps", self.steps))
        check_number("teacher_cfg_scale", self.cfg_scale, -math.inf, math.inf)
        _check_renoise(self.renoise)
        check_number("renoise_eta", self.renoise_eta, 0.0, 1.0)
        check_count("draws", self.draws, 1)
        fresh = self.renoise_eta == 1.0
        if self.draws > 1 and self.renoise_eta == 0.0:
            raise ValueError(f"draws={self.draws} with renoise_eta=0 are one and the same draw")
        if self.maps is not None and not (_is_pair_of_functions(self.maps) and fresh):
            raise ValueError(
                f"maps is {self.maps!r} with renoise_eta={self.renoise_eta!r}; it must be two "
                "functions, (there, back), with renoise_eta=1, fresh noise"
            )
        if not isinstance(self.extra_args, Mapping | None):
            raise TypeError(f"extra_args is {self.extra_args!r}; it must be a dict")
        if self.extra_args is not None:
            object.__setattr__(self, "extra_args", dict(self.extra_args))
        if self.extra_args and "cond_scale" in self.extra_args:
            raise ValueError(
                "a teacher's CFG scale is its cfg_scale; take cond_scale out of extra_args"
            )


class TeacherGuidedDenoiser(nn.Module):
    """A student and the teacher that helps it while it samples (Distillation++).

    At the first k steps the student's estimate x̂ of x0 is noised again to the level σ_s, the
    teacher denoises that once, and the solver goes on with a mix of both::

        x_s   = x̂ + σ_s ε
        x̂_new = (1 - λ) x̂ + λ D_ψ^ω(x_s, σ_s)

    ``kdpp.sample_*_tg`` do this. Calling the wrapper is calling the student, with the CFG that
    ``extra_args`` asks for, so that it also works in any other sampler, unguided.

    Args:
        student, teacher: denoisers in k-diffusion's sense, ``(x, sigma, **extra_args) -> denoised``
            with x of shape ``(batch, *shape)`` in model space and sigma of shape ``(batch,)``:
            CompVisDenoiser, VDenoiser, …, or any callable, over one latent space. One that does
            its own CFG comes marked, as `kdpp.OwnCFG`. Both get ``extra_args``, less ``uncond`` and
            ``cond_scale``, which kdpp turns into one batched call of both halves. ``teacher`` may
            also be one `Teacher` or several, which then hold the settings; theirs combine as
            ``x̂_new = (1 - Σλ_j) x̂ + Σ λ_j x̂_ψj``. Without one no step is revised.
        teacher_scale: λ in [0, 1]: a number, one for each step, or a function of (step, σ_s). The
            paper takes 0.1 for SDXL-Turbo and SDXL-Lightning, 0.02 for LCM and DMD2. 0 calls no
            teacher and draws nothing.
        teacher_steps: the guided steps: k ≥ 0 for the first k; or their indices, negative ones
            from the end; or a `NoiseRange`. Steps of no length are not guided and not counted.
        teacher_cfg_scale: ω, the teacher's CFG scale; other than 1 it needs ``uncond``.
        renoise: σ_s: "next", the level that the step goes to (s = t - Δt, the paper's best; a step
            to σ = 0 is not revised then); "current", the step's own (s = t); "random", log-uniform
            between the schedule's lowest and highest; a level; or a function of (step, sigma,
            sigma_next). It is clamped to the range that the teacher was trained on, where the
            denoiser tells it (sigma_min, sigma_max), and a warning says so once.
        renoise_eta: ρ in [0, 1]: ``ε = sqrt(1-ρ²)·ε̂ + ρ n`` mixes the student's predicted noise
            ``ε̂ = (x - x̂)/σ`` (under CFG++ with x̂_∅) and fresh noise n. 1 is Algorithm 1.
        renoise_noise_sampler: ``(sigma, sigma_next) -> noise``, the source of n, called with the
            step's level and σ_s. By default a generator of its own, which leaves the host's
            random stream where it is and is reproducible under ``torch.manual_seed``.
        teacher_mask: where the teacher is heard: weights in [0, 1], of a shape that broadcasts to
            the latent's.
        combine: another mix than that line: ``combine(x̂, estimates, scales) -> x̂_new``, of the
            teachers' estimates and their λ. ``teacher_mask`` comes after it.
        extrapolate: allow λ, and their sum, outside [0, 1].
        reflection: a `kdpp.Reflection`, before the steps that it names.
        float32_state: keep the state of a 16-bit x in float32 between the networks' calls, which
            are given x's dtype; the result has it too. False: all in 16 bits.
        max_batch: the most rows that a network is called with (CFG has two for each sample, several
            draws more); larger batches are split evenly. None: no cap.
        flow: whether levels and states are a flow model's (τ in [0, 1], ``(1-τ) x0 + τ n``). By
            default what the student says of itself (its attribute ``flow``).

    Raises:
        TypeError: a model is not callable, or does its own CFG unmarked.
        ValueError: a setting is outside its range, there is no teacher, settings are given beside
            a `Teacher`, or student and teacher are not both flow models or both not.

    Source: Park et al. 2025, "Inference-Time Diffusion Model Distillation", Algorithm 1.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | Teacher | Sequence[Teacher] | None = None,
        *,
        teacher_scale: Scale = 0.1,
        teacher_steps: Steps = 1,
        teacher_cfg_scale: float = 7.5,
        renoise: Renoise = "next",
        renoise_eta: float = 1.0,
        renoise_noise_sampler: NoiseSampler | None = None,
        teacher_mask: Tensor | None = None,
        combine: Combine | None = None,
        extrapolate: bool = False,
        reflection: Reflection | None = None,
        float32_state: bool = True,
        max_batch: int | None = None,
        flow: bool | None = None,
    ) -> None:
        super().__init__()
        check_denoiser(student, "student")
        self.student = student
        settings = (teacher_scale, teacher_steps, teacher_cfg_scale, renoise, renoise_eta)
        self.teachers = _teachers(teacher, settings)
        self.extrapolate = extrapolate
        self.float32_state = float32_state
        self.max_batch = None if max_batch is None else check_count("max_batch", max_batch, 1)
        for one in self.teachers:
            if isinstance(one.scale, tuple):
                for scale in one.scale:
                    self.check_scale(scale)
            elif not callable(one.scale):
                self.check_scale(one.scale)
        if renoise_noise_sampler is not None and not callable(renoise_noise_sampler):
            raise TypeError(
                f"renoise_noise_sampler is {renoise_noise_sampler!r}; it must be a function, "
                "(sigma, sigma_next) -> noise"
            )
        self.renoise_noise_sampler = renoise_noise_sampler
        if combine is not None and not callable(combine):
            raise TypeError(
                f"combine is {combine!r}; it must be a function, (x̂, estimates, scales) -> x̂_new"
            )
        self.combine = combine
        if not isinstance(reflection, Reflection | None):
            raise TypeError(
                f"reflection is a {type(reflection).__name__}; it must be a kdpp.Reflection"
            )
        self.reflection = reflection
        self.teacher_mask = _check_mask(teacher_mask)
        self.flow = flow
        self._networks = nn.ModuleList(
            one for one in self._beside_the_student if isinstance(one, nn.Module)
        )
        self.student_range = trained_range(student)
        self.trained = [trained_range(one.denoiser) for one in self.teachers]
        self.warned = False
        for one in self.teachers:
            _check_level(one.renoise, self.space)

    @property
    def _beside_the_student(self) -> list[Denoiser]:
        """The teachers, and who reflects."""
        mirrors = (self.reflection.weak, self.reflection.strong) if self.reflection else ()
        taught = [teacher.denoiser for teacher in self.teachers]
        return taught + [one for one in mirrors if one is not None]

    @property
    def space(self) -> Space:
        """VE or FLOW; ValueError where student and teachers differ."""
        kinds = [is_flow(one) for one in (self.student, *self._beside_the_student)]
        if self.flow is not None:
            return FLOW if self.flow else VE
        if len(set(kinds)) > 1:
            raise ValueError(
                "student and teacher must both be flow models or both not: bring one over with "
                "kdpp.as_flow or kdpp.as_ve (or say flow=True or False)"
            )
        return FLOW if kinds[0] else VE

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """The student's estimate of x0, guided by ``cond_scale`` where it is given."""
        return bind(self.student, "student", x, extra_args)(x, sigma)[0]

    def with_denoisers(self, wrap: Callable[[Denoiser], Denoiser]) -> TeacherGuidedDenoiser:
        """The same guidance of ``wrap(student)`` by ``wrap(teacher)``; of a sum, of its parts."""
        mirror = self.reflection
        if mirror is not None:
            strong = mirror.strong and wrapped(mirror.strong, wrap)
            mirror = replace(mirror, weak=wrapped(mirror.weak, wrap), strong=strong)
        return TeacherGuidedDenoiser(
            wrapped(self.student, wrap),
            [
                replace(teacher, denoiser=wrapped(teacher.denoiser, wrap))
                for teacher in self.teachers
            ]
            or None,
            renoise_noise_sampler=self.renoise_noise_sampler,
            teacher_mask=self.teacher_mask,
            combine=self.combine,
            extrapolate=self.extrapolate,
            reflection=mirror,
            float32_state=self.float32_state,
            max_batch=self.max_batch,
            flow=self.flow,
        )

    def check_scale(self, scale: Any) -> float:
        """λ as a float; ValueError outside [0, 1], unless extrapolated."""
        low, high = (-math.inf, math.inf) if self.extrapolate else (0.0, 1.0)
        return check_number("teacher_scale", scale, low, high)


def space_of(model: Any) -> Space:
    """The levels of a denoiser, or of a student with its teachers: VE or FLOW."""
    if isinstance(model, TeacherGuidedDenoiser):
        return model.space
    return FLOW if is_flow(model) else VE


def _teachers(teacher: Any, settings: tuple[Any, ...]) -> list[Teacher]:
    """One `Teacher` from a denoiser and the keywords, or those given, without keywords."""
    if teacher is None:
        return []
    given = [teacher] if isinstance(teacher, Teacher) else teacher
    if not isinstance(given, Sequence):
        return [Teacher(teacher, *settings)]
    if not given:
        raise ValueError("teacher is an empty list; give at least one kdpp.Teacher")
    for one in given:
        if not isinstance(one, Teacher):
            raise TypeError(f"teacher holds a {type(one).__name__}; a list holds kdpp.Teacher only")
    defaults = (0.1, 1, 7.5, "next", 1.0)
    if not all(type(a) is type(b) and a == b for a, b in zip(settings, defaults)):
        raise ValueError("settings of the teacher belong into kdpp.Teacher where one is given")
    return list(given)


def _check_renoise(renoise: Any) -> None:
    if callable(renoise) or renoise in ("next", "current", "random"):
        return
    with suppress(ValueError):
        if check_number("renoise", renoise) > 0.0:
            return
    raise ValueError(
        f'renoise is {renoise!r}; it must be "next", "current", "random", a noise level > 0 '
        "or a function of (step, sigma, sigma_next)"
    )


def _check_level(renoise: Renoise, space: Space) -> None:
    if space is FLOW and isinstance(renoise, numbers.Real) and renoise > 1.0:
        raise ValueError(f"renoise is {renoise!r}; a flow model's levels lie in (0, 1]")


def _is_pair_of_functions(maps: Any) -> bool:
    return isinstance(maps, Sequence) and len(maps) == 2 and all(map(callable, maps))


def _check_mask(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"teacher_mask is a {type(mask).__name__}; it must be a tensor")
    if mask.is_complex():
        raise TypeError(f"teacher_mask has dtype {mask.dtype}; it must hold real weights")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError("teacher_mask holds values outside [0, 1]")
    return mask
