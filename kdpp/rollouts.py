"""DDIM upwards, and DDIM whose steps student and teacher take by turns.

`encode` takes an image up to its latent noise; `mixed_rollout` lets a student and its teacher take
turns on the way down. Both are made of one deterministic step, Euler's on the probability-flow ODE:
``x' = D + (x - D)/σ·σ'``. σ is the standard deviation of the noise, latents are in model space; for
a flow model σ is τ in [0, 1], and the step has the same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import trange

from kdpp.algebra import evaluation_at
from kdpp.asking import Denoise, bind_all
from kdpp.checks import (
    check_count,
    check_flow_levels,
    check_latent,
    check_number,
    check_sigmas,
    check_start,
    read_levels,
)
from kdpp.denoisers import pick_rows
from kdpp.driver import Callback, report
from kdpp.guidance import TeacherGuidedDenoiser, space_of
from kdpp.kinds import Denoiser, check_denoiser, holds_samples, trained_range
from kdpp.noise import private_generator
from kdpp.plan import FLOW
from kdpp.update import ddim

__all__ = ["Rollout", "encode", "mixed_rollout"]


@torch.no_grad()
def encode(
    model: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """Reversed DDIM: the latent noise that deterministic sampling would turn into x.

    Every step goes up, ``x' = D + (x - D)/σ·σ'`` with ``D = D^w(x, σ)`` and σ' ≥ σ. Any sampler
    decodes the result. With the same model and condition it returns to x, up to an error of first
    order in the steps; with another model or condition it transfers the style.

    Args:
        model: a denoiser, ``(x, sigma, **extra_args) -> denoised``, marked as `kdpp.OwnCFG` if it
            does its own CFG. A `kdpp.TeacherGuidedDenoiser` encodes with its student.
        x: ``(batch, *shape)``, floating point: the image, taken to be at the level ``sigmas[0]``.
            Never written to; the result has its dtype and device.
        sigmas: 1-D, positive and not decreasing, from a small level up to the highest. Of a
            sampler's schedule that ends in 0: ``sigmas[:-1].flip(0)``.
        extra_args: what the model takes: ``cond``; with ``uncond`` and ``cond_scale`` other than 1
            the encoding is guided.
        callback: called once a step with k-diffusion's dict (``x, i, sigma, sigma_hat, denoised``).
        disable: True hides the progress bar.

    Returns:
        The latent at ``sigmas[-1]``, ``(batch, *shape)``.

    Raises:
        TypeError: the model is not a denoiser, or does its own CFG unmarked; x is not a
            floating-point tensor; sigmas are not real numbers.
        ValueError: sigmas are not 1-D, finite, positive and non-decreasing, are above 1 for a flow
            model, or are timesteps; ``uncond`` is missing where CFG needs it; and, at the call that
            shows it, an output of another shape.

    Source: Song et al. 2020 (DDIM), section 4.3; the step inside Meng et al. 2023, "On Distillation
    of Guided Diffusion Models", Algorithm 5.
    """
    check_denoiser(model, "model")
    check_latent(x)
    levels, sigmas = check_rising(sigmas)
    check_levels(x, levels, model)
    model = model.student if isinstance(model, TeacherGuidedDenoiser) else model
    given = {} if extra_args is None else extra_args
    denoise = along(model, "model", levels, x, given)
    sigma_at = sigmas.unbind()
    for i in trange(max(0, len(levels) - 1), disable=disable):
        start = x
        x, denoised = step(denoise[i], start, levels[i], levels[i + 1])
        if callback:
            callback(report(start, i, sigma_at[i], denoised))
    return x


class Rollout(NamedTuple):
    """What `mixed_rollout` returns."""

    x: Tensor
    """The final latent, ``(batch, *shape)``."""
    states: tuple[Tensor, ...]
    """The latent at every level of ``sigmas``, the starting one first: each ``(batch, *shape)``."""
    by_teacher: Tensor
    """Who took which transition: bool ``(steps, batch)`` on the CPU, True for the teacher."""


@torch.no_grad()
def mixed_rollout(
    student: Denoiser,
    teacher: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    teacher_substeps: int = 8,
    teacher_probability: float | None = None,
    switch: int | None = None,
    first: str = "teacher",
    extra_args: Mapping[str, Any] | None = None,
    teacher_cfg_scale: float = 1.0,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Rollout:
    """Sample with DDIM, each transition taken by the student or by the teacher (DDIL).

    From σ_i to σ_{i+1} the student takes one step ``x' = D + (x - D)/σ_i·σ_{i+1}``, the teacher
    ``teacher_substeps`` smaller ones of the same form, over these levels (j = 0..n)::

        σ_{i,j} = σ_i (σ_{i+1}/σ_i)^{j/n}      equal steps in log σ
        σ_{i,j} = σ_i (1 - j/n)                where σ_{i+1} = 0: equal steps in σ

    (Towards σ = 0 the ODE's second derivative in σ is nearly constant, and equal steps are then the
    best that Euler can take.) Give exactly one of ``teacher_probability`` and ``switch``. Where
    coins split the batch, each network is called with its own samples alone.

    Args:
        student, teacher: denoisers, ``(x, sigma, **extra_args) -> denoised``, over one latent
            space, marked as `kdpp.OwnCFG` if they do their own CFG.
        x: the starting latent ``(batch, *shape)``, floating point, with noise of standard deviation
            ``sigmas[0]``. Never written to.
        sigmas: 1-D, non-increasing noise levels, the coarse ones; usually ending in 0.
        teacher_substeps: n ≥ 1; the paper takes 8.
        teacher_probability: p_T in [0, 1]. Every sample tosses a coin at every transition.
        switch: the index in [0, steps] of the first transition that the other network takes.
        first: "teacher" or "student": who goes before the switch.
        extra_args: what the networks take. ``cond_scale`` is the student's CFG scale. Where coins
            split the batch, batch-first tensors are split with it, and so are lists of one text for
            each sample, such as prompts.
        teacher_cfg_scale: the teacher's CFG scale; a scale other than 1 needs ``uncond``.
        generator: draws the coins, sample after sample, so a batch that is run in parts with one
            generator gets the coins of the whole. By default a generator of its own, which leaves
            the global stream where it is and is reproducible under ``torch.manual_seed``.
        callback: called once a transition with k-diffusion's dict (``x, i, sigma, sigma_hat,
            denoised``); ``denoised`` is the estimate at σ_i, each sample's from its own network.
        disable: True hides the progress bar.

    Returns:
        `Rollout`: the final latent, the states at all levels, who took which transition.

    Raises:
        TypeError: a model is not a denoiser, or does its own CFG unmarked; x is not a
            floating-point tensor; sigmas are not real numbers.
        ValueError: both or neither of ``teacher_probability`` and ``switch``; a setting outside its
            range; sigmas that increase, are not 1-D or finite, above 1 for flow models, or
            timesteps; a flow model and a VE model; a missing ``uncond``; and, at the call that
            shows it, an output of another shape.

    Source: Garrepalli et al. 2024, "DDIL: Diversity Enhancing Diffusion Distillation with Imitation
    Learning", Algorithm 1 (its β is the student's probability, 1 - p_T), supplement E, Tables 2-4.
    """
    check_denoiser(student, "student")
    check_denoiser(teacher, "teacher")
    check_latent(x)
    levels, sigmas = check_sigmas(sigmas)
    check_levels(x, levels, TeacherGuidedDenoiser(student, teacher))
    check_count("teacher_substeps", teacher_substeps, 1)
    steps = max(0, len(levels) - 1)
    if (teacher_probability is None) == (switch is None):
        raise ValueError(
            f"teacher_probability is {teacher_probability!r} and switch is {switch!r}; "
            "give exactly one of them"
        )
    if switch is None:
        by_teacher = toss(steps, x, teacher_probability, generator)
    else:
        by_teacher = turns(steps, x, switch, first)
    players = (
        Player(teacher, "teacher", teacher_cfg_scale, teacher_substeps),
        Player(student, "student", None, 1),
    )
    legs = prepare_legs(players, levels, by_teacher, x, {} if extra_args is None else extra_args)

    sigma_at = sigmas.unbind()
    states = [x]
    for i in trange(steps, disable=disable):
        start = denoised = x
        for leg in legs[i]:
            moved, estimate = leg.walk(start)
            x, denoised = leg.put(moved, x), leg.put(estimate, denoised)
        if callback:
            callback(report(start, i, sigma_at[i], denoised))
        states.append(x)
    return Rollout(x, tuple(states), by_teacher)


class Leg(NamedTuple):
    """One network's part of a transition, over ``levels``, for some samples (None: for all)."""

    denoise: Sequence[Denoise]
    """For each step between the levels."""
    levels: Sequence[float]
    samples: Tensor | None

    def walk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its samples of x at the end of the transition, and their first estimate of x0."""
        first, *others = zip(self.denoise, self.levels, self.levels[1:])
        x = x if self.samples is None else x[self.samples]
        x, estimate = step(first[0], x, *first[1:])
        if others:  # a network may use its output buffer again
            estimate = estimate.clone()
        for denoise, *pair in others:
            x, _ = step(denoise, x, *pair)
        return x, estimate

    def put(self, values: Tensor, x: Tensor) -> Tensor:
        """x with the values in the place of its samples."""
        return values if self.samples is None else x.index_copy(0, self.samples, values)


class Player(NamedTuple):
    """A network that takes transitions, each in ``substeps`` steps."""

    model: Denoiser
    name: str
    cfg_scale: float | None
    substeps: int

    def leg(
        self, x: Tensor, pair: tuple[float, float], extra_args: Mapping[str, Any], chosen: Tensor
    ) -> Leg:
        """Its part of the transition, for the samples ``chosen`` (bool, on the CPU)."""
        levels = between(*pair, self.substeps)
        denoise = along(self.model, self.name, levels, x, extra_args, self.cfg_scale)
        if chosen.all():
            return Leg(denoise, levels, None)
        rows = chosen.nonzero()[:, 0]
        own_args = pick_rows(dict(extra_args), len(x), rows)
        samples = rows.to(x.device)
        if holds_samples(self.model):
            own_args["sample_rows"] = samples
        denoise = along(self.model, self.name, levels, x[samples], own_args, self.cfg_scale)
        return Leg(denoise, levels, samples)


def prepare_legs(
    players: tuple[Player, Player],
    levels: Sequence[float],
    by_teacher: Tensor,
    x: Tensor,
    extra_args: Mapping[str, Any],
) -> list[list[Leg]]:
    """Every transition's legs, of those who have samples in it: teacher, student."""
    return [
        [
            player.leg(x, pair, extra_args, chosen)
            for player, chosen in zip(players, (row, ~row))
            if chosen.any()
        ]
        for pair, row in zip(pairwise(levels), by_teacher)
    ]


def along(
    model: Denoiser, name: str, levels: Sequence[float], x: Tensor, extra_args: Mapping[str, Any],
    cfg_scale: float | None = None,
) -> list[Denoise]:  # fmt: skip
    """The denoiser for each of the steps between the levels, its conditions fixed."""
    evaluations = [evaluation_at(model, *pair) for pair in pairwise(levels)]
    return bind_all(model, name, x, extra_args, evaluations, cfg_scale)


def step(denoise: Denoise, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """DDIM's step ``D + (x - D)/σ·σ'``, up or down, and D."""
    denoised, _ = denoise(x, x.new_full(x.shape[:1], sigma))
    return ddim(denoised, x, sigma, sigma_next), denoised


def between(sigma: float, sigma_next: float, steps: int) -> list[float]:
    """The levels of a transition in ``steps`` steps, both ends as they are given."""
    fractions = [j / steps for j in range(1, steps)]
    if sigma_next > 0.0:
        inner = [sigma * (sigma_next / sigma) ** fraction for fraction in fractions]
    else:
        inner = [sigma * (1.0 - fraction) for fraction in fractions]
    return [sigma, *inner, sigma_next]


def toss(steps: int, x: Tensor, probability: Any, generator: torch.Generator | None) -> Tensor:
    """Coins, bool (steps, batch) on the CPU, True with the probability; drawn sample by sample."""
    check_number("teacher_probability", probability, 0.0, 1.0)
    coins = private_generator(x) if generator is None else generator
    uniform = torch.rand((x.shape[0], steps), generator=coins, device=coins.device).cpu()
    heads: Tensor = uniform < probability
    return heads.T


def turns(steps: int, x: Tensor, switch: int, first: str) -> Tensor:
    """Who takes which transition, bool (steps, batch) on the CPU, with one switch for all."""
    if first not in ("teacher", "student"):
        raise ValueError(f'first is {first!r}; it must be "teacher" or "student"')
    if check_count("switch", switch, 0) > steps:
        raise ValueError(f"switch is {switch}; the schedule has {steps} transitions")
    before = torch.arange(steps) < switch
    by_teacher: Tensor = before == (first == "teacher")
    return by_teacher[:, None].repeat(1, x.shape[0])


def check_levels(x: Tensor, levels: Sequence[float], model: Any) -> None:
    """ValueError for levels that are not this kind of model's; `check_start` of a VE one."""
    if space_of(model) is FLOW:
        check_flow_levels(levels)
    else:
        guided = isinstance(model, TeacherGuidedDenoiser)
        check_start(x, levels, model.student_range if guided else trained_range(model))


def check_rising(sigmas: Any) -> tuple[list[float], Tensor]:
    """`read_levels` of an encoding; ValueError where they hold 0 or decrease."""
    levels, tensor = read_levels(sigmas)
    if 0.0 in levels:
        raise ValueError(
            "sigmas holds 0.0; to encode, every level must be a finite number > 0. Leave the 0 "
            "out: at σ = 0 the direction to the noise is unknown"
        )
    for sigma, sigma_next in pairwise(levels):
        if sigma_next < sigma:
            raise ValueError(
                f"sigmas falls from {sigma!r} to {sigma_next!r}; an encoding goes up, its levels "
                "must not decrease: sigmas.flip(0)"
            )
    return levels, tensor
