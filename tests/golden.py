"""Golden trajectories: what every solver gave, kept, so that a change of any result is a decision.

    python tests/golden.py                    # compares, and says what changed
    python tests/golden.py --write            # writes tests/golden.safetensors anew

A run is one solver on a small mixture of Gaussians in float64: plain, guided in several ways, under
CFG and CFG++, as a flow model, with noise from seeds, with churn; beside the solvers rollouts,
editing and the noise sources. It takes the public functions alone, so that it outlives what is
behind them. A change of a figure goes into docs/changes.md, with its reason.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kdpp
import needs
from problems import SHAPE, conditions, karras, mixture, per_sample, seeded, shift

FILE = Path(__file__).with_name("golden.safetensors")
TREE = "other: the tree"
SIGMAS = torch.tensor([14.6, 5.0, 2.0, 0.9, 0.4, 0.1, 0.0], dtype=torch.float64)
TAUS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0], dtype=torch.float64)
BATCH = 2
GUIDED: dict[str, dict[str, Any]] = {
    "plain": {"teacher_steps": 0},
    "guided": {"teacher_scale": 0.3, "teacher_steps": 2},
    "guided, predicted noise": {
        "teacher_scale": 0.4, "teacher_steps": [1, -2], "renoise_eta": 0.0, "renoise": "current",
    },
    "guided, mixed noise, last step": {
        "teacher_scale": [0.1, 0.2, 0.0, 0.5, 0.2, 1.0], "teacher_steps": [0, 1, 3, -1],
        "renoise": 0.35, "renoise_eta": 0.6,
    },
}  # fmt: skip
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "s_churn": [{"s_churn": 3.0, "s_noise": 1.01}, {"s_churn": 4.0, "s_tmin": 0.3, "s_tmax": 6.0}],
    "eta": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.9}],
    "order": [{"order": 1}, {"order": 3}],
    "solver_type": [{"solver_type": "heun"}, {"solver_type": "phi_2", "r": 1.0}],
    "r": [{"r": 0.7}],
    "variable": [{"variable": "tau"}],
    "variant": [{"variant": "bh1", "lower_order_final": "always"}],
    "max_order": [{"max_order": 2}],
    "max_stage": [{"max_stage": 2}],
    "ge_gamma": [{"ge_gamma": 1.5}],
    "predictor_order": [{"predictor_order": 2, "corrector_order": 3, "s_tmin": 0.5, "s_tmax": 3.0}],
}
ADAPTIVE: dict[str, dict[str, Any]] = {
    "guided": {}, "guided, order 2": {"order": 2}, "guided, eta": {"eta": 0.5},
    "guided, over tau": {"variable": "tau"},
}  # fmt: skip


class Flow(torch.nn.Module):
    """A mixture's denoiser as a flow model: the state is (1-τ) x0 + τ n."""

    flow = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        model, tau = self.model, per_sample(sigma, x)
        alpha = 1.0 - tau
        centred = x - alpha * shift(cond, x)
        variance = model.variance * alpha**2 + tau**2
        away = centred[:, None] - alpha[:, None] * model.means
        logits = model.log_weights - away.flatten(2).square().sum(-1) / (2 * variance.flatten(1))
        mean = torch.einsum("bk,k...->b...", logits.softmax(1), model.means)
        return (model.variance * alpha * centred + tau**2 * mean) / variance + shift(cond, x)


def takes(solver: str, options: dict[str, Any]) -> bool:
    """Whether the solver has these options, and their words are its own."""
    known = kdpp.SOLVERS[solver].options
    return all(n in known and v in (known[n].choices or (v,)) for n, v in options.items())


def solvers() -> Iterator[tuple[str, Callable[..., Tensor], set[str]]]:
    """Every public sampler with a plan: its short name, the function, its parameters' names."""
    for name in sorted(dir(kdpp)):
        if name.startswith("sample_") and name.endswith("_tg") and "adaptive" not in name:
            sample = getattr(kdpp, name)
            short = name.removeprefix("sample_").removesuffix("_tg")
            yield short, sample, set(inspect.signature(sample).parameters)


def sampled(
    sample: Callable[..., Tensor],
    parameters: set[str],
    *,
    flow: bool = False,
    cond_scale: float = 2.5,
    teachers: Any = None,
    seeds: bool = True,
    guidance: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """One run: the latent it ends on."""
    levels = TAUS if flow else SIGMAS
    student, teacher = mixture(0), mixture(1)
    if flow:
        student, teacher = Flow(student), Flow(teacher)
    x = seeded(BATCH, *SHAPE, seed=9) * levels[0]
    cond, uncond = conditions(BATCH)
    numbers = [3, 2**40]
    guidance = dict(guidance or {})
    if teachers is None:
        teachers = teacher
        guidance.setdefault("teacher_cfg_scale", 4.0)
    if seeds:
        guidance["renoise_noise_sampler"] = kdpp.SeededNoise(x, numbers, 1)
    model = kdpp.TeacherGuidedDenoiser(student, teachers, **guidance)
    given = dict(options or {})
    if seeds and "noise_sampler" in parameters:
        given["noise_sampler"] = kdpp.SeededNoise(x, numbers)
    extra_args = {"cond": cond, "uncond": uncond, "cond_scale": cond_scale}
    torch.manual_seed(21)
    where = (levels,)
    if "sigma_min" in parameters:
        where = (float(levels[-2]), min(float(levels[0]), 0.95) if flow else float(levels[0]), 8)
    return sample(model, x, *where, extra_args, disable=True, **given)


def runs_of(
    solver: str, sample: Callable[..., Tensor], parameters: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """All runs of a solver, by name."""
    fast = "sigma_min" in parameters
    guided = GUIDED["guided"]
    for name, guidance in GUIDED.items():
        if fast and isinstance(guidance.get("teacher_scale"), list):
            guidance = {**guidance, "teacher_scale": 0.3, "teacher_steps": [0, -1]}
        yield name, sampled(sample, parameters, guidance=guidance)
    yield (
        "guided, no CFG",
        sampled(sample, parameters, cond_scale=1.0, guidance={**guided, "teacher_cfg_scale": 1.0}),
    )
    several = [
        kdpp.Teacher(mixture(1), 0.2, 2, 3.0, draws=2),
        kdpp.Teacher(mixture(2), 0.3, kdpp.NoiseRange(0.5, 6.0), 1.0, "current", 0.5),
    ]
    mask = torch.tensor([[0.0, 0.5], [1.0, 0.25]], dtype=torch.float64)
    yield (
        "several teachers, a mask",
        sampled(sample, parameters, teachers=several, guidance={"teacher_mask": mask}),
    )
    yield "random levels", sampled(sample, parameters, guidance={**guided, "renoise": "random"})
    yield "flow", sampled(sample, parameters, flow=True, guidance=GUIDED["plain"])
    yield "flow, guided", sampled(sample, parameters, flow=True, guidance=guided)
    if "sde" not in solver:  # theirs is k-diffusion's tree
        yield "torch's stream", sampled(sample, parameters, seeds=False, guidance=guided)
    for key, settings in OPTIONS.items():
        for options in filter(partial(takes, solver), settings if key in parameters else ()):
            said = ", ".join(f"{name}={value}" for name, value in options.items())
            yield said, sampled(sample, parameters, guidance=guided, options=options)


def other_runs() -> Iterator[tuple[str, Tensor]]:
    """Rollouts, encoding, editing, and kdpp's own sources of noise."""
    student, teacher = mixture(0), mixture(1)
    x = seeded(BATCH, *SHAPE, seed=9) * SIGMAS[0]
    cond, uncond = conditions(BATCH)
    extra_args = {"cond": cond, "uncond": uncond, "cond_scale": 2.5}
    rising = SIGMAS[:-1].flip(0)
    image = seeded(BATCH, *SHAPE, seed=4)
    yield "encode", kdpp.encode(student, image, rising, extra_args, disable=True)
    for name, who in {
        "coins": {"teacher_probability": 0.5, "generator": torch.Generator().manual_seed(3)},
        "switch": {"switch": 3, "first": "student"},
    }.items():
        rollout = kdpp.mixed_rollout(
            student, teacher, x, SIGMAS, extra_args=extra_args, teacher_cfg_scale=3.0,
            teacher_substeps=3, disable=True, **who,
        )  # fmt: skip
        yield f"mixed_rollout, {name}", rollout.x
    model = kdpp.TeacherGuidedDenoiser(student, teacher, teacher_scale=0.3, teacher_cfg_scale=4.0)
    for name, options in ADAPTIVE.items():
        taught = kdpp.TeacherGuidedDenoiser(
            student, teacher, teacher_scale=0.3, teacher_steps=2,
            renoise_noise_sampler=kdpp.SeededNoise(x, [3, 4], 1),
        )  # fmt: skip
        source = kdpp.SeededNoise(x, [3, 4])
        yield (
            f"dpm_adaptive, {name}",
            kdpp.sample_dpm_adaptive_tg(
                taught, x, 0.1, 14.6, extra_args, disable=True, noise_sampler=source, **options
            ),
        )
    noise, mask = seeded(BATCH, *SHAPE, seed=5), torch.tensor([[0.0, 1.0], [0.5, 1.0]])
    known = kdpp.inpaint(model, image, mask, noise)
    torch.manual_seed(22)
    yield (
        "inpaint",
        kdpp.image_to_image(
            kdpp.sample_euler_tg, known, image, SIGMAS[1:], extra_args, noise=noise, disable=True
        ),
    )
    seeds = kdpp.SeededNoise(x, [7, 8], 3)
    yield "SeededNoise", torch.stack([seeds(), seeds.draw(11)])
    path = kdpp.BrownianNoise(x, 0.1, 14.6, [7, 8])
    pairs = [(14.6, 3.0), (3.0, 0.1), (14.6, 7.0), (5.0, 4.0)]
    yield "BrownianNoise", torch.stack([path(*pair) for pair in pairs])


def tree_run() -> Tensor:
    """A solver whose default noise is k-diffusion's Brownian tree; it needs k-diffusion."""
    cond, uncond = conditions(BATCH)
    model = kdpp.TeacherGuidedDenoiser(
        mixture(0), mixture(1), teacher_scale=0.3, teacher_cfg_scale=4.0
    )
    x = seeded(BATCH, *SHAPE, seed=9) * SIGMAS[0]
    extra_args = {"cond": cond, "uncond": uncond, "cond_scale": 2.5}
    torch.manual_seed(23)
    return kdpp.sample_dpmpp_2m_sde_tg(model, x, karras(5), extra_args, disable=True)


def make() -> dict[str, Tensor]:
    """Every run's result, by name; without k-diffusion all but `TREE`."""
    runs = {
        f"{solver}: {name}": found
        for solver, sample, parameters in solvers()
        for name, found in runs_of(solver, sample, parameters)
    }
    tree = {} if needs.k_sampling is None else {TREE: tree_run()}
    return {**runs, **{f"other: {name}": found for name, found in other_runs()}, **tree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    made = make()
    if write and TREE not in made:
        raise SystemExit(f"not written: {TREE} {needs.absent}")
    if write:
        save_file({name: tensor.contiguous() for name, tensor in made.items()}, FILE)
        print(f"wrote {len(made)} runs, {FILE.stat().st_size / 1024:.0f} kB")
        return
    kept = load_file(FILE)
    if TREE not in made:
        print(f"left out: {TREE} {needs.absent}")
        del kept[TREE]
    for name in sorted(kept.keys() - made.keys()):
        print(f"gone: {name}")
    for name in sorted(made.keys() - kept.keys()):
        print(f"new: {name}")
    shared = sorted(made.keys() & kept.keys())
    changed = [name for name in shared if not torch.equal(made[name], kept[name])]
    for name in changed:
        off = float((made[name] - kept[name]).abs().max() / kept[name].abs().max())
        print(f"changed by {off:.1e} of its size: {name}")
    print(f"{len(shared)} runs compared, {len(changed)} changed in some bit")


if __name__ == "__main__":
    main()
