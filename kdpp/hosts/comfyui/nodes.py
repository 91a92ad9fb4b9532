"""The nodes: what they take, what they say, what they make. `sampling` does the work.

A node is described once, as a `Node`; `classic` and `extension` write it in ComfyUI's two schemas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kdpp.checkpoints.presets import PRESETS
from kdpp.hosts.comfyui.forms import NAMES
from kdpp.lab.affordable import PIPELINES
from kdpp.lab.tuning import LEAST

__all__ = ["NODES", "Field", "Node", "classic", "extension"]

CATEGORY = "sampling/kdpp"
LEVEL = "level"
BY_ROW, HOST = "by row", "host"
COMFYUI, KDPP = "ComfyUI's", "kdpp's"


class Field(NamedTuple):
    """An input of a node."""

    name: str
    type: str
    """As ComfyUI names it; "COMBO" with ``choices``."""
    tooltip: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What both schemas are told of the widget."""
        given = {"default": self.default, "min": self.low, "max": self.high, "step": self.step}
        return {name: value for name, value in given.items() if value is not None}


class Node(NamedTuple):
    """A node."""

    id: str
    title: str
    description: str
    fields: tuple[Field, ...]
    outputs: tuple[tuple[str, str], ...]
    """(name, type) of each."""
    make: Callable[..., tuple[Any, ...]]
    """Takes the fields as keywords, and returns the outputs."""
    aliases: tuple[str, ...] = ()
    """Other words by which it is found."""


# What they make -----------------------------------------------------------------------------------


def make_guider(
    student: Any,
    positive: Any,
    negative: Any,
    cfg: float,
    teacher: Any,
    teacher_cfg: float,
    teacher_positive: Any = None,
    teacher_negative: Any = None,
) -> tuple[Any]:
    """The student's guider, which holds the teacher's; ValueError where they do not fit."""
    from kdpp.hosts.comfyui import sampling

    guider = sampling.TeacherGuider(student, teacher, teacher_cfg)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    guider.teacher.set_conds(
        positive if teacher_positive is None else teacher_positive,
        negative if teacher_negative is None else teacher_negative,
    )
    return (guider,)


def make_sampler(
    solver: str,
    teacher_steps: int,
    teacher_scale: float,
    renoise: str,
    level: float,
    eta: float,
    s_noise: float,
    noise: str,
    first_step: int = 0,
    renoise_eta: float = 1.0,
    form: str = COMFYUI,
) -> tuple[Any]:
    """The sampler; options that the solver does not have are left out."""
    from kdpp.hosts.comfyui import sampling

    later = tuple(range(first_step, first_step + teacher_steps))
    made = sampling.GuidedSampler(
        solver,
        {"eta": eta, "s_noise": s_noise},
        comfyui=form == COMFYUI,
        by_row=noise == BY_ROW,
        teacher_steps=later if first_step else teacher_steps,
        teacher_scale=teacher_scale,
        extrapolate=not 0.0 <= teacher_scale <= 1.0,
        renoise=level if renoise == LEVEL else renoise,
        renoise_eta=renoise_eta,
    )
    return (made,)


def make_preset(
    preset: str, steps: int, width: int, height: int
) -> tuple[torch.Tensor, Any, float, float]:
    """A published student's levels, sampler and CFG scales."""
    chosen = PRESETS[preset]
    sigmas = torch.tensor(chosen.sigmas(steps or None, (height, width)))
    (sampler,) = make_sampler(
        chosen.sampler, chosen.teacher_steps, chosen.teacher_scale, "next", 1.0, 1.0, 1.0, BY_ROW,
        form=KDPP,
    )  # fmt: skip
    return sigmas, sampler, chosen.cond_scale, chosen.teacher_cfg_scale


def make_tuning(
    noise: Any,
    guider: Any,
    sampler: Any,
    sigmas: torch.Tensor,
    latent_image: dict[str, Any],
    samples: int,
    detail: int,
    rows: int,
) -> tuple[str, torch.Tensor]:
    """What `kdpp tune` says of the pair, and its picture."""
    from kdpp.hosts.comfyui import tuning

    return tuning.tune(noise, guider, sampler, sigmas, latent_image, samples, detail, rows)


def make_comparison(
    noise: Any, guider: Any, sampler: Any, sigmas: torch.Tensor, latent_image: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Three pictures as one batch, and their evaluations."""
    from kdpp.hosts.comfyui import sampling

    return sampling.compare(noise, guider, sampler, sigmas, latent_image)


SCALE = "of classifier-free guidance, uncond + cfg (cond - uncond); 1 is no guidance"

GUIDER = Node(
    id="KDPPTeacherGuider",
    title="Teacher Guider",
    description="A few-step student and the teacher it was distilled from. With KDPP Sampler the "
    "teacher helps at the guided steps; other samplers run the student alone.",
    fields=(
        Field("student", "MODEL", "The few-step model: a checkpoint, or a base with its LoRA."),
        Field("positive", "CONDITIONING", "The prompt."),
        Field("negative", "CONDITIONING", "The negative prompt, used where a cfg is not 1."),
        Field("cfg", "FLOAT", f"The student's scale {SCALE}, as most students want it.",
              1.0, 0.0, 100.0, 0.1),
        Field("teacher", "MODEL", "The many-step model, over the same latents. For a LoRA student "
              "this may be its base, from the same loader."),
        Field("teacher_cfg", "FLOAT", f"The teacher's scale {SCALE}.", 7.5, 0.0, 100.0, 0.1),
        Field("teacher_positive", "CONDITIONING", "The teacher's own prompt, if it has one.",
              optional=True),
        Field("teacher_negative", "CONDITIONING", "The teacher's own negative prompt, if it has "
              "one.", optional=True),
    ),
    outputs=(("guider", "GUIDER"),),
    make=make_guider,
    aliases=("distillation++", "kdpp", "distilled", "lightning", "turbo"),
)  # fmt: skip

SAMPLER = Node(
    id="KDPPSampler",
    title="KDPP Sampler",
    description="A sampler in which the teacher of a Teacher Guider helps. At a guided step the "
    "student's estimate is noised again, the teacher denoises it, and a mix of both goes on.",
    fields=(
        Field("solver", "COMBO", "The method that makes the steps.", "euler",
              choices=NAMES),
        Field("teacher_steps", "INT", "How many steps are guided, from first_step on. 0 is the "
              "student alone.", 1, 0, 100),
        Field("teacher_scale", "FLOAT", "λ, the teacher's share of the mix. 0 is the student "
              "alone; below 0 and above 1 the mix goes beyond either (Tune may advise it).",
              0.1, -10.0, 10.0, 0.001),
        Field("renoise", "COMBO", "The noise level at which the teacher is asked: that of the next "
              "step, of this step, a random one, or the one below.", "next",
              choices=("next", "current", "random", LEVEL)),
        Field("level", "FLOAT", 'The noise level for renoise = "level" (τ for a flow model).',
              1.0, 0.0001, 1000.0, 0.0001),
        Field("eta", "FLOAT", "How much noise ancestral and SDE solvers add; others leave it out.",
              1.0, 0.0, 100.0, 0.01),
        Field("s_noise", "FLOAT", "A factor on the added noise.", 1.0, 0.0, 100.0, 0.01),
        Field("noise", "COMBO", "Noise for each row from the row alone, so that a picture is the "
              "same in any batch; or the host's, as its own samplers draw it.", BY_ROW,
              choices=(BY_ROW, HOST)),
        Field("first_step", "INT", "The first guided step; the sampler's first one is 0.",
              0, 0, 100, optional=True),
        Field("renoise_eta", "FLOAT", "How much of the renoising is fresh noise; at 0 it is all "
              "the noise that the student's estimate leaves in the picture.",
              1.0, 0.0, 1.0, 0.01, optional=True),
        Field("form", "COMBO", "Where ComfyUI runs another formula under the solver's name, as it "
              "does for flow models: that one, so that λ = 0 is the picture that its own sampler "
              "gives (kdpp's where there is no such one); or kdpp's.",
              COMFYUI, choices=(COMFYUI, KDPP), optional=True),
    ),
    outputs=(("sampler", "SAMPLER"),),
    make=make_sampler,
    aliases=("distillation++", "teacher", "guided", "few-step"),
)  # fmt: skip

PRESET = Node(
    id="KDPPPreset",
    title="Student Preset (KDPP)",
    description="The levels that a published student was made for, with the sampler and the CFG "
    "scales that go with it.",
    fields=(
        Field("preset", "COMBO", "The student.", next(iter(PRESETS)), choices=tuple(PRESETS)),
        Field("steps", "INT", "One of the numbers of steps it was made for; 0 is the usual one.",
              0, 0, 100),
        Field("width", "INT", "The picture's width in pixels; some students' levels depend on it.",
              1024, 16, 16384, 8),
        Field("height", "INT", "The picture's height in pixels.", 1024, 16, 16384, 8),
    ),
    outputs=(("sigmas", "SIGMAS"), ("sampler", "SAMPLER"), ("cfg", "FLOAT"),
             ("teacher_cfg", "FLOAT")),
    make=make_preset,
    aliases=("lightning", "turbo", "lcm", "dmd2", "schedule"),
)  # fmt: skip

RUN = (
    Field("noise", "NOISE", "The noise that all of them start from."),
    Field("guider", "GUIDER", "Of Teacher Guider."),
    Field("sampler", "SAMPLER", "Of KDPP Sampler."),
    Field("sigmas", "SIGMAS", "The levels."),
    Field("latent_image", "LATENT", "The latent that they start from."),
)
"""What SamplerCustomAdvanced takes, in its order."""

COMPARE = Node(
    id="KDPPCompare",
    title="Compare (KDPP)",
    description="What the teacher's help does to a picture, in the place of SamplerCustomAdvanced: "
    "one batch of the student alone, with its teacher, and with itself in the teacher's place. If "
    "the last two are alike, the second look helps, and not the teacher.",
    fields=RUN,
    outputs=(("samples", "LATENT"), ("evaluations", "STRING")),
    make=make_comparison,
    aliases=("distillation++", "with and without", "self control", "ablation"),
)

TUNE = Node(
    id="KDPPTune",
    title="Tune (KDPP)",
    description="Whether the teacher's help is worth it for this student, prompt, solver and "
    "levels: at which step, with which λ, noise level and CFG scale; or not at all. It takes as "
    f"long as some hundred pictures: with {PIPELINES.samples} samples of a student of 4 steps, "
    "2,000 to 3,000 evaluations of the student and 7,000 to 11,000 of the teacher. The exact "
    "figures and the time are shown on the node and in the log before the work begins; cancel, if "
    "that is too long.",
    fields=(
        *RUN,
        Field("samples", "INT", "How many samples are drawn; half of them choose, the other half "
              "checks. The price goes with it.", PIPELINES.samples, LEAST, 1000),
        Field("detail", "INT", "Steps of the teacher's own run, to which the student is compared. "
              "Most of the price goes with it.", PIPELINES.detail, 8, 1000),
        Field("rows", "INT", "How many samples a model is asked for at once. Fewer take less "
              "memory.", PIPELINES.max_batch, 1, 1000),
    ),
    outputs=(("verdict", "STRING"), ("plot", "IMAGE")),
    make=make_tuning,
    aliases=("distillation++", "is it worth it", "find settings", "teacher", "calibrate"),
)  # fmt: skip

NODES = (GUIDER, SAMPLER, PRESET, COMPARE, TUNE)


# The classic schema -------------------------------------------------------------------------------


def classic(node: Node) -> type:
    """The node as a class of ComfyUI's classic schema."""

    def entry(field: Field) -> tuple[Any, dict[str, Any]]:
        kind = list(field.choices) if field.type == "COMBO" else field.type
        return kind, {**field.settings, "tooltip": field.tooltip}

    def input_types(cls: type) -> dict[str, Any]:
        kinds = {"required": False, "optional": True}
        return {
            kind: {field.name: entry(field) for field in node.fields if field.optional == optional}
            for kind, optional in kinds.items()
        }

    return type(
        node.id,
        (),
        {
            "INPUT_TYPES": classmethod(input_types),
            "RETURN_TYPES": tuple(kind for _, kind in node.outputs),
            "RETURN_NAMES": tuple(name for name, _ in node.outputs),
            "FUNCTION": "make",
            "CATEGORY": CATEGORY,
            "DESCRIPTION": node.description,
            "SEARCH_ALIASES": list(node.aliases),
            "make": staticmethod(node.make),
        },
    )


# The V3 schema ------------------------------------------------------------------------------------


def extension() -> Any:
    """All nodes as an extension of ComfyUI's V3 schema."""
    from comfy_api.latest import ComfyExtension, io

    class Extension(ComfyExtension):  # type: ignore[misc]
        async def get_node_list(self) -> list[type]:
            return [in_v3(node, io) for node in NODES]

    return Extension()


def in_v3(node: Node, io: Any) -> type:
    """The node as a class of the V3 schema, whose module of types is ``io``."""

    def given(field: Field) -> Any:
        choices = {"options": list(field.choices)} if field.choices else {}
        return getattr(io, TYPES[field.type]).Input(
            field.name,
            tooltip=field.tooltip,
            optional=field.optional,
            **choices,
            **field.settings,
        )

    # Hosts from before search by other words do not take them.
    found_by = {"search_aliases": list(node.aliases)}
    known = getattr(io.Schema, "__dataclass_fields__", {})
    schema = io.Schema(
        node_id=node.id,
        display_name=node.title,
        category=CATEGORY,
        description=node.description,
        inputs=[given(field) for field in node.fields],
        outputs=[getattr(io, TYPES[kind]).Output(display_name=name) for name, kind in node.outputs],
        **{name: value for name, value in found_by.items() if name in known},
    )

    def execute(cls: type, /, **fields: Any) -> Any:
        return io.NodeOutput(*node.make(**fields))

    methods = {
        "define_schema": classmethod(lambda cls: schema),
        "execute": classmethod(execute),
    }
    return type(node.id, (io.ComfyNode,), methods)


TYPES = {
    "COMBO": "Combo",
    "CONDITIONING": "Conditioning",
    "FLOAT": "Float",
    "GUIDER": "Guider",
    "IMAGE": "Image",
    "INT": "Int",
    "LATENT": "Latent",
    "MODEL": "Model",
    "NOISE": "Noise",
    "SAMPLER": "Sampler",
    "SIGMAS": "Sigmas",
    "STRING": "String",
}
"""The classic schema's names of types in V3."""
