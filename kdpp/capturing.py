"""A sampler's whole run as one compiled function, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdpp.denoisers import map_tensors
from kdpp.driver import Noise, PlannedRun, ReadyPlan, plan_run, walk
from kdpp.memory import is_moved
from kdpp.solver import Solver, solver_of

__all__ = ["capture"]

MODES = ("compile", "graph")
OLDEST = "2.4"  # the oldest torch that this was run on; the rest of kdpp's core runs from 2.1 on
WARM_UPS = 3  # runs on a side stream, in which libraries choose their kernels and workspaces


def capture(
    sampler: Callable[..., Tensor] | Solver | str,
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    *,
    mode: str = "compile",
    **options: Any,
) -> Callable[..., Tensor]:
    """A sampler's run as one piece, to be carried out again and again.

    For one schedule and one set of settings. Noise is drawn before the loop, from where the sampler
    itself would draw it, so every run has its own; it takes one latent for each draw.

    Args:
        sampler: one of kdpp's samplers, such as ``kdpp.sample_euler_tg``, or its name.
        model: a `kdpp.TeacherGuidedDenoiser` whose networks torch can trace (or CUDA record): no
            reads of tensors' values, no teachers that come and go, none with ``maps``.
        x, extra_args: a latent and conditions as they will be given: shape, dtype and device hold
            for every run of a graph; compiled code is made anew for other shapes.
        mode: "compile": ``torch.compile(fullgraph=True)`` of the loop with its networks, made at
            the first run. "graph": one CUDA graph, recorded here and replayed: the host launches
            once for the whole run.
        options: the sampler's: ``eta``, ``noise_sampler``, … (no callback).

    Returns:
        A function ``(x, extra_args) -> latent``; extra_args is by default what was given here.

    Raises:
        ValueError: anything but one of kdpp's samplers, another mode, a callback, a teacher that
            cannot be captured; in a run of a graph, a latent or conditions of another form than
            here.
        RuntimeError: mode "graph" without CUDA, or torch before 2.4.
    """
    if torch.__version__ < OLDEST:
        raise RuntimeError(
            f"kdpp.capture needs torch {OLDEST} or later; this is {torch.__version__}"
        )
    if mode not in MODES:
        raise ValueError(f'mode is {mode!r}; it must be "compile" or "graph"')
    solver, fixed = solver_of(sampler)
    given = {"callback": None, "disable": None, "noise_sampler": None, **fixed, **options}
    callback, _, noise_sampler = (given.pop(n) for n in ("callback", "disable", "noise_sampler"))
    if callback is not None:
        raise ValueError("a captured run has no steps to call back from; leave callback out")
    if mode == "graph" and x.device.type != "cuda":
        raise RuntimeError(f'mode="graph" records CUDA kernels; x lies on {x.device}')
    run = plan_run(solver, model, x, sigmas, noise_sampler, given)
    if not run.plan.steps:
        raise ValueError(f"nothing to capture: sigmas holds no step, {sigmas}")
    guided = run.model
    if any(teacher.maps is not None for teacher in guided.teachers) or is_moved(guided):
        raise ValueError("a teacher with maps, or one that comes and goes, cannot be captured")
    mask = guided.teacher_mask
    if mode == "graph" and mask is not None and mask.device != x.device:
        raise ValueError(f"teacher_mask lies on {mask.device}; a graph needs it on {x.device}")
    make = Compiled if mode == "compile" else Graph
    return make(run, x, {} if extra_args is None else extra_args)


class Drawn(NamedTuple):
    """A run's noise, drawn before its loop: the solver's and the teachers'."""

    solver: list[Tensor]
    teacher: list[Tensor]

    @classmethod
    def of(cls, plan: ReadyPlan, noise: Noise, x: Tensor) -> Drawn:
        """All that the loop will ask for, in its order."""
        drawn = cls([], [])
        for i, step in enumerate(plan.steps):
            if step.churn is not None:
                drawn.solver.append(noise.between(i, None, None))
            for revision in step.revisions:
                if revision.renoise.noise is not None:
                    drawn.teacher.append(noise.renoise(x, i, revision.level))
            for stage in step.stages:
                if stage.update.noise is not None:
                    drawn.solver.append(noise.between(i, stage.start, stage.end))
        return drawn


class Handed:
    """Hands out what was drawn, in the loop's order."""

    def __init__(self, drawn: Drawn) -> None:
        self.solver, self.teacher = iter(drawn.solver), iter(drawn.teacher)

    def between(self, step: int, start: float | None, end: float | None) -> Tensor:
        return next(self.solver)

    def renoise(self, like: Tensor, step: int, level: float) -> Tensor:
        return next(self.teacher)


class Compiled:
    """A run whose loop is compiled with its networks; see `capture`."""

    def __init__(self, run: PlannedRun, x: Tensor, extra_args: Mapping[str, Any]) -> None:
        self.run, self.extra_args = run, extra_args
        plan, model, indices = run.plan, run.model, range(len(run.plan.steps))

        def loop(
            x: Tensor,
            table: list[Tensor],
            extra_args: dict[str, Any],
            drawn: Drawn,
            dtype: torch.dtype | None,
        ) -> Tensor:
            return walk(plan, model, x, table, extra_args, Handed(drawn), indices, None, dtype)

        # torch keeps a few traces of one code object, and this run is not to use up another's.
        code, closure = loop.__code__.replace(), loop.__closure__
        own = FunctionType(code, loop.__globals__, loop.__name__, None, closure)
        self.loop = torch.compile(own, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, x: Tensor, extra_args: Mapping[str, Any] | None = None) -> Tensor:
        given = self.extra_args if extra_args is None else extra_args
        state, dtype = self.run.state(x)
        drawn = Drawn.of(self.run.plan, self.run.noise(state), state)
        table = list(self.run.plan.levels_of(x))
        image: Tensor = self.loop(state, table, dict(given), drawn, dtype)
        return image.to(x.dtype)


class Graph:
    """A run recorded as one CUDA graph; see `capture`."""

    @torch.no_grad()
    def __init__(self, run: PlannedRun, x: Tensor, extra_args: Mapping[str, Any]) -> None:
        self.run, self.form = run, _form((x, dict(extra_args)))
        state, dtype = run.state(x)
        self.state, self.extra_args = state.clone(), map_tensors(dict(extra_args), torch.clone)
        self.drawn = Drawn.of(run.plan, run.noise(state), state)
        self.table = run.plan.levels_of(x)  # the graph reads it where it lies, so it has to stay
        indices = range(len(run.plan.steps))

        def loop() -> Tensor:
            start, given, noise = self.state, self.extra_args, Handed(self.drawn)
            return walk(run.plan, run.model, start, self.table, given, noise, indices, None, dtype)

        side = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                loop()
        torch.cuda.current_stream(x.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.image = loop()

    @torch.no_grad()
    def __call__(self, x: Tensor, extra_args: Mapping[str, Any] | None = None) -> Tensor:
        given = self.extra_args if extra_args is None else dict(extra_args)
        if _form((x, given)) != self.form:
            raise ValueError(
                f"the graph was recorded for {self.form}, and is given {_form((x, given))}; "
                "capture anew for another form"
            )
        state, _ = self.run.state(x)
        drawn = Drawn.of(self.run.plan, self.run.noise(state), state)
        self.state.copy_(state)
        for fixed, new in ((self.extra_args, given), (self.drawn, drawn)):
            for target, source in zip(_tensors(fixed), _tensors(new)):
                target.copy_(source)
        self.graph.replay()
        # The next replay writes over the graph's own memory.
        return self.image.to(x.dtype, copy=True)


def _form(value: Any) -> Any:
    """The structure with every tensor's shape, dtype and device in its place."""
    return map_tensors(value, lambda tensor: (tuple(tensor.shape), tensor.dtype, tensor.device))


def _tensors(value: Any) -> list[Tensor]:
    """The structure's tensors, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found
