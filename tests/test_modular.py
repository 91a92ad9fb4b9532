"""A teacher's help as a block of diffusers' modular pipelines, beside the same by `attach`.

Every pipeline is a tiny one with random weights (tests/tiny_pipelines.py).
"""

import importlib
import subprocess
import sys

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("transformers", reason="needs transformers, for the text encoders")

import tiny_pipelines as tiny  # noqa: E402
from kdpp.checkpoints.networks import unpacked  # noqa: E402
from kdpp.hosts.diffusers import attach  # noqa: E402
from kdpp.hosts.diffusers.modular import GUIDANCE, with_teacher  # noqa: E402
from test_attach import other  # noqa: E402
from test_pipelines import NEGATIVE, PROMPTS, apart  # noqa: E402

BLOCKS = {
    "sdxl": ("stable_diffusion_xl", "StableDiffusionXLAutoBlocks"),
    "sd3": ("stable_diffusion_3", "StableDiffusion3AutoBlocks"),
    "flux": ("flux", "FluxAutoBlocks"),
    "flux2": ("flux2", "Flux2KleinAutoBlocks"),
    "z_image": ("z_image", "ZImageAutoBlocks"),
    "qwen_image": ("qwenimage", "QwenImageAutoBlocks"),
}
"""Not Krea 2 and Wan, whose blocks count on 36 layers of text and 16 channels."""
HELPED = {"teacher_scale": 0.5, "teacher_steps": 2, "teacher_cfg_scale": 3.0}


def modular(family, pipe, teacher=None, scale=None, helped=True):
    """The family's own blocks up to the latents, with a pipeline's parts."""
    module, name = BLOCKS[family]
    blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), name)()
    del blocks.sub_blocks["decode"]
    if helped:
        blocks.sub_blocks["denoise"] = with_teacher(blocks.sub_blocks["denoise"])
    made = blocks.init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    if teacher is not None:
        parts["teacher"] = network(teacher)
    if scale is not None and "guider" in made.component_names:
        parts["guider"] = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
    made.update_components(**{n: one for n, one in parts.items() if n in made.component_names})
    made.set_progress_bar_config(disable=True)
    return made


def network(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def run(pipe, **more):
    return pipe(
        prompt=PROMPTS[0], num_inference_steps=3, generator=torch.Generator().manual_seed(5),
        output="latents", height=32, width=32, **more,
    )  # fmt: skip


def ordinary(pipe, **more):
    """The latents of the ordinary pipeline, packed as that has them."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt=PROMPTS[0], num_inference_steps=3, generator=torch.Generator().manual_seed(5),
        output_type="latent", height=32, width=32, **more,
    )[0]  # fmt: skip


@pytest.mark.parametrize("family", BLOCKS)
def test_a_run_is_that_of_an_attached_teacher(family):
    """At λ = 0 it is the pipeline's own; afterwards nothing is left in it."""
    pipe = getattr(tiny, family)()
    teacher, more = other(getattr(tiny, family)), negative(family)
    bare = modular(family, pipe, scale=4.0, helped=False)
    made = modular(family, pipe, teacher, 4.0)
    plain = run(bare, **more)
    assert apart(run(made, teacher_scale=0.0, **more), plain) < 1e-4
    found = run(made, **HELPED, teacher_negative_prompt=NEGATIVE, **more)
    with attach(bare, teacher, **HELPED, negative_prompt=NEGATIVE):
        assert torch.equal(run(bare, **more), found)
    assert apart(found, plain) > 1e-2
    assert torch.equal(run(bare, **more), plain)
    assert type(made.scheduler) is type(pipe.scheduler)
    assert not network(pipe)._forward_pre_hooks


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_it_is_the_run_of_the_ordinary_pipeline_with_a_teacher(scale):
    """SDXL, whose modular pipeline draws what the ordinary one draws."""
    pipe, teacher = tiny.sdxl(), other(tiny.sdxl)
    made = modular("sdxl", pipe, teacher, scale)
    found = run(made, **HELPED, negative_prompt=NEGATIVE, teacher_negative_prompt=NEGATIVE)
    with attach(pipe, teacher, **HELPED, negative_prompt=NEGATIVE):
        wanted = ordinary(pipe, guidance_scale=scale, negative_prompt=NEGATIVE)
    assert apart(found, wanted) < 1e-4


def test_a_packed_latent():
    """FLUX: tokens in the pipeline, pictures in the block's output."""
    pipe, teacher = tiny.flux(), other(tiny.flux)
    made = modular("flux", pipe, teacher)
    found = run(made, **HELPED, teacher_negative_prompt=NEGATIVE)
    with attach(pipe, teacher, **HELPED, negative_prompt=NEGATIVE):
        tokens = ordinary(pipe)
    assert apart(found, unpacked(tokens, 8, 8, 2)) < 1e-4


def test_a_lora_student_without_a_teacher_is_taught_by_its_base():
    peft = pytest.importorskip("peft", reason="needs peft, for adapters")
    pipe, base = tiny.sdxl(), tiny.sdxl()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    more = {**HELPED, "negative_prompt": NEGATIVE}
    found = run(modular("sdxl", pipe, scale=4.0), **more)
    assert apart(found, run(modular("sdxl", pipe, base, 4.0), **more)) < 1e-4
    assert apart(found, run(modular("sdxl", pipe, scale=4.0), teacher_scale=0.0)) > 1e-3


def test_a_teacher_that_predicts_something_else_has_its_own_scheduler():
    pipe, teacher = tiny.sdxl(), other(tiny.sdxl)
    teacher.scheduler = tiny.euler(prediction_type="v_prediction")
    made = modular("sdxl", pipe, teacher, 4.0)
    as_the_student = run(made, **HELPED)
    made.update_components(teacher_scheduler=teacher.scheduler)
    found = run(made, **HELPED)
    with attach(pipe, teacher, **HELPED):
        assert apart(found, ordinary(pipe, guidance_scale=4.0)) < 1e-4
    assert apart(found, as_the_student) > 1e-2


def test_an_error_leaves_the_pipeline_usable():
    pipe, teacher = tiny.sdxl(), other(tiny.sdxl)
    made = modular("sdxl", pipe, teacher, 4.0)
    before = run(made, **HELPED)
    for bad, said in (({"sampler": "heun"}, "more than once a step"), ({"teacher_steps": 9}, "9")):
        with pytest.raises(ValueError, match=said):
            run(made, **{**HELPED, **bad})
        assert not network(pipe)._forward_pre_hooks
    assert torch.equal(run(made, **HELPED), before)


def test_its_page_of_inputs_names_the_settings():
    """What a modular pipeline says of itself: the teacher, and how it is asked."""
    made = modular("sdxl", tiny.sdxl())
    assert {"teacher", "teacher_scheduler"} <= set(made.component_names)
    told = {one.name: one.default for one in made.blocks.inputs}
    assert told.items() >= {name: value for name, (value, _) in GUIDANCE.items()}.items()


def test_the_page_s_import_alone_is_enough():
    """`attach` knows kdpp's solvers, whatever else was imported."""
    code = (
        "from kdpp.hosts.diffusers.attaching import solver_for\n"
        "class FlowMatchEulerDiscreteScheduler: pass\n"
        "class Pipe: scheduler = FlowMatchEulerDiscreteScheduler()\n"
        "print(solver_for(Pipe(), None)[0].name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "euler\n", done.stderr


def negative(family):
    """Of the run's own CFG, where it has one."""
    return {} if "flux" in family else {"negative_prompt": NEGATIVE}
