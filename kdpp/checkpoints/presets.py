"""Presets: how each published few-step student is sampled, and which teacher's settings go with it.

One table, `PRESETS`. A line of it names the levels in full, since a student sampled on other levels
than its own loses more than any guidance gives: as timesteps of Stable Diffusion's schedule for
models that predict ε, as τ for flow models. `Preset.sigmas` makes the sampler's levels of them, and
`check_levels` says what is wrong with others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kdpp.checkpoints.files import CheckpointFacts
from kdpp.lab.schedules import log_sigmas

__all__ = ["PRESETS", "Preset", "check_levels", "fitting", "flux2_shift", "shifted"]

TOLERANCE = 0.01
"""How far a level may be from the trained one, relative to it: a timestep, rounded either way."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How one student is sampled.

    Attributes:
        name: by which it is asked for.
        what: the student, in words.
        architecture: as `CheckpointFacts` names it; `variant`, where only one of them fits.
        file_words: found in its files' usual names.
        timesteps: for models that predict ε, each number of steps it was made for, the usual one
            first: indices into Stable Diffusion's "scaled linear" schedule of 1000, falling.
        taus: the same for flow models: τ in (0, 1], falling, without the last 0.
        shift_of_size: for students whose levels depend on the size of the picture, the shift of
            ``taus`` as a function of (image tokens of 16 × 16 pixels, steps).
        sampler: a name of `kdpp.SOLVERS`.
        teacher_scale: λ.
        teacher_steps: k, the number of first steps with the teacher's help.
        teacher_cfg_scale: the teacher's CFG scale, ``D_∅ + scale·(D_c - D_∅)``.
        cond_scale: the student's own; 1 is no guidance, one call a step.
        lora_weight: of its LoRA, where it comes as one.
        guidance_input: whether the network takes ``cond_scale`` as an input.
        boundary_scalings: whether it was trained with LCM's (`kdpp.LCMDenoiser`).
        expert_boundary: τ at and above which the first of two networks is asked.
        paper: whether sampler, λ, k and the teacher's CFG are those of Distillation++ (Park et al.
            2025; SDXL, 4 steps). Otherwise λ is that of its students with such a sampler, untried.
        run: whether it was run on the real weights for this table.
        source: where the levels come from.
        note: what else to know; where sources differ, how.
    """

    name: str
    what: str
    architecture: str
    sampler: str
    teacher_scale: float
    teacher_cfg_scale: float
    source: str
    timesteps: tuple[tuple[int, ...], ...] = ()
    taus: tuple[tuple[float, ...], ...] = ()
    shift_of_size: Callable[[int, int], float] | None = None
    variant: str = ""
    file_words: tuple[str, ...] = ()
    teacher_steps: int = 1
    cond_scale: float = 1.0
    lora_weight: float | None = None
    guidance_input: bool = False
    boundary_scalings: bool = False
    expert_boundary: float | None = None
    paper: bool = False
    run: bool = False
    note: str = ""

    @property
    def flow(self) -> bool:
        """Whether its levels are a flow model's τ."""
        return bool(self.taus)

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps it was made for, the usual one first."""
        return tuple(map(len, self.timesteps or self.taus))

    def sigmas(
        self, steps: int | None = None, size: tuple[int, int] = (1024, 1024)
    ) -> tuple[float, ...]:
        """The levels to sample it on, the last one 0: σ, for a flow model τ.

        Args:
            steps: one of `steps`; by default the usual number.
            size: the picture's height and width in pixels, which changes the levels of those
                students alone that have ``shift_of_size``.

        Raises ValueError for another number of steps.
        """
        steps = self.steps[0] if steps is None else steps
        if steps not in self.steps:
            allowed = " or ".join(map(str, sorted(self.steps)))
            raise ValueError(f"{self.name} was made for {allowed} steps, not {steps}")
        i = self.steps.index(steps)
        if not self.flow:
            table = log_sigmas().exp().tolist()
            return (*(table[t] for t in self.timesteps[i]), 0.0)
        if self.shift_of_size is None:
            return (*map(float, self.taus[i]), 0.0)
        shift = self.shift_of_size((size[0] // 16) * (size[1] // 16), steps)
        return (*(_shift(tau, shift) for tau in self.taus[i]), 0.0)

    def check(self, sigmas: Sequence[float], size: tuple[int, int] = (1024, 1024)) -> str | None:
        """What is wrong with these levels for this student, with the right ones; None: nothing."""
        return check_levels(self.name, [self.sigmas(n, size) for n in self.steps], sigmas)


def check_levels(
    student: str, trained: Sequence[Sequence[float]], sigmas: Sequence[float]
) -> str | None:
    """What is wrong with sampling a student on these levels; None: nothing.

    Right is one of the trained runs, or its end, as image to image takes it. A level may be 1 %
    off: a timestep rounded the other way.

    Args:
        student: its name, for the message.
        trained: the levels of each run that it was made for, the last one 0.
        sigmas: the levels somebody wants to sample it on, in the same coordinates.
    """
    levels = [float(sigma) for sigma in sigmas]
    if any(_same(levels, run[-len(levels) :]) for run in trained if 2 <= len(levels) <= len(run)):
        return None
    right = min(trained, key=lambda run: abs(len(run) - len(levels)))
    return (
        f"{student} was trained for the levels {_listed(right)}, and these are {_listed(levels)}; "
        "a student sampled on other levels loses more than guidance gives"
    )


def fitting(facts: CheckpointFacts) -> tuple[Preset, ...]:
    """The presets for a file of this architecture; first the one that its name tells of, if any.

    A file seldom says what it was distilled for: SDXL-Turbo and SDXL have the same keys.
    """
    found = [preset for preset in PRESETS.values() if _fits(preset, facts)]
    return tuple(sorted(found, key=lambda preset: preset is not named(facts)))


def named(facts: CheckpointFacts) -> Preset | None:
    """The preset that the file's name tells of."""
    name = re.sub(r"[^a-z0-9]", "", facts.path.name.lower())
    found = [
        preset
        for preset in PRESETS.values()
        if _fits(preset, facts) and preset.file_words and all(w in name for w in preset.file_words)
    ]
    return max(found, key=lambda preset: len(preset.file_words), default=None)


def shifted(shift: float, steps: int) -> tuple[float, ...]:
    """τ from 1 in equal steps, shifted: ``τ' = s τ / (1 + (s-1) τ)``, without the last 0.

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers" (SD3), section 5.3.2.
    """
    return tuple(_shift(i / steps, shift) for i in range(steps, 0, -1))


def _shift(tau: float, shift: float) -> float:
    return shift * tau / (1.0 + (shift - 1.0) * tau)


def flux2_shift(tokens: int, steps: int) -> float:
    """FLUX.2's shift: exp(μ), μ linear in the tokens, with fits at 10 and at 200 steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return math.exp(at_200)
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return math.exp(at_200 + (at_10 - at_200) * (200 - steps) / 190)


def _same(levels: Sequence[float], run: Sequence[float]) -> bool:
    return all(abs(a - b) <= TOLERANCE * b for a, b in zip(levels, run))


def _listed(levels: Sequence[float]) -> str:
    return ", ".join(f"{level:.4g}" for level in levels)


def _fits(preset: Preset, facts: CheckpointFacts) -> bool:
    """Whether the file can be such a student."""
    if preset.architecture != facts.architecture:
        return False
    if facts.variant and preset.variant not in facts.variant:
        return False
    if facts.lora is not None:
        return preset.lora_weight is not None
    return facts.kind == "model" and preset.guidance_input == facts.guidance_input


# The table -------------------------------------------------------------------------------------

TRAILING = {
    1: (999,),
    2: (999, 499),
    3: (999, 666, 332),
    4: (999, 749, 499, 249),
    8: (999, 874, 749, 624, 499, 374, 249, 124),
}
"""Timesteps in equal steps from the last one down: ``1000 i/n - 1``."""
LCM = (
    (999, 759, 499, 259),
    (999, 499),
    (999, 679, 339),
    (999, 799, 599, 399, 199),
    (999, 839, 679, 499, 339, 179),
    (999, 859, 719, 579, 439, 299, 159),
    (999, 879, 759, 639, 499, 379, 259, 139),
)
"""Of the 50 timesteps 19, 39, …, 999 that LCM was distilled on, as diffusers' LCMScheduler picks
them."""
EULER_LAMBDA, MULTISTEP_LAMBDA = 0.1, 0.02
"""The paper's λ for students sampled by an ODE solver, and for those that are noised anew."""
SD_CFG = 7.5
"""The paper's CFG scale of an SD 1.5 or SDXL teacher."""


_LIGHTNING = Preset(
    name="sdxl-lightning-4",
    what="SDXL-Lightning of 4 steps, model or LoRA",
    architecture="SDXL",
    file_words=("lightning", "4step"),
    timesteps=(TRAILING[4],),
    sampler="euler",
    teacher_scale=EULER_LAMBDA,
    teacher_cfg_scale=SD_CFG,
    lora_weight=1.0,
    paper=True,
    source="Lin et al. 2024, arXiv 2402.13929; model card ByteDance/SDXL-Lightning",
    note="The weights for each number of steps are a file of their own.",
)
_LCM = Preset(
    name="lcm-sd15",
    what="LCM of SD 1.5 (Dreamshaper v7)",
    architecture="SD 1.x",
    file_words=("lcm",),
    timesteps=LCM,
    sampler="lcm",
    teacher_scale=MULTISTEP_LAMBDA,
    teacher_cfg_scale=SD_CFG,
    cond_scale=8.0,
    guidance_input=True,
    boundary_scalings=True,
    source="Luo et al. 2023, arXiv 2310.04378; model card SimianLuo/LCM_Dreamshaper_v7",
    note="Its guidance is an input of the network: w = cond_scale - 1.",
)
_LCM_LORA = replace(
    _LCM,
    name="lcm-lora-sd15",
    what="LCM-LoRA of SD 1.5",
    cond_scale=1.0,
    guidance_input=False,
    lora_weight=1.0,
    source="Luo et al. 2023, arXiv 2311.05556; model card latent-consistency/lcm-lora-sdv1-5",
    note="Commonly used with CFG 1 to 2.",
)
_DMD2 = Preset(
    name="dmd2",
    what="DMD2 of SDXL, 4 steps, model or LoRA",
    architecture="SDXL",
    file_words=("dmd2",),
    timesteps=(TRAILING[4],),
    sampler="lcm",
    teacher_scale=MULTISTEP_LAMBDA,
    teacher_cfg_scale=SD_CFG,
    lora_weight=1.0,
    paper=True,
    source="Yin et al. 2024, arXiv 2405.14867; demo/text_to_image_sdxl.py of tianweiy/DMD2",
    note="Its README takes LCMScheduler as it is, which asks at 999, 759, 499, 259; the demo and "
    "the training have these.",
)
_HYPER = Preset(
    name="hyper-sdxl-4",
    what="Hyper-SD LoRA of SDXL, 4 steps",
    architecture="SDXL",
    file_words=("hyper", "4step"),
    timesteps=(TRAILING[4],),
    sampler="euler",
    teacher_scale=EULER_LAMBDA,
    teacher_cfg_scale=SD_CFG,
    lora_weight=1.0,
    source="Ren et al. 2024, arXiv 2404.13686; model card ByteDance/Hyper-SD (DDIM, trailing)",
    note="The weights for each number of steps are a file of their own. The one-step files are not "
    "here: they are TCD's, or start from pure noise at timestep 800.",
)
_HYPER_CFG = replace(
    _HYPER,
    name="hyper-sdxl-8-cfg",
    what="Hyper-SD CFG LoRA of SDXL, 8 steps",
    file_words=("hyper", "8step", "cfg"),
    timesteps=(TRAILING[8],),
    cond_scale=5.0,
    note="Made for CFG 5 to 8, unlike the other Hyper-SD files.",
)
_WAN = Preset(
    name="wan22-lightning-t2v",
    what="Wan2.2-Lightning, text to video, A14B, LoRAs of both experts",
    architecture="Wan",
    variant="T2V 14B",
    file_words=("wan", "4step", "t2v"),
    taus=((1, 15 / 16, 5 / 6, 5 / 8),),
    sampler="euler",
    teacher_scale=EULER_LAMBDA,
    teacher_cfg_scale=4.0,
    lora_weight=1.0,
    expert_boundary=0.875,
    source="ModelTC/Wan2.2-Lightning: wan/configs, wan/utils/fm_solvers_euler.py (shift 5)",
    note="Teacher's CFG: Wan's own for the high-noise expert; 3 for the low-noise one.",
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _LIGHTNING,
        *(
            replace(
                _LIGHTNING,
                name=f"sdxl-lightning-{n}",
                what=f"SDXL-Lightning of {n} steps, model or LoRA",
                file_words=("lightning", f"{n}step"),
                timesteps=(TRAILING[n],),
                paper=False,
            )
            for n in (2, 8)
        ),
        Preset(
            name="sdxl-turbo",
            what="SDXL-Turbo",
            architecture="SDXL",
            file_words=("turbo",),
            timesteps=(TRAILING[4], TRAILING[1], TRAILING[2], TRAILING[3]),
            sampler="dpmpp_2s_ancestral",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=SD_CFG,
            paper=True,
            source="Sauer et al. 2023, arXiv 2311.17042; model card stabilityai/sdxl-turbo",
            note="Made for 512 × 512. Its card samples it with Euler ancestral; the paper with "
            "DPM++ 2S a, which asks it between these levels too, 7 calls for 4 steps.",
        ),
        Preset(
            name="sd-turbo",
            what="SD-Turbo (of SD 2.1)",
            architecture="SD 2.x",
            file_words=("turbo",),
            timesteps=(TRAILING[4], TRAILING[1], TRAILING[2], TRAILING[3]),
            sampler="euler",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=SD_CFG,
            source="Sauer et al. 2023, arXiv 2311.17042; model card stabilityai/sd-turbo",
            note="Made for 512 × 512. It predicts ε, as its teacher SD 2.1-base does; SD 2.1 of "
            "768 pixels predicts v.",
        ),
        _LCM,
        replace(
            _LCM,
            name="lcm-sdxl",
            what="LCM of SDXL",
            architecture="SDXL",
            paper=True,
            source="Luo et al. 2023, arXiv 2310.04378; model card latent-consistency/lcm-sdxl",
        ),
        _LCM_LORA,
        replace(
            _LCM_LORA,
            name="lcm-lora-sdxl",
            what="LCM-LoRA of SDXL",
            architecture="SDXL",
            paper=True,
            source="Luo et al. 2023, arXiv 2311.05556; model card latent-consistency/lcm-lora-sdxl",
        ),
        _DMD2,
        replace(
            _DMD2,
            name="dmd2-lora-8",
            what="DMD2's LoRA of SDXL in 8 steps, as the web UIs' users run it",
            file_words=(),
            timesteps=(TRAILING[8],),
            cond_scale=1.4,
            lora_weight=0.7,
            paper=False,
            source="users' settings: weight .7, 8 steps, CFG 1.4 to 1.8 (civitai model 1608870)",
            note="Every second level is one that it was trained on; the others lie between them.",
        ),
        *(
            replace(
                _HYPER,
                name=f"hyper-{short}-{n}",
                what=f"Hyper-SD LoRA of {long}, {n} steps",
                architecture=long,
                file_words=("hyper", f"{n}step"),
                timesteps=(TRAILING[n],),
            )
            for short, long in (("sdxl", "SDXL"), ("sd15", "SD 1.x"))
            for n in (2, 4, 8)
        ),
        _HYPER_CFG,
        replace(
            _HYPER_CFG,
            name="hyper-sd15-8-cfg",
            what="Hyper-SD CFG LoRA of SD 1.5, 8 steps",
            architecture="SD 1.x",
        ),
        Preset(
            name="sd35-turbo",
            what="Stable Diffusion 3.5 Large Turbo",
            architecture="SD3",
            variant="3.5 large",
            file_words=("turbo",),
            taus=((1, 9 / 10, 3 / 4, 1 / 2),),
            sampler="euler",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=4.5,
            source="model card stabilityai/stable-diffusion-3.5-large-turbo; shift 3, as ComfyUI's "
            "simple schedule spaces it",
            note="Stability's sd3_infer.py and diffusers' default spacing shift the lowest level "
            "twice: 1, .858, .602, .009, 0, where the last step changes next to nothing.",
        ),
        Preset(
            name="flux-schnell",
            what="FLUX.1 schnell",
            architecture="FLUX.1",
            file_words=("schnell",),
            taus=((1, 3 / 4, 1 / 2, 1 / 4), (1,), (1, 1 / 2), (1, 2 / 3, 1 / 3)),
            sampler="euler",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=3.5,
            source="black-forest-labs/flux, src/flux/sampling.py: equal steps, no shift",
            note="Its teacher FLUX.1 dev takes the CFG scale as an input, in one call.",
        ),
        Preset(
            name="z-image-turbo",
            what="Z-Image-Turbo",
            architecture="Z-Image",
            file_words=("turbo",),
            taus=((1, 21 / 22, 9 / 10, 5 / 6, 3 / 4, 9 / 14, 1 / 2, 3 / 10),),
            sampler="euler",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=5.0,
            source="Tongyi-MAI/Z-Image and diffusers' ZImagePipeline: 8 steps, shift 3",
            note="num_inference_steps=9 in older examples gave these levels and a ninth at 0, "
            "which was not evaluated (diffusers' pull request 13730). Equal steps without a shift "
            "are not its scheduler's. Z-Image's guidance_scale is the CFG scale less 1.",
        ),
        *(
            Preset(
                name=f"qwen-image-lightning-{n}",
                what=f"Qwen-Image-Lightning LoRA, {n} steps",
                architecture="Qwen-Image",
                file_words=("lightning", f"{n}step"),
                taus=(taus,),
                sampler="euler",
                teacher_scale=EULER_LAMBDA,
                teacher_cfg_scale=4.0,
                lora_weight=1.0,
                source="ModelTC/Qwen-Image-Lightning; model card lightx2v/Qwen-Image-Lightning: "
                "shift 3, shift_terminal None",
                note="Qwen-Image's own scheduler shifts by the picture's size and ends at .02; the "
                "LoRA was made without either.",
            )
            for n, taus in (
                (4, (1, 9 / 10, 3 / 4, 1 / 2)),
                (8, (1, 21 / 22, 9 / 10, 5 / 6, 3 / 4, 9 / 14, 1 / 2, 3 / 10)),
            )
        ),
        _WAN,
        replace(
            _WAN,
            name="wan22-lightning-i2v",
            what="Wan2.2-Lightning, image to video, A14B, LoRAs of both experts",
            variant="I2V 14B",
            file_words=("wan", "4step", "i2v"),
            teacher_cfg_scale=3.5,
            expert_boundary=0.9,
            note="Teacher's CFG: Wan's own, for both experts.",
        ),
        Preset(
            name="flux2-klein",
            what="FLUX.2 klein 4B and 9B (not klein base)",
            architecture="FLUX.2",
            variant="klein",
            file_words=("klein",),
            taus=((1, 3 / 4, 1 / 2, 1 / 4),),
            shift_of_size=flux2_shift,
            sampler="euler",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=4.0,
            source="black-forest-labs/flux2, src/flux2/sampling.py; diffusers' Flux2KleinPipeline",
            note="The shift grows with the picture: 9.9 at 1024 × 1024, 7.6 at 512 × 512.",
        ),
        Preset(
            name="krea2-turbo",
            what="Krea 2 Turbo",
            architecture="Krea 2",
            file_words=("turbo",),
            taus=(shifted(math.exp(1.15), 8),),
            sampler="euler",
            teacher_scale=EULER_LAMBDA,
            teacher_cfg_scale=4.5,
            source="krea-ai/krea-2, README and sampling.py: 8 steps, μ = 1.15 at every size; "
            "diffusers' Krea2Pipeline",
            note="Krea's --cfg 3.5 is CFG 4.5: it counts from the conditional estimate.",
        ),
    )
}
"""All presets, by name."""
