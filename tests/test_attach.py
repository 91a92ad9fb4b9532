"""A teacher attached to a pipeline of diffusers: the pipeline's own call runs kdpp's solver.

Every pipeline is a tiny one with random weights (tests/tiny_pipelines.py).
"""

import functools

import pytest
import torch

import kdpp

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("transformers", reason="needs transformers, for the text encoders")

import tiny_pipelines as tiny  # noqa: E402
from kdpp.checkpoints import pipelines  # noqa: E402
from kdpp.hosts.diffusers import attach  # noqa: E402
from test_pipelines import FAMILIES, NEGATIVE, PROMPTS, apart, noise_for, sizes, theirs  # noqa: E402

GUIDANCE = {"teacher_scale": 0.5, "teacher_steps": 2, "teacher_cfg_scale": 3.0}


def other(make, seed=7):
    """A second pipeline of the kind, with other weights."""
    pipe = make()
    for name in ("unet", "transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            tiny.tiny(getattr(pipe, name), seed)
    return pipe


def guided(pipe, teacher_pipe, noise, steps, scale, sampler="euler", x=None, sigmas=None,
           negative=NEGATIVE, **guidance):  # fmt: skip
    """The same run by kdpp's own loop: at the pipeline's levels, with noise told from its start."""
    size, _ = sizes(pipe)
    *models, extra_args = pipelines.from_pipelines(pipe, teacher_pipe, PROMPTS, negative, **size)
    sigmas = pipelines.pipeline_sigmas(pipe, steps, **size) if sigmas is None else sigmas
    x = noise * sigmas[0] if x is None else x
    seeds = kdpp.row_seeds(0, x)
    model = kdpp.TeacherGuidedDenoiser(
        *models, **{**GUIDANCE, **guidance},
        renoise_noise_sampler=kdpp.SeededNoise(x, seeds, stream=1),
    )  # fmt: skip
    extra_args["cond_scale"] = scale
    return kdpp.sample(sampler, model, x, sigmas, extra_args, disable=True)


# The same as the pipeline, and as kdpp's own loop -------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_teacher_a_run_is_the_pipelines(family, scale):
    pipe = FAMILIES[family]()
    noise = noise_for(pipe)
    wanted = theirs(pipe, noise, 3, scale)
    with attach(pipe, other(FAMILIES[family]), sampler="euler", teacher_scale=0.0):
        assert apart(theirs(pipe, noise, 3, scale), wanted) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_teacher_a_run_is_that_of_kdpps_loop(family, scale):
    """For two prompts of two lengths; the negative is the run's own, or given where it has none."""
    pipe, teacher_pipe = FAMILIES[family](), other(FAMILIES[family])
    noise = noise_for(pipe)
    alone = theirs(pipe, noise, 3, scale)
    wanted = guided(pipe, teacher_pipe, noise, 3, scale)
    negative = NEGATIVE if scale == 1.0 else None
    with attach(pipe, teacher_pipe, negative_prompt=negative, **GUIDANCE):
        assert apart(theirs(pipe, noise, 3, scale), wanted) < 1e-4
    assert apart(alone, wanted) > 1e-2


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("euler", "DDIMScheduler"),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_without_the_teacher_a_run_is_that_of_other_schedulers(sampler, kind, scale):
    """Their own solver is the default; latents of unit variance, and the noise of generator=."""
    more = {"final_sigmas_type": "zero"} if sampler == "dpmpp_2m" else {}
    more |= {"clip_sample": False} if kind == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, kind)(**tiny.TABLE, timestep_spacing="trailing", **more)
    pipe = tiny.sd(scheduler)
    noise, draw = noise_for(pipe), torch.Generator()
    wanted = theirs(pipe, noise, 4, scale, generator=draw.manual_seed(3))
    with attach(pipe, other(tiny.sd), teacher_scale=0.0) as attached:
        assert attached.solver is kdpp.SOLVERS[sampler]
        found = theirs(pipe, noise, 4, scale, generator=draw.manual_seed(3))
    assert apart(found, wanted) < 1e-4


def test_a_latent_of_unit_variance_has_its_teacher_too():
    """DDIM's latents are x/sqrt(1+σ²): with the teacher it is kdpp's run from that state."""
    ddim = diffusers.DDIMScheduler(**tiny.TABLE, timestep_spacing="trailing", clip_sample=False)
    pipe, teacher_pipe = tiny.sd(ddim), other(tiny.sd)
    noise = noise_for(pipe)
    sigmas = pipelines.pipeline_sigmas(pipe, 3, 16, 24)
    x = noise * (1.0 + sigmas[0] ** 2).sqrt()
    wanted = guided(pipe, teacher_pipe, noise, 3, 4.0, x=x, sigmas=sigmas)
    with attach(pipe, teacher_pipe, **GUIDANCE):
        assert apart(theirs(pipe, noise, 3, 4.0), wanted) < 1e-4


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "lms", "dpmpp_3m_sde", "euler_ancestral", "unipc"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_solvers_with_a_memory_and_with_noise(family, sampler):
    """Guided as by kdpp's own loop, with noise told from the latent where there is no generator."""
    pipe, teacher_pipe = FAMILIES[family](), other(FAMILIES[family])
    noise = noise_for(pipe)
    size, _ = sizes(pipe)
    sigmas = pipelines.pipeline_sigmas(pipe, 4, **size)
    x = noise * sigmas[0]
    seeds = kdpp.row_seeds(0, x)
    drawn = kdpp.SeededNoise(x, seeds)
    if kdpp.SOLVERS[sampler].noise == "brownian":
        drawn = kdpp.BrownianNoise(x, sigmas[-2], sigmas[0], seed=seeds)
    *models, extra_args = pipelines.from_pipelines(pipe, teacher_pipe, PROMPTS, NEGATIVE, **size)
    model = kdpp.TeacherGuidedDenoiser(
        *models, **GUIDANCE, renoise_noise_sampler=kdpp.SeededNoise(x, seeds, stream=1)
    )
    wanted = kdpp.sample(
        sampler, model, x, sigmas, extra_args | {"cond_scale": 4.0}, disable=True,
        noise_sampler=drawn,
    )  # fmt: skip
    with attach(pipe, teacher_pipe, sampler=sampler, **GUIDANCE):
        found = theirs(pipe, noise, 4, 4.0)
    # The network is told the scheduler's timestep, and by kdpp that of σ: a rounding apart.
    assert apart(found, wanted) < 1e-4


def test_options_of_a_solver():
    """As `kdpp.sample` takes them: fixed in its function. At η = 0 Euler a is Euler."""
    pipe = tiny.sd()
    noise = noise_for(pipe)
    wanted = theirs(pipe, noise, 3, 1.0)
    sampler = functools.partial(kdpp.sample_euler_ancestral_tg, eta=0.0)
    with attach(pipe, sampler=sampler, teacher_scale=0.0):
        assert apart(theirs(pipe, noise, 3, 1.0), wanted) < 1e-4


def test_a_lora_student_and_its_base():
    """One pipeline with a LoRA, in the place of two: the base teaches, and nothing stays off."""
    peft = pytest.importorskip("peft", reason="needs peft, for adapters")
    pipe, base = tiny.sd(), tiny.sd()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    noise = noise_for(pipe)
    alone = theirs(pipe, noise, 3, 1.0)
    wanted = guided(pipe, base, noise, 3, 1.0)
    for teacher_pipe in (None, pipe, base):
        with attach(pipe, teacher_pipe, negative_prompt=NEGATIVE, **GUIDANCE):
            assert apart(theirs(pipe, noise, 3, 1.0), wanted) < 1e-4
    assert torch.equal(theirs(pipe, noise, 3, 1.0), alone)
    assert apart(alone, wanted) > 1e-3


def test_a_batch_is_its_single_runs():
    """The teacher's noise is each picture's own, told from the latent that it begins with."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    latents = noise_for(pipe, batch=3)
    pipe.set_progress_bar_config(disable=True)

    def run(rows):
        return pipe(
            [PROMPTS[0]] * len(latents[rows]), num_inference_steps=3, latents=latents[rows],
            guidance_scale=4.0, output_type="latent", height=16, width=24,
        ).images  # fmt: skip

    with attach(pipe, teacher_pipe, sampler="dpmpp_2m_sde", **GUIDANCE):
        torch.manual_seed(5)
        batch = run(slice(0, 3))
        torch.manual_seed(6)  # of no account
        assert apart(torch.cat([run(slice(i, i + 1)) for i in range(3)]), batch) < 1e-4


def test_image_to_image():
    """The teacher helps in the steps that are left, counted from the first of them."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    picture = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            PROMPTS[0], picture, strength=0.5, num_inference_steps=4, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    alone = run()
    with attach(pipe, teacher_pipe, teacher_scale=0.0):
        assert apart(run(), alone) < 1e-4
    started = []
    with attach(pipe, teacher_pipe, negative_prompt=NEGATIVE, **GUIDANCE) as attached:
        step = attached.scheduler.add_noise
        attached.scheduler.add_noise = lambda *a: started.append(step(*a)) or started[0]
        found = run()
        assert attached.run is None
    sigmas = pipelines.pipeline_sigmas(pipe, 4, 16, 24)[2:]
    *models, extra_args = pipelines.from_pipelines(
        pipe, teacher_pipe, PROMPTS[0], NEGATIVE, height=16, width=24
    )
    x = started[0]
    renoise = kdpp.SeededNoise(x, kdpp.row_seeds(0, x), stream=1)
    model = kdpp.TeacherGuidedDenoiser(*models, **GUIDANCE, renoise_noise_sampler=renoise)
    assert apart(found, kdpp.sample_euler_tg(model, x, sigmas, extra_args, disable=True)) < 1e-4
    assert apart(found, alone) > 1e-2


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_inpainting(family):
    """The kept part stays; a class for inpainting on a model for text to image."""
    kind = {"sd": "StableDiffusionInpaintPipeline", "flux": "FluxInpaintPipeline"}[family]
    parts = {k: part for k, part in FAMILIES[family]().components.items() if part is not None}
    if family == "sd":
        parts |= dict.fromkeys(["safety_checker", "feature_extractor"])
        parts["requires_safety_checker"] = False
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0

    def run():
        return pipe(
            PROMPTS[0], image=picture, mask_image=mask, strength=1.0, num_inference_steps=3,
            generator=torch.Generator().manual_seed(0), output_type="latent", height=16, width=16,
        ).images  # fmt: skip

    alone = run()
    with attach(pipe, other(FAMILIES[family]), teacher_scale=0.0):
        assert apart(run(), alone) < 1e-4
    with attach(pipe, other(FAMILIES[family]), teacher_scale=0.5, teacher_steps=2):
        found = run()
    changed = (found - alone).abs()
    if family == "flux":
        changed = pipe._unpack_latents(changed, 16, 16, pipe.vae_scale_factor)
    assert changed[..., :4].max() > 1e-2
    assert changed[..., 4:].max() < 1e-5
