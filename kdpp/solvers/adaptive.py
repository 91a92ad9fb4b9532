"""DPM-Solver that chooses its steps while it runs.

It has no plan beforehand, so it is no `kdpp.Solver`: it stands in no list, cannot be captured, and
reads one number back from the device for each step that it tries.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from kdpp.asking import asks_where, bind
from kdpp.checks import check_latent, check_start
from kdpp.denoisers import counted
from kdpp.driver import (
    Callback,
    ExtraArgs,
    Noise,
    check_kind,
    check_model,
    networks_asked,
    state_of,
)
from kdpp.guidance import NoiseRange, Teacher, TeacherGuidedDenoiser
from kdpp.guided_step import Revision, plan_revisions, prepare, weights_of
from kdpp.memory import Loans
from kdpp.noise import NoiseSampler, host_noise, private_seed
from kdpp.plan import VARIABLES, VE, Row, Space, Stage, Step, ancestral_split, euler_row, from_tau
from kdpp.solver import ANCESTRAL, VARIABLE, Option
from kdpp.solvers.singlestep import dpm_solver
from kdpp.update import Update

__all__ = ["sample_dpm_adaptive_tg"]

OPTIONS = {
    "order": Option(3, low=2, high=3),
    "rtol": Option(0.05, low=0.0, above=True),
    "atol": Option(0.0078, low=0.0, above=True),
    "h_init": Option(0.05, low=0.0, above=True),
    "pcoeff": Option(0.0),
    "icoeff": Option(1.0),
    "dcoeff": Option(0.0),
    "accept_safety": Option(0.81, low=0.0, above=True),
    "eta": Option(0.0, low=0.0),
    "s_noise": ANCESTRAL["s_noise"],
    **VARIABLE,
}
COEFFICIENTS = ("pcoeff", "icoeff", "dcoeff", "accept_safety")
CLOSE = 1e-5
"""A run ends so near to its end, in -log σ."""
SHORTEST = 1e-6
"""No step is tried that is shorter: the estimates do not settle as steps shrink."""


@dataclass
class Controller:
    """The length of the next step, from the errors of the last (a PID controller)."""

    h: float
    order: float
    pcoeff: float
    icoeff: float
    dcoeff: float
    accept_safety: float
    inverse: list[float] = field(default_factory=list)
    """1/error of the step tried and of the two accepted before it."""

    def accepts(self, error: float) -> bool:
        """Whether a step of this error is taken; and the length of the next one."""
        now = 1.0 / (error + 1e-8)
        _, *before = self.inverse or [now] * 3
        powers = (
            self.pcoeff + self.icoeff + self.dcoeff,
            -self.pcoeff - 2.0 * self.dcoeff,
            self.dcoeff,
        )
        factor = math.prod(i ** (p / self.order) for i, p in zip((now, *before), powers))
        factor = 1.0 + math.atan(factor - 1.0)
        self.h *= factor
        taken = factor >= self.accept_safety
        self.inverse = [now, now, before[0]] if taken else [now, *before]
        return taken


def embedded(sigma: float, target: float, order: int) -> tuple[tuple[Stage, ...], Row]:
    """The stages of DPM-Solver of this order, and the row of the order below to the same end.

    That row weighs the same estimates, but for the newest.
    """
    row = euler_row(sigma, target)
    if order == 3:
        row = dpm_solver(sigma, target, 2, r=1 / 3)[-1].row
    newest, *older = row.direction
    low = Row(row.target, direction=(0.0, row.denoised + newest, *older))
    return dpm_solver(sigma, target, order), low


class Adaptive:
    """A run: what does not change from step to step, and the steps taken so far."""

    def __init__(
        self,
        model: TeacherGuidedDenoiser,
        x: Tensor,
        extra_args: Mapping[str, Any],
        dtype: torch.dtype | None,
        noise: Noise,
        rule: Space,
        settings: Mapping[str, Any],
    ) -> None:
        self.model, self.extra_args, self.dtype, self.noise = model, extra_args, dtype, noise
        self.rule, self.settings, self.space = rule, settings, model.space
        self.student = bind(
            model.student, "student", x, extra_args, dtype=dtype, max_batch=model.max_batch
        )
        self.previous = self.rough = x  # solutions of the lower order: the last step's, this one's
        self.first: Tensor | None = None  # the estimate at x, once it is made
        self.taken: list[Step] = []
        self.evaluations = 0

    def plan(self, start: float, end: float, lowest: float) -> tuple[Step, Row]:
        """A step between the rule's levels, and the row of the lower order, in σ."""
        sigma, sigma_next = self.rule.sigma(start), self.rule.sigma(end)
        eta, s_noise = self.settings["eta"], self.settings["s_noise"]
        down = max(lowest, ancestral_split(sigma, sigma_next, eta, s_noise)[0])
        down = min(down, sigma_next)  # which rounding may have below the lowest
        lift = s_noise * math.sqrt((sigma_next - down) * (sigma_next + down))
        stages, low = embedded(start, self.rule.level(down), self.settings["order"])
        if self.rule is not VE:
            (one,) = from_tau(sigma, [Stage(start, low)])
            stages, low = from_tau(sigma, stages), one.row
        row = replace(stages[-1].row, noise=lift if eta * s_noise > 0.0 else None)
        return Step(sigma, sigma_next, (*stages[:-1], replace(stages[-1], row=row))), low

    def update(self, step: Step, row: Row, reached: float, weights: Sequence[float] = ()) -> Update:
        return Update.of(row, step.sigma, reached, self.space, False, weights)

    def attempt(self, x: Tensor, step: Step, low: Row) -> tuple[float, Tensor, list[Tensor]]:
        """The error, the point of the newest estimate, and all estimates, the newest first."""
        point, estimates = x, list[Tensor]()
        for i, stage in enumerate(step.stages):
            where, sigma = point, x.new_full((len(x),), self.space.level(stage.sigma))
            if i > 0 or self.first is None:
                estimates.insert(0, counted(self.student(point, sigma)[0]))
                self.evaluations += 1
            else:
                estimates.insert(0, self.first)
            if i == 0:
                self.first = estimates[0]
            ends = [*(later.sigma for later in step.stages[i + 1 :]), step.sigma_next]
            row = replace(stage.row, noise=None)
            point = self.update(step, row, ends[0])(self.groups(x, estimates), None)
        rough = self.update(step, low, step.sigma_next)(self.groups(x, estimates), None)
        size = torch.maximum(rough.abs(), self.previous.abs()) * self.settings["rtol"]
        off = (rough - point) / size.clamp(min=self.settings["atol"])
        self.rough = rough
        return float(torch.linalg.vector_norm(off)) / math.sqrt(x.numel()), where, estimates

    def groups(
        self, x: Tensor, estimates: Sequence[Tensor], heard: Sequence[Tensor] = ()
    ) -> tuple[Sequence[Tensor], ...]:
        """A row's tensors, as `Update` takes them."""
        return (x, estimates[0]), heard, estimates, (), ()

    def take(
        self, x: Tensor, step: Step, point: Tensor, estimates: Sequence[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The state after a step that was accepted, with the teachers' help, and their report."""
        revisions = self.revisions(step)
        heard: tuple[Tensor, ...] = ()
        report: dict[str, Any] = {}
        (guided,) = prepare(self.model, [revisions], x, self.extra_args, self.dtype)
        if guided is not None:
            self.noise.sigma_at = (x.new_tensor(self.space.level(step.sigma)),)
            borrowed = Loans({0: networks_asked(self.model, revisions)})
            try:
                borrowed.fetch(0)
                newest = estimates[0]
                revised = guided.revise(point, newest, newest, 0, self.noise.renoise)
            finally:
                borrowed.release()
            heard, report = revised.heard, guided.report(newest, revised)
        weights = weights_of(revisions, self.model.combine is not None)
        update = self.update(step, step.stages[-1].row, step.sigma_next, weights)
        levels = map(self.space.level, (step.sigma, step.sigma_next))
        fresh = None if update.noise is None else self.noise.between(0, *levels)
        self.taken.append(step)
        self.previous, self.first = self.rough, None
        return update(self.groups(x, estimates, heard), fresh), report

    def revisions(self, step: Step) -> tuple[Revision, ...]:
        """What the teachers are asked in this step, the next one of those taken."""
        place = len(self.taken)
        last = max((i for one in self.model.teachers for i in chosen(one)), default=0)
        steps = [*self.taken, *[step] * max(1, last + 1 - place)]  # an index may lie ahead
        seed = partial(private_seed, self.previous)
        return plan_revisions(self.model, steps, False, seed)[place]


@torch.no_grad()
def sample_dpm_adaptive_tg(
    model: Any, x: Tensor, sigma_min: float, sigma_max: float,
    extra_args: ExtraArgs = None, callback: Callback | None = None, disable: bool | None = None,
    order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05,
    pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, accept_safety: float = 0.81,
    eta: float = 0.0, s_noise: float = 1.0, noise_sampler: NoiseSampler | None = None,
    return_info: bool = False, *, variable: str = "sigma",
) -> Any:  # fmt: skip
    """DPM-Solver-12 and -23 (``order`` 2 and 3), with steps of its own choosing.

    Each step from ``sigma_max`` to ``sigma_min`` is tried with two solutions, of orders p - 1 and
    p, from the same estimates. ``δ = max(atol, rtol·max(|x_low|, |x_low,prev|))`` and the error is
    the root mean square of ``(x_low - x_high)/δ`` over the batch: up to about 1 the step is taken,
    and from it comes the next length, ``h·limited(error^{-1/p})``, at first ``h_init`` in -log σ.
    ``pcoeff``, ``icoeff``, ``dcoeff`` and ``accept_safety`` are the controller's. p evaluations for
    a step that is tried, one fewer after one that was not taken.

    The teacher is asked once a step was taken, so that no call is thrown away and the controller
    sees the student alone; its term has coefficient 1. Steps are counted as they are taken:
    ``teacher_steps=k`` is the first k. How many there will be is not known, so that lists of
    scales and steps from the end are refused.

    Args:
        variable: what the rule takes for the level, see `kdpp.solvers`; "tau" from τ = 1, too.
        return_info: also return how many steps were tried, accepted, rejected, and evaluations.

    The callback is called once for each step that was tried, with k-diffusion's dict.

    Raises:
        ValueError: levels that are not 0 < sigma_min ≤ sigma_max < ∞; an option out of its range; a
            list of teacher_scale, a step below 0 in teacher_steps; in the run, estimates that are
            not finite, or that do not settle as steps shrink.
        TypeError: a model that is not wrapped, a latent that is no floating-point tensor.

    Source: Lu et al. 2022 (DPM-Solver), appendix C, algorithms 3 and 4, as in k-diffusion.
    """
    given = {
        "order": order, "rtol": rtol, "atol": atol, "h_init": h_init, "pcoeff": pcoeff,
        "icoeff": icoeff, "dcoeff": dcoeff, "accept_safety": accept_safety, "eta": eta,
        "s_noise": s_noise, "variable": variable,
    }  # fmt: skip
    settings: dict[str, Any] = {name: OPTIONS[name].read(name, one) for name, one in given.items()}
    model = check_fits(check_model(model))
    check_latent(x)
    space, rule = model.space, VARIABLES[settings["variable"]]
    levels = check_ends(sigma_min, sigma_max)
    check_kind(levels, model, space)
    high, low = map(space.sigma, levels)
    if rule.level(high) == math.inf:
        raise ValueError('sigma_max is τ = 1, σ = ∞: give a level below, or variable="tau"')
    if space is VE:
        check_start(x, levels, model.student_range)
    state, dtype = state_of(model, x)
    ends = state.new_tensor(levels)
    noise = Noise(noise_sampler, model.renoise_noise_sampler, state, levels, ends, guided=True)
    if noise.sampler is None:
        noise.sampler = host_noise(state)
    run = Adaptive(model, state, extra_args or {}, dtype, noise, rule, settings)
    power = 1.5 if settings["eta"] else order  # of h in the error
    pid = Controller(settings["h_init"], power, *(settings[name] for name in COEFFICIENTS))
    time, end = (-math.log(rule.level(sigma)) for sigma in (high, low))
    info = dict.fromkeys(("steps", "nfe", "n_accept", "n_reject"), 0)
    with tqdm(disable=disable) as bar:
        while time < end - CLOSE:
            to = min(end, time + pid.h)
            step, row = run.plan(math.exp(-time), math.exp(-to), low)
            before = run.evaluations
            error, point, estimates = run.attempt(state, step, row)
            taken = check_error(error, pid, space.level(step.sigma))
            report: dict[str, Any] = {}
            if taken:
                state, report = run.take(state, step, point, estimates)
                time = to
            bar.update(run.evaluations - before)
            info["steps"] += 1
            info["nfe"], info["n_accept"] = run.evaluations, len(run.taken)
            info["n_reject"] = info["steps"] - info["n_accept"]
            if callback is not None:
                at = state.new_tensor(space.level(rule.sigma(math.exp(-time))))
                callback({
                    "sigma": at, "sigma_hat": at, "t": -at.log(), "t_up": -at.log(),
                    "x": state, "i": info["steps"] - 1, "denoised": estimates[-1],
                    "error": error, "h": pid.h,
                    **info, **report,
                })  # fmt: skip
    image = state.to(x.dtype)
    return (image, info) if return_info else image


def check_ends(sigma_min: Any, sigma_max: Any) -> list[float]:
    """[sigma_max, sigma_min] as numbers; ValueError unless 0 < sigma_min ≤ sigma_max < ∞."""
    for level in (sigma_min, sigma_max):
        if not isinstance(level, numbers.Real | Tensor) or isinstance(level, bool):
            raise ValueError(f"sigma_min and sigma_max hold {level!r}; they must be numbers")
    low, high = float(sigma_min), float(sigma_max)
    if not 0.0 < low <= high < math.inf:
        raise ValueError(
            f"sigma_min is {low!r} and sigma_max {high!r}; "
            "they must be 0 < sigma_min ≤ sigma_max < inf"
        )
    return [high, low]


def check_fits(model: TeacherGuidedDenoiser) -> TeacherGuidedDenoiser:
    """The model; ValueError for settings that need the steps beforehand."""
    needs = {
        "reflection": model.reflection is not None,
        "a student that takes sigma_next": asks_where(model.student),
        "a WeightedSum whose weights change": not getattr(model.student, "constant", True),
    }
    for what, there in needs.items():
        if there:
            raise ValueError(
                f"{what} needs the steps beforehand, and this solver chooses them while it runs; "
                "take one with a schedule, such as sample_dpmpp_2m_tg"
            )
    for one in model.teachers:
        if isinstance(one.scale, Sequence):
            raise ValueError(
                f"teacher_scale is a list of {len(one.scale)} numbers, and this solver chooses how "
                "many steps there are: give one number, or a function of (step, sigma)"
            )
        if min(chosen(one), default=0) < 0:
            raise ValueError(
                f"teacher_steps holds {min(chosen(one))}, counted from the end, and this solver "
                "chooses how many steps there are: count from 0, or give a kdpp.NoiseRange"
            )
    return model


def chosen(teacher: Teacher) -> Collection[int]:
    """The steps that a teacher is given by their numbers."""
    steps: Any = teacher.steps
    return () if isinstance(steps, numbers.Integral | NoiseRange) else steps


def check_error(error: float, pid: Controller, level: float) -> bool:
    """Whether the step is taken; ValueError where trying on would never end."""
    if not math.isfinite(error):
        raise ValueError(f"the student's estimates at σ = {level:g} are not finite")
    taken = pid.accepts(error)
    if pid.h < SHORTEST:
        raise ValueError(
            f"at σ = {level:g} no step is short enough for rtol and atol: the student's estimates "
            "change as much however close their points are"
        )
    return taken
