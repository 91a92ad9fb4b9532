"""Samplers of a web UI: a stock one's guided form for one run, and kdpp's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor

import kdpp
from kdpp.hosts.webui.convention import Convention
from kdpp.hosts.webui.settings import Settings

__all__ = ["PREFIX", "failing", "guided", "own_samplers"]

Sampler = Callable[..., Tensor]

PREFIX = "KDPP "
"""Of the names of kdpp's own samplers. Hosts split a name that ends in a scheduler's label; none is
a solver's name."""
RENOISE = 1
"""The stream of a picture's seed that the teacher's renoising takes."""


def guided(host: Convention, p: Any, settings: Settings) -> Sampler:
    """The guided form of ``p.sampler.func``, with its signature, for the pass that is to run.

    Loads the teacher, unless there is nothing for it to do. Raises ValueError for a sampler without
    a guided form, and as `Convention.teacher`.
    """
    # A sampler object serves all batches of image to image: its function may be a guided one.
    stock = getattr(p.sampler.func, "stock", p.sampler.func)
    solver, options = solver_behind(host, p)
    guidance: dict[str, Any] = {
        "teacher_steps": settings.teacher_steps,
        "teacher_scale": settings.teacher_scale,
        "teacher_cfg_scale": settings.teacher_cfg,
        "renoise": settings.renoise,
    }
    kdpp.TeacherGuidedDenoiser(nothing, nothing, **guidance)  # refuses wrong ones, before any work
    teacher = host.teacher(p, settings) if settings.helped else None

    @functools.wraps(stock)
    def sample(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs = {**options, **kwargs}
        try:
            student = host.student(model, solver.cfg_pp)
            if teacher is None:
                return run(solver, unguided(student), x, *args, **kwargs)
            both = kdpp.TeacherGuidedDenoiser(
                student,
                teacher(model),
                renoise_noise_sampler=kdpp.SeededNoise(x, host.seeds(model), RENOISE),
                **guidance,
            )
            return run(solver, both, x, *args, **kwargs)
        except BaseException:  # the host interrupts by one that is no Exception
            host.release()
            raise

    sample.stock = stock  # type: ignore[attr-defined]
    return sample


def nothing(x: Tensor, sigma: Tensor) -> Tensor:
    """Stands for a denoiser where settings are looked at."""
    raise NotImplementedError


def unguided(student: kdpp.HostModel) -> kdpp.TeacherGuidedDenoiser:
    """A student alone, as kdpp's samplers take it."""
    return kdpp.TeacherGuidedDenoiser(student, student, teacher_steps=0)


def failing(error: Exception, stock: Sampler) -> Sampler:
    """A sampler that raises: errors in a script's hooks end in the host's log, and those in a
    sampler where a picture's errors belong."""

    @functools.wraps(stock)
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        raise error

    return sample


def solver_behind(host: Convention, p: Any) -> tuple[kdpp.Solver, Mapping[str, Any]]:
    """kdpp's solver of a host's sampler, and its options; ValueError where it has none."""
    own: kdpp.Solver | None = getattr(p.sampler.func, "solver", None)
    if own is not None:
        return own, {}
    found = host.solver(p)
    if found is None:
        title = getattr(p.sampler.config, "name", p.sampler.func)
        raise ValueError(
            f"kdpp: the sampler {title} has no guided form; take another one, such as Euler a or "
            "DPM++ 2M, or switch the teacher off"
        )
    return found


def run(solver: kdpp.Solver, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A run with the arguments of the host's function."""
    if solver.own_levels is not None:  # other arguments: sigma_min, sigma_max, n
        assert solver.sample is not None
        made: Tensor = solver.sample(model, x, *args, **kwargs)
        return made
    return kdpp.sample(solver, model, x, *args, **kwargs)


# kdpp's own ---------------------------------------------------------------------------------------


def own_samplers(host: Convention) -> dict[str, Sampler]:
    """Samplers that this host has not, by the name that it is to show."""
    stock = host.stock()
    return {
        PREFIX + name: alone(host, solver)
        for name, solver in kdpp.SOLVERS.items()
        if solver.own_levels is None and f"sample_{name}" not in stock
    }


def alone(host: Convention, solver: kdpp.Solver) -> Sampler:
    """A solver as a host's sampler, of the student alone; `guided` knows it by ``solver``."""

    def sample(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        student = host.student(model, solver.cfg_pp)
        return run(solver, unguided(student), x, *args, **kwargs)

    given = {"extra_args": None, "callback": None, "disable": None}
    if solver.noise != "none":
        given["noise_sampler"] = None
    options = {name: option.default for name, option in solver.options.items()}
    free = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("model", "x", "sigmas")]
    fixed = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default)
        for name, default in {**given, **options}.items()
    ]
    # Hosts look at the parameters' names to know what to give.
    sample.__signature__ = inspect.Signature([*free, *fixed])  # type: ignore[attr-defined]
    sample.__name__ = f"kdpp_{solver.name}"
    sample.solver = solver  # type: ignore[attr-defined]
    return sample
