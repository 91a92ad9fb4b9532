"""A teacher's help in a modular pipeline of diffusers, as a block: `with_teacher`."""

from __future__ import annotations

from copy import copy
from typing import Any

from diffusers import AutoModel, SchedulerMixin
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam

from kdpp.checkpoints.pipelines import family_of
from kdpp.hosts.diffusers.attaching import attach

__all__ = ["TeacherGuided", "with_teacher"]

COMPONENTS = (
    ComponentSpec(
        "teacher",
        AutoModel,
        description="The teacher's UNet or transformer. None: the student without its LoRAs.",
    ),
    ComponentSpec(
        "teacher_scheduler",
        SchedulerMixin,
        description="The teacher's, where it predicts something else than the student. None: its.",
    ),
)
GUIDANCE = {
    "teacher_scale": (0.1, "λ, the teacher's share of the estimate; 0 is the student alone."),
    "teacher_steps": (1, "How many of the first steps are guided, or their indices."),
    "teacher_cfg_scale": (7.5, "The teacher's CFG scale."),
    "renoise": ("next", "The level at which the teacher is asked."),
    "renoise_eta": (1.0, "How much of the renoising is fresh noise."),
}
"""The keywords of `kdpp.TeacherGuidedDenoiser` that a call takes, their defaults, what they say."""
INPUTS = [
    *(
        InputParam(name, default=value, description=said)
        for name, (value, said) in GUIDANCE.items()
    ),
    InputParam(
        "teacher_negative_prompt",
        type_hint=str,
        description="Of the teacher's CFG. None: the run's own, or the empty text.",
    ),
    InputParam("sampler", description="A solver of kdpp's. None: the one the scheduler runs."),
]


def with_teacher(block: Any) -> SequentialPipelineBlocks:
    """A block of a modular pipeline in whose steps a teacher helps::

        blocks = StableDiffusionXLAutoBlocks()
        blocks.sub_blocks["denoise"] = with_teacher(blocks.sub_blocks["denoise"])
        pipe = blocks.init_pipeline()
        pipe.update_components(unet=unet, teacher=teacher_unet, …)
        pipe(prompt=…, num_inference_steps=4, teacher_scale=0.1, teacher_cfg_scale=7.5)

    Args:
        block: one that holds the denoising loop. It stays what it is, with all of its inputs,
            components and outputs.

    The pipeline has the components ``teacher`` and ``teacher_scheduler`` and takes the settings of
    `kdpp.hosts.diffusers.attach` beside its own: those in `GUIDANCE`, ``teacher_negative_prompt``
    and ``sampler``. Runs are those of a pipeline with a teacher attached, and end in the same
    errors; afterwards the pipeline is as it was.
    """
    return TeacherGuided.from_blocks_dict({"denoise": block})


class TeacherGuided(SequentialPipelineBlocks):
    """See `with_teacher`."""

    @property
    def description(self) -> str:
        return "Denoises with a teacher's help (kdpp)."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [*super().expected_components, *COMPONENTS]

    @property
    def inputs(self) -> list[Any]:
        return [*super().inputs, *INPUTS]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        guidance = {name: state.get(name) for name in GUIDANCE}
        with attach(
            components,
            teacher_pipe(components),
            sampler=state.get("sampler"),
            negative_prompt=state.get("teacher_negative_prompt"),
            **guidance,
        ):
            return super().__call__(components, state)


def teacher_pipe(components: Any) -> Any:
    """The same pipeline with the teacher's network; None where it has none of its own."""
    if components.teacher is None:
        return None
    made = copy(components)
    setattr(made, family_of(components).network, components.teacher)
    if components.teacher_scheduler is not None:
        made.scheduler = components.teacher_scheduler
    return made
