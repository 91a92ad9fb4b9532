"""Analytic denoisers, schedules and noise sources: small problems whose answers are known.

A denoiser here is what k-diffusion calls one: ``(x, sigma, **extra_args) -> estimate of x0``, with
`x` of shape (B, *SHAPE) and `sigma` of shape (B,).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kdpp

SHAPE = (3, 2, 2)
SIGMA_MAX, SIGMA_MIN = 14.6146, 0.0292


# ---------------------------------------------------------------------------------- denoisers


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian numbers that depend on `seed` alone and leave the global stream untouched."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def per_sample(sigma: Tensor, x: Tensor) -> Tensor:
    """Gives the noise levels `sigma`, one per sample, the number of dimensions of `x`."""
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def shift(cond: Tensor | None, x: Tensor) -> Tensor | float:
    """What a condition of shape (B, channels) adds to the data's mean."""
    return 0.0 if cond is None else cond.to(x.dtype).reshape(*cond.shape, *[1] * (x.ndim - 2))


class Gaussian(nn.Module):
    """E[x0 | x] for data N(mean + cond, diag(variance)), whose ODE is solved in closed form."""

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The posterior mean: (c x + s^2 mu) / (c + s^2)."""
        level = per_sample(sigma, x).to(x.dtype) ** 2
        mean, variance = self.mean.to(x.dtype) + shift(cond, x), self.variance.to(x.dtype)
        return (variance * x + level * mean) / (variance + level)

    def solution(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The probability-flow ODE's exact solution from `sigma` to `sigma_next`."""
        ratio = (self.variance + sigma_next**2) / (self.variance + sigma**2)
        return self.mean + (x - self.mean) * ratio.sqrt()


class Mixture(nn.Module):
    """E[x0 | x] for a mixture of Gaussians of one variance: a denoiser that is not linear."""

    means: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, weights: Tensor, variance: float) -> None:
        super().__init__()
        self.register_buffer("means", means)
        self.register_buffer("log_weights", weights.log())
        self.variance = variance

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The components' posterior means, weighted by their responsibilities."""
        level = per_sample(sigma, x).to(x.dtype) ** 2
        centred = x - shift(cond, x)
        distance = (centred[:, None] - self.means.to(x.dtype)).flatten(2).square().sum(-1)
        logits = self.log_weights.to(x.dtype) - distance / (2 * (self.variance + level.flatten(1)))
        weights = logits.softmax(1).to(x.dtype)
        mean = torch.einsum("bk,k...->b...", weights, self.means.to(x.dtype))
        return (self.variance * centred + level * mean) / (self.variance + level) + shift(cond, x)


class Constant(nn.Module):
    """A denoiser that answers the same image whatever it is asked (data without any spread)."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The image itself, one copy per sample."""
        return self.value.to(x.dtype).expand_as(x).clone()


class Shifted(nn.Module):
    """The denoiser of the same data moved by `offset`."""

    def __init__(self, model: nn.Module, offset: float) -> None:
        super().__init__()
        self.model, self.offset = model, offset

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The model's estimate, made in the frame in which its data lie."""
        return self.model(x - self.offset, sigma, cond=cond) + self.offset


@dataclass
class Call:
    """One evaluation of a network: what it was given and what it answered."""

    x: Tensor
    sigma: Tensor
    extra: dict[str, Any]
    output: Tensor


class Counted(nn.Module):
    """Passes every call on to `model` and keeps a record of it."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.calls: list[Call] = []

    def forward(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """The model's answer."""
        output = self.model(x, sigma, **extra)
        self.calls.append(Call(x.clone(), sigma.clone(), extra, output.clone()))
        return output


class NeverCalled(nn.Module):
    """A denoiser that must not be evaluated."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """Fails the test."""
        raise AssertionError("a network was called")


class CFGDenoiser(nn.Module):
    """The class that every k-diffusion script defines: classifier-free guidance of its own."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner_model = model
        self.uncond_denoised: Tensor | None = None

    def forward(
        self, x: Tensor, sigma: Tensor, uncond: Tensor, cond: Tensor, cond_scale: float
    ) -> Tensor:
        """Both estimates in one batch, then uncond + (cond - uncond) * cond_scale."""
        both = self.inner_model(
            torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond])
        )
        self.uncond_denoised, conditional = both.chunk(2)
        return self.uncond_denoised + (conditional - self.uncond_denoised) * cond_scale


class Echo:
    """A student that records what it says, and a teacher that says exactly that."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model = model
        self.said: tuple[Tensor, Tensor | None] | None = None

    def student(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The model's answer, remembered with the conditions that it was given for."""
        output = self.model(x, sigma, cond=cond)
        self.said = (output.clone(), cond)
        return output

    def teacher(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """The student's latest answer for the same conditions, whatever x and sigma are."""
        assert self.said is not None
        output, asked = self.said
        if cond is None or asked is None:
            return output
        halves = zip(asked.split(x.shape[0]), output.split(x.shape[0]), strict=True)
        return next(half for known, half in halves if torch.equal(known, cond)).clone()


def gaussian(seed: int = 0, dtype: torch.dtype = torch.float64) -> Gaussian:
    """A Gaussian of unequal means and variances."""
    mean = seeded(*SHAPE, seed=1000 + seed, dtype=dtype)
    return Gaussian(mean, seeded(*SHAPE, seed=2000 + seed, dtype=dtype).exp())


def mixture(seed: int = 0, dtype: torch.dtype = torch.float64, components: int = 4) -> Mixture:
    """A mixture whose components overlap at middling noise levels."""
    means = 1.5 * seeded(components, *SHAPE, seed=3000 + seed, dtype=dtype)
    weights = seeded(components, seed=4000 + seed, dtype=dtype).softmax(0)
    return Mixture(means, weights, 0.2 + 0.1 * (seed % 3))


# ---------------------------------------------------------------------------------- schedules


def karras(steps: int, low: float = SIGMA_MIN, high: float = SIGMA_MAX, rho: float = 7.0) -> Tensor:
    """Karras et al.'s schedule in float64, with the final zero."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


def log_uniform(steps: int, low: float = SIGMA_MIN, high: float = SIGMA_MAX) -> Tensor:
    """`steps` steps of one length in log sigma, without a final zero."""
    return torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64).exp()


def irregular(steps: int, seed: int = 0) -> Tensor:
    """A random decreasing schedule with the final zero."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.rand(steps, generator=generator, dtype=torch.float64).sort(descending=True).values
    levels = SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** logs
    return torch.cat([levels, levels.new_zeros(1)])


SCHEDULES: dict[str, Tensor] = {
    "karras": karras(8),
    "exponential": torch.cat([log_uniform(6), torch.zeros(1, dtype=torch.float64)]),
    "irregular": irregular(9),
    "four steps": torch.tensor([14.61, 1.63, 0.645, 0.277, 0.0], dtype=torch.float64),
    "unfinished": karras(7)[:-2],
    "one step": torch.tensor([14.61, 0.0], dtype=torch.float64),
    "one unfinished step": torch.tensor([14.61, 1.63], dtype=torch.float64),
}


# ---------------------------------------------------------------------------------- noise


class Tape:
    """A noise sampler that answers its n-th call with the n-th tensor of a fixed sequence.

    The noise of a sample depends on the seed, the call and the sample's key alone, never on the
    batch that it stands in.
    """

    def __init__(self, x: Tensor, seed: int, keys: list[int] | None = None) -> None:
        self.shape, self.dtype, self.seed = x.shape[1:], x.dtype, seed
        self.keys = list(range(x.shape[0])) if keys is None else keys
        self.asked: list[tuple[Any, Any]] = []

    def __call__(self, sigma: Any = None, sigma_next: Any = None) -> Tensor:
        self.asked.append((sigma, sigma_next))
        seeds = [(self.seed * 1009 + len(self.asked)) * 1013 + key for key in self.keys]
        return torch.stack([seeded(*self.shape, seed=s, dtype=self.dtype) for s in seeds])


# ---------------------------------------------------------------------------------- running


def accepts(solver: Any, name: str) -> bool:
    """Whether the solver takes an option of this name, or a noise sampler."""
    return name in solver.options or (name == "noise_sampler" and solver.noise != "none")


def run(solver: Any, model: Any, x: Tensor, sigmas: Tensor, **options: Any) -> Tensor:
    """Samples without a progress bar, with those of the options that the solver has."""
    common = ("extra_args", "callback")
    known = {n: value for n, value in options.items() if n in common or accepts(solver, n)}
    sampler = solver.sample or partial(kdpp.sample, solver)
    return sampler(model, x, sigmas, disable=True, **known)


def conditions(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A condition and an unconditional one, of shape (batch, channels)."""
    cond = seeded(batch, SHAPE[0], seed=71, dtype=dtype)
    return cond, seeded(batch, SHAPE[0], seed=72, dtype=dtype)


@dataclass
class Problem:
    """A student, a teacher and everything else that one run needs."""

    cond_scale: float = 2.5
    teacher_cfg_scale: float = 4.0
    batch: int = 2
    dtype: torch.dtype = torch.float64
    student: nn.Module = field(default_factory=lambda: mixture(0))
    teacher: nn.Module = field(default_factory=lambda: mixture(1))
    noise_seed: int = 5

    @property
    def extra_args(self) -> dict[str, Any]:
        """What k-diffusion hands to the model."""
        cond, uncond = conditions(self.batch, self.dtype)
        return {"cond": cond, "uncond": uncond, "cond_scale": self.cond_scale}

    def start(self, sigmas: Tensor) -> Tensor:
        """The initial latent of a schedule."""
        noise = seeded(self.batch, *SHAPE, seed=9, dtype=self.dtype)
        return noise * float(sigmas[0])

    def guided(self, **options: Any) -> Any:
        """The pair as kdpp's wrapper."""
        options.setdefault("teacher_cfg_scale", self.teacher_cfg_scale)
        return kdpp.TeacherGuidedDenoiser(self.student, self.teacher, **options)

    def sample(
        self, solver: Any, x: Tensor, sigmas: Tensor, guidance: Mapping[str, Any], **options: Any
    ) -> Tensor:
        """One run of `solver` with noise from two tapes, the solver's and the renoise one."""
        model = self.guided(renoise_noise_sampler=Tape(x, self.noise_seed + 1), **guidance)
        options.setdefault("noise_sampler", Tape(x, self.noise_seed))
        return run(solver, model, x, sigmas, extra_args=self.extra_args, **options)

    def estimate(self, x: Tensor, sigma: float) -> Tensor:
        """The student's estimate with its CFG, written out."""
        return self._mixed(self.student, x, sigma, self.cond_scale)

    def unconditional(self, x: Tensor, sigma: float) -> Tensor:
        """The student's unconditional estimate."""
        return self.student(x, x.new_full((x.shape[0],), sigma), cond=self.extra_args["uncond"])

    def teacher_estimate(self, x: Tensor, sigma: float) -> Tensor:
        """The teacher's estimate with its CFG, written out."""
        return self._mixed(self.teacher, x, sigma, self.teacher_cfg_scale)

    def _mixed(self, model: nn.Module, x: Tensor, sigma: float, scale: float) -> Tensor:
        levels = x.new_full((x.shape[0],), sigma)
        uncond = model(x, levels, cond=self.extra_args["uncond"])
        cond = model(x, levels, cond=self.extra_args["cond"])
        return uncond + scale * (cond - uncond)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected number."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def pairs(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """The steps of a schedule as pairs of numbers."""
    levels: list[float] = sigmas.double().tolist()
    return itertools.pairwise(levels)


def on_schedules(solvers: Mapping[str, Any]) -> list[Any]:
    """The solvers that take sigmas; those that make their own levels have tests of their own."""
    return [s for s in solvers.values() if s.own_levels is None]


# ---------------------------------------------------------------------------------- solvers' facts


def counts(solver: Any, sigmas: Tensor, **options: Any) -> list[int]:
    """How many evaluations each step makes, by the solver's plan."""
    return [len(step.stages) for step in solver.plan(sigmas.tolist(), **options)]


def rows(solver: Any, sigmas: Tensor, **options: Any) -> list[tuple[float, Any]]:
    """The rows of a solver's plan, each with the level that it starts from."""
    steps = solver.plan(sigmas.tolist(), **options)
    return [(step.base(stage), stage.row) for step in steps for stage in step.stages]


def growth(solver: Any, sigmas: Tensor, **options: Any) -> float:
    """The largest sum of the sizes of a row's weights: so far one step can take a rounding."""

    def weights(sigma: float, row: Any) -> list[float]:
        earlier = [weight / level for weight, level in row.past]
        return [row.target / sigma, row.denoised, *row.direction, *row.guided, *earlier]

    return max(sum(map(abs, weights(*row))) for row in rows(solver, sigmas, **options))


def cancels(solver: Any) -> bool:
    """Whether it weighs earlier states against their estimates: differences that lose digits."""
    return any(row.past for _, row in rows(solver, karras(8)))


def has_limit(solver: Any) -> bool:
    """Whether its weights stay bounded where a step starts at ever higher levels."""
    on_the_ode = {"eta": 0.0} if "eta" in solver.options else {}
    return growth(solver, torch.tensor([1e12, 1.0, 0.5], dtype=torch.float64), **on_the_ode) < 1e3


def has_no_unit(solver: Any) -> bool:
    """Whether levels twice as high give the same weights of the estimates at η = 0.

    Not so rules over τ = σ/(1+σ) and other functions of σ itself, such as a schedule's time.
    """
    on_the_ode = {"eta": 0.0} if "eta" in solver.options else {}
    once, twice = (rows(solver, factor * karras(5), **on_the_ode) for factor in (1.0, 2.0))
    pairs_of_rows = itertools.zip_longest(once, twice)
    return all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
        for (_, one), (_, other) in pairs_of_rows
        for a, b in itertools.zip_longest(one.direction, other.direction)
    )


def looks_ahead(solver: Any) -> bool:
    """Whether a step depends on the levels after its end."""
    alone, followed = (solver.plan(levels)[0] for levels in ([4.0, 2.0], [4.0, 2.0, 1.0]))
    return alone.stages != followed.stages
