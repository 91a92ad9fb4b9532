"""A scheduler that runs kdpp's solver with a teacher, in the place of a pipeline's own.

The pipeline keeps its loop: it asks its network and hands the answer, after its CFG, to
``scheduler.step``. The scheduler is the pipeline's own in everything but that: the levels, the
timesteps, how noise is added and what is saved stay. ``step`` makes x̂ of the answer, asks the
teacher where the step is guided, and walks one row of the solver's plan (`kdpp.driver.Walk`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import kdpp.solvers  # noqa: F401 (enters kdpp's own by their names)
from kdpp.asking import bind
from kdpp.checkpoints.networks import estimator, levels_of
from kdpp.checkpoints.pipelines import denoiser_of, encode, network_of, teacher_of
from kdpp.denoisers import map_tensors
from kdpp.driver import Listener, Noise, Walk, plan_run
from kdpp.guidance import TeacherGuidedDenoiser
from kdpp.hosts.diffusers.asked import MASK, Recorder, halves, layout_of, with_negative
from kdpp.kinds import is_flow, trained_range
from kdpp.models import GuidanceConditioned, HostModel
from kdpp.noise import BrownianNoise, NoiseSampler, SeededNoise, row_seeds
from kdpp.solver import SOLVERS, Solver, solver_of

__all__ = ["Attached", "attach", "detach"]

OWN = {
    "DDIMScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchLCMScheduler": "lcm",
    "LCMScheduler": "lcm",
}
"""The solver that a scheduler of diffusers runs."""
MASKS = {
    "UNet2DConditionModel": "encoder_attention_mask",
    "Krea2Transformer2DModel": MASK,
    "QwenImageTransformer2DModel": MASK,
    "ZImageTransformer2DModel": MASK,
}
"""The mask of networks that take texts of several lengths."""


def attach(
    pipe: Any,
    teacher_pipe: Any = None,
    *,
    sampler: Any = None,
    negative_prompt: str | None = None,
    encoding: Mapping[str, Any] | None = None,
    **guidance: Any,
) -> Attached:
    """Let a teacher help in every run of a pipeline of diffusers, until `detach`::

        attach(pipe, teacher_pipe, teacher_scale=0.1, teacher_cfg_scale=7.5)
        picture = pipe("a lighthouse at night", num_inference_steps=4, guidance_scale=1.0).images[0]
        detach(pipe)

    The pipeline's call stays what it is, with its callbacks, generators and levels. Its scheduler's
    place is taken by one that differs from it in ``step`` alone. The conditions are those that its
    network is asked with, recorded by a hook.

    Args:
        pipe: one of `kdpp.checkpoints.pipelines.FAMILIES`, or its form for image to image or
            inpainting, with the scheduler whose levels are wanted.
        teacher_pipe: the teacher's pipeline; its text encoders and its VAE are not needed. None, or
            ``pipe`` itself: the student without its LoRAs, or, where it has none, the student.
        sampler: a solver of one evaluation a step, as `kdpp.sample` takes it;
            ``functools.partial(kdpp.sample_dpmpp_2m_sde_tg, eta=0.5)`` has options. None: the one
            that the pipeline's scheduler runs.
        negative_prompt: of the teacher's CFG, encoded here. None: that of the run, and where the
            run has none (guidance 1) the empty text.
        encoding: what else `kdpp.checkpoints.pipelines.encode` takes for it, such as
            ``{"max_sequence_length": 256}``.
        guidance: keywords of `kdpp.TeacherGuidedDenoiser`: teacher_scale, teacher_steps,
            teacher_cfg_scale, renoise, ….

    Noise: the teacher's renoising has, for each picture, a seed made of the latent that the run
    begins with, so it is reproducible under ``generator=`` and the same in any batch. The solver's
    noise comes from ``generator=`` where the pipeline hands it to its scheduler (SD, SDXL), else it
    is seeded in the same way; so is the Brownian path of SDE solvers.

    Returns:
        what is attached, to be used in a ``with`` block that detaches at its end, if that is
        wanted.

    Raises:
        TypeError, ValueError: the pipelines do not fit each other (`from_pipelines`), a setting is
            wrong, the solver is not known or cannot be driven so, the scheduler calls its network
            more than once a step, or a teacher is attached already. The pipeline is then as it was.
            In a run: it has fewer steps than ``teacher_steps``, or its texts do not fit the
            teacher's negative.
    """
    if isinstance(pipe.scheduler, Guided):
        raise ValueError("a teacher is attached to this pipeline already; detach it first")
    solver, options = solver_for(pipe, sampler)
    return Attached(
        pipe, teacher_pipe, solver, options, negative_prompt, dict(encoding or {}), guidance
    )


def detach(pipe: Any) -> None:
    """Give a pipeline its own scheduler back and take the hook out; nothing where none is in."""
    if isinstance(pipe.scheduler, Guided):
        attached = pipe.scheduler.attached
        attached.detach()
        pipe.scheduler = attached.original  # that of a pipeline made of the other by from_pipe


class Guided:
    """Put before a scheduler's class: its ``step`` is kdpp's.

    The class has the scheduler's name and module, since what is saved has to load without kdpp.
    """

    attached: Attached

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        """One that is made of a config is an ordinary one."""
        return cls.__mro__[2](*args, **settings)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The next latent, and the estimate of x0 that it was made from."""
        found = self.attached.step(model_output, timestep, sample, generator)
        if not return_dict:
            return found
        from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput

        return EulerDiscreteSchedulerOutput(*found)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is one of the pipeline's own scheduler."""
        return self.attached.original.__reduce_ex__(protocol)


def guided(scheduler: Any, attached: Attached) -> Any:
    """A copy of a scheduler with kdpp's ``step``."""
    kind = type(scheduler)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: Any = object.__new__(type(kind.__name__, (Guided, kind), names))
    made.__dict__ = {**vars(scheduler), "attached": attached}
    return made


class Attached:
    """A teacher that is attached to a pipeline; see `attach`."""

    def __init__(
        self,
        pipe: Any,
        teacher_pipe: Any,
        solver: Solver,
        options: dict[str, Any],
        negative_prompt: str | None,
        encoding: dict[str, Any],
        guidance: dict[str, Any],
    ) -> None:
        network = network_of(pipe)
        self.pipe, self.original, self.network = pipe, pipe.scheduler, network
        self.solver, self.options = solver, options
        check_scheduler(self.original)
        self.teacher = teacher_of(pipe, teacher_pipe, denoiser_of(pipe))
        self.dtype = network_of(teacher_pipe or pipe).dtype
        self.handed = Handed()
        device = pipe._execution_device
        student = estimator(self.handed, network, self.original, device=device)
        low, high = trained_range(self.teacher) or (None, None)
        ask = HostModel(self.ask, flow=is_flow(self.teacher), sigma_min=low, sigma_max=high)
        self.model = TeacherGuidedDenoiser(student, ask, **guidance)
        self.flow = is_flow(student)
        self.vp = not self.flow and float(self.original.init_noise_sigma) == 1.0
        self.mask = MASKS.get(type(network).__name__)
        self.said = negative_prompt is not None
        self.negative = None
        if self.said or getattr(pipe, "text_encoder", None) is not None:
            self.negative = encode(pipe, "", negative_prompt, **encoding)["uncond"]
            self.negative.get("added_cond_kwargs", {}).pop("time_ids", None)  # the run's hold
        self.run: Run | None = None
        self.latest: tuple[Tensor, Tensor] | None = None
        # From here on nothing can fail.
        self.scheduler = guided(self.original, self)
        networks = [network, getattr(pipe, "transformer_2", None)]
        self.recorder = Recorder(
            [one for one in networks if one is not None], lambda: self.scheduler.timesteps
        )
        pipe.scheduler = self.scheduler

    def detach(self) -> None:
        """Give the pipeline its own scheduler back and take the hook out."""
        self.recorder.remove()
        self.drop()
        if self.pipe.scheduler is self.scheduler:
            self.pipe.scheduler = self.original
        if isinstance(self.scheduler, Guided):  # where else it may be held it is an ordinary one
            self.scheduler.__class__ = type(self.original)
            del self.scheduler.attached

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    # A run ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self, output: Tensor, timestep: Any, sample: Tensor, generator: Any
    ) -> tuple[Tensor, Tensor]:
        """The latent after the step, and the estimate of x0, both as the pipeline has latents."""
        index = index_of(self.scheduler, timestep)
        try:
            if self.run is None or not self.run.goes_on(self.scheduler, index):
                self.drop()
                self.run = Run(self, index, sample)
            found = self.run.step(output, sample, generator)
            if self.run.done:
                self.drop()
        except BaseException:
            self.drop()
            raise
        finally:
            self.recorder.calls = []  # the teacher's own, too, where it is the same network
            self.handed.output = None
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = index + 1
        return found

    def drop(self) -> None:
        """Let go of the run."""
        if self.run is not None:
            self.run.walk.release()
        self.run = None

    def ask(self, x: Tensor, sigma: Tensor, cfg_scale: float) -> Tensor:
        """The teacher's estimate, with the conditions of the current step."""
        if not self.recorder.calls:
            raise ValueError(NOT_HEARD)
        cond, uncond = halves(self.recorder.calls, len(x))
        if self.said or uncond is None:
            uncond = self.negative
        given = {"cond": cond}
        if uncond is not None:
            given["cond"], given["uncond"] = with_negative(cond, uncond, self.mask)
        elif cfg_scale != 1.0 and not isinstance(self.teacher, GuidanceConditioned):
            raise ValueError(
                "the teacher's CFG needs a negative, this run has none, and the pipeline has no "
                "text encoder to make one: run with CFG, or give attach teacher_cfg_scale=1"
            )
        given = map_tensors(
            given, lambda one: one.to(self.dtype) if one.is_floating_point() else one
        )
        denoise = bind(self.teacher, "teacher", x, given, cfg_scale, max_batch=self.model.max_batch)
        return denoise(x, sigma)[0]


class Run:
    """One run of the pipeline, from its first step."""

    def __init__(self, attached: Attached, index: int, sample: Tensor) -> None:
        scheduler, calls = attached.scheduler, attached.recorder.calls
        self.flow, self.vp, self.handed = attached.flow, attached.vp, attached.handed
        self.timesteps, self.first, self.made = scheduler.timesteps, index, 0
        self.generator: Any = None
        if sample.ndim == 3 and not calls:
            raise ValueError(NOT_HEARD)
        self.layout = layout_of(attached.network, calls, sample)
        sigmas = levels_of(scheduler, len(self.timesteps))[index:]
        self.levels = sigmas.tolist()
        x = self.state(sample)
        seeds = row_seeds(0, x)
        solver, model = attached.solver, attached.model
        run = plan_run(solver, model, x, sigmas, None, attached.options, lambda: seeds[0])
        self.steps = len(run.plan.steps)
        for teacher in model.teachers:
            if isinstance(teacher.steps, numbers.Integral) and teacher.steps > self.steps:
                raise ValueError(
                    f"teacher_steps is {teacher.steps}, and this run has {self.steps} "
                    f"step{'s' * (self.steps != 1)}; attach with as many at most"
                )
        renoise = model.renoise_noise_sampler or SeededNoise(x, seeds, stream=1)
        drawn: NoiseSampler = SeededNoise(x, seeds)
        if solver.noise == "brownian" and run.plan.draws:
            drawn = BrownianNoise(x, min(filter(None, self.levels)), self.levels[0], seed=seeds)
        elif solver.noise == "plain":
            drawn = self.plain(x, sample.dtype, drawn)
        noise = Noise(drawn, renoise, x, run.levels, run.sigmas, run.plan.guided)
        listener = Listener(self.hear, run.sigmas.unbind())
        self.walk = Walk(run.plan, model, x, run.plan.levels_of(x), {}, noise, listener)

    def goes_on(self, scheduler: Any, index: int) -> bool:
        """Whether that is the next step of this run."""
        return scheduler.timesteps is self.timesteps and index == self.first + self.made

    @property
    def done(self) -> bool:
        return self.made == self.steps

    def step(self, output: Tensor, sample: Tensor, generator: Any) -> tuple[Tensor, Tensor]:
        """See `Attached.step`."""
        self.generator = generator
        self.handed.output = self.unpacked(output)
        after = self.walk.step(self.made, self.state(sample))
        self.made += 1
        return self.latent(after, self.levels[self.made], sample), self.latent(
            self.estimate, 0.0, sample
        )

    def hear(self, info: dict[str, Any]) -> None:
        self.estimate: Tensor = info.get("denoised_revised", info["denoised"])

    def unpacked(self, latent: Tensor) -> Tensor:
        """(batch, channels, …), in float32."""
        latent = latent.float()
        return latent if self.layout is None else self.layout.unpacked(latent)

    def state(self, sample: Tensor) -> Tensor:
        """kdpp's state of the pipeline's latent: VE, or a flow model's."""
        x = self.unpacked(sample)
        return x * math.sqrt(1.0 + self.levels[self.made] ** 2) if self.vp else x

    def latent(self, x: Tensor, level: float, sample: Tensor) -> Tensor:
        """The reverse, in the sample's dtype."""
        x = x / math.sqrt(1.0 + level**2) if self.vp else x
        return (x if self.layout is None else self.layout.packed(x)).to(sample.dtype)

    def plain(self, x: Tensor, dtype: torch.dtype, seeded: NoiseSampler) -> NoiseSampler:
        """Noise of the pipeline's generator, drawn as diffusers does; seeded where it has none."""

        def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            if self.generator is None:
                return seeded(sigma, sigma_next)
            from diffusers.utils.torch_utils import randn_tensor

            noise: Tensor = randn_tensor(x.shape, self.generator, x.device, dtype)
            return noise.to(x.dtype)

        return draw


class Handed(nn.Module):
    """Stands for the student's network: gives what the pipeline has handed over."""

    output: Tensor | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert self.output is not None
        return self.output


# What can be attached -----------------------------------------------------------------------------

NOT_HEARD = (
    "the pipeline's network was not called since the last step, or is not the one it had when the "
    "teacher was attached; detach, and attach anew"
)


def index_of(scheduler: Any, timestep: Any) -> int:
    """Which of the scheduler's timesteps the step is at."""
    if hasattr(scheduler, "_init_step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        return int(scheduler.step_index)
    return int((scheduler.timesteps == timestep).nonzero()[0])


def check_scheduler(scheduler: Any) -> None:
    """ValueError for one that has its network called more than once a step."""
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1 or name == "PNDMScheduler":
        raise ValueError(
            f"{name} has its network called more than once a step; give the pipeline another one: "
            "pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )


def solver_for(pipe: Any, sampler: Any) -> tuple[Solver, dict[str, Any]]:
    """The solver and its options; ValueError for one that a pipeline's loop cannot drive."""
    works = ", ".join(sorted(name for name, one in SOLVERS.items() if not obstacle(one, {})))
    name = type(pipe.scheduler).__name__
    if sampler is None and name not in OWN:
        raise ValueError(f"none of kdpp's solvers is that of {name}; give sampler=, of {works}")
    solver, options = solver_of(OWN[name] if sampler is None else sampler)
    why = obstacle(solver, options)
    if why:
        raise ValueError(
            f"{solver.name} {why}, and a pipeline asks its network once a step, at the step's "
            f"level, and hands over the guided answer; take one of {works}"
        )
    return solver, options


def obstacle(solver: Solver, options: Mapping[str, Any]) -> str:
    """Why a loop that asks once a step and hands over one estimate cannot drive it, or nothing."""
    if solver.cfg_pp:
        return "needs the unconditional estimate"
    if solver.own_levels is not None:
        return "makes its own levels"
    steps = solver.plan([10.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.0], **options)
    if any(len(step.stages) > 1 for step in steps):
        return "evaluates more than once a step"
    return "adds noise before it evaluates" if any(step.churn is not None for step in steps) else ""
