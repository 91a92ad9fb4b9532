"""A teacher attached to a pipeline of diffusers: the pipeline's own call runs kdpp's solver.

Every pipeline is a tiny one with random weights (tests/tiny_pipelines.py).
"""

import copy
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch

import kdpp

diffusers = pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("transformers", reason="needs transformers, for the text encoders")

import tiny_pipelines as tiny  # noqa: E402
from kdpp.checkpoints import pipelines  # noqa: E402
from kdpp.hosts.diffusers import attach, detach  # noqa: E402
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


def test_an_lcm_with_its_guidance_as_an_input():
    """Its pipeline decodes the estimate that step gives beside the latent: the revised one."""
    pipe, teacher_pipe = tiny.lcm(), other(tiny.sd)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            PROMPTS[0], num_inference_steps=3, num_images_per_prompt=2, guidance_scale=6.0,
            generator=torch.Generator().manual_seed(0), output_type="latent", height=16, width=24,
        ).images  # fmt: skip

    alone = run()
    with attach(pipe, teacher_pipe, teacher_scale=0.0):
        assert apart(run(), alone) < 1e-4
    last = {"teacher_steps": [2], "renoise": 0.5}
    with attach(pipe, teacher_pipe, teacher_scale=0.5, **last):
        half = run()
    with attach(pipe, teacher_pipe, teacher_scale=1.0, **last):
        whole = run()
    assert apart(alone, whole) > 1e-2
    assert apart(2.0 * half - alone, whole) < 1e-3  # λ = 1/2 is half way


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


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_image_to_image_in_other_families(family):
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(FAMILIES[family]())
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(
            prompt=PROMPTS[0], image=picture, strength=0.6, num_inference_steps=5,
            generator=torch.Generator().manual_seed(0), output_type="latent",
            **{} if family == "sdxl" else {"height": 16, "width": 16},
        ).images  # fmt: skip

    alone = run()
    with attach(pipe, other(FAMILIES[family]), teacher_scale=0.0):
        assert apart(run(), alone) < 1e-4
    with attach(pipe, other(FAMILIES[family]), teacher_scale=0.5, teacher_steps=2):
        assert apart(run(), alone) > 1e-2


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_inpainting(family):
    """The kept part stays; a class for inpainting on a model for text to image."""
    kind = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline",
            "flux": "FluxInpaintPipeline"}[family]  # fmt: skip
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


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    """Its examples, on folders of those names."""
    page = Path(__file__).parents[1] / "docs" / "diffusers.md"
    codes = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(codes) == 3
    monkeypatch.chdir(tmp_path)
    tiny.sdxl().save_pretrained("sdxl-lightning")
    other(tiny.sdxl).save_pretrained("sdxl")
    variables = {}
    for code in codes:
        exec(compile(code, "diffusers.md", "exec"), variables)
    assert variables["picture"].size == (16, 16) and hooks(variables["pipe"]) == 0


# Attached and detached ----------------------------------------------------------------------------


def hooks(pipe):
    networks = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    return sum(len(one._forward_pre_hooks) for one in networks if one is not None)


@pytest.mark.parametrize("family", ["sd", "flux", "wan_experts"])
def test_detached_a_pipeline_is_as_it_was(family):
    pipe = FAMILIES[family]()
    noise, own = noise_for(pipe), pipe.scheduler
    alone, settings = theirs(pipe, noise, 2, 4.0), dict(pipe.config)
    kept = {name: copy.deepcopy(value) for name, value in vars(own).items()}
    attached = attach(pipe, other(FAMILIES[family]), **GUIDANCE)
    assert hooks(pipe) == 1 + (family == "wan_experts")
    first = theirs(pipe, noise, 2, 4.0)
    assert torch.equal(theirs(pipe, noise, 2, 4.0), first)  # the same again
    assert apart(alone, first) > 1e-2
    assert isinstance(pipe.scheduler, type(own)) and pipe.scheduler is not own
    detach(pipe)
    assert pipe.scheduler is own and hooks(pipe) == 0 and dict(pipe.config) == settings
    assert vars(own).keys() == kept.keys()
    assert all(repr(vars(own)[name]) == repr(value) for name, value in kept.items())
    assert type(attached.scheduler) is type(own)
    detach(pipe)  # nothing is in
    assert torch.equal(theirs(pipe, noise, 2, 4.0), alone)


class Stopped(Exception):
    """What ends a run."""


@pytest.mark.parametrize("where", ["callback", "student", "second call", "teacher"])
def test_after_a_run_that_broke_off(where):
    """The next run is a whole one, and a block that it leaves detaches."""
    pipe, teacher_pipe = tiny.flux(), other(tiny.flux)
    noise, own = noise_for(pipe), pipe.scheduler
    alone = theirs(pipe, noise, 3, 4.0)
    counts = {"student": 3, "second call": 4, "teacher": 1}

    def stop(*_):
        nonlocal calls
        calls += 1
        if calls == counts.get(where):
            raise Stopped

    def stop_at_end(pipe, step, t, given):
        if where == "callback":
            raise Stopped
        return given

    with attach(pipe, teacher_pipe, **GUIDANCE) as attached:
        wanted = theirs(pipe, noise, 3, 4.0)
        calls = 0
        network = teacher_pipe.transformer if where == "teacher" else pipe.transformer
        handle = network.register_forward_hook(stop)
        with pytest.raises(Stopped):
            theirs(pipe, noise, 3, 4.0, callback_on_step_end=stop_at_end)
        handle.remove()
        assert attached.run is None or where != "teacher"
        assert torch.equal(theirs(pipe, noise, 3, 4.0), wanted)
        assert attached.run is None and attached.recorder.calls == []
    with pytest.raises(Stopped), attach(pipe, teacher_pipe, **GUIDANCE):
        raise Stopped
    assert pipe.scheduler is own and hooks(pipe) == 0
    assert torch.equal(theirs(pipe, noise, 3, 4.0), alone)


def test_a_callback_sees_and_changes_the_run():
    """Latents, and a guidance that is switched off on the way: the teacher follows."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    noise, seen = noise_for(pipe), []

    def cut(pipe, step, t, given):
        seen.append(step)
        pipe._guidance_scale = 1.0
        given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1] if step == 0 else given[
            "prompt_embeds"]  # fmt: skip
        return given

    names = ["prompt_embeds"]

    def empty(pipe, step, t, given):
        return {"latents": torch.zeros_like(noise)} if step == 1 else {}

    with attach(pipe, teacher_pipe, **GUIDANCE):
        whole = theirs(pipe, noise, 3, 4.0)
        found = theirs(
            pipe, noise, 3, 4.0, callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=names,
        )  # fmt: skip
        zeros = theirs(pipe, noise, 3, 4.0, callback_on_step_end=empty)
    assert seen == [0, 1, 2] and found.isfinite().all() and apart(found, whole) > 1e-3
    assert apart(zeros, whole) > 1e-1


def test_the_conditions_are_those_of_the_step():
    """A prompt that changes on the way reaches the teacher."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    noise, asked = noise_for(pipe), []
    teacher_pipe.unet.register_forward_pre_hook(
        lambda _, args, given: asked.append(given["encoder_hidden_states"]), with_kwargs=True
    )

    def change(pipe, step, t, given):
        return {"prompt_embeds": -given["prompt_embeds"]}

    with attach(pipe, teacher_pipe, **GUIDANCE):
        theirs(pipe, noise, 3, 4.0, callback_on_step_end=change,
               callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    assert len(asked) == 2 and torch.equal(asked[1], -asked[0])


def test_a_pipeline_made_of_an_attached_one():
    """from_pipe shares the scheduler, so the teacher helps there, and detaching either ends it."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    noise, own = noise_for(pipe), pipe.scheduler
    alone = theirs(pipe, noise, 2, 4.0)
    attach(pipe, teacher_pipe, **GUIDANCE)
    second = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    assert torch.equal(theirs(second, noise, 2, 4.0), theirs(pipe, noise, 2, 4.0))
    detach(second)
    assert pipe.scheduler is own and second.scheduler is own and hooks(pipe) == 0
    assert torch.equal(theirs(second, noise, 2, 4.0), alone)


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_saved_and_loaded(family, tmp_path):
    """The folder is that of the pipeline without the teacher, and loads without kdpp."""
    pipe = FAMILIES[family]()
    pipe.save_pretrained(tmp_path / "plain")
    noise = noise_for(pipe)
    alone = theirs(pipe, noise, 2, 4.0)
    with attach(pipe, other(FAMILIES[family]), **GUIDANCE):
        pipe.save_pretrained(tmp_path / "attached")
        again = type(pipe.scheduler).from_config(pipe.scheduler.config)
        copied = copy.deepcopy(pipe.scheduler)
    for name in ("plain", "attached"):
        found = sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*"))
        assert found and all((tmp_path / "plain" / p).exists() for p in found)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        texts = [(tmp_path / folder / name).read_text() for folder in ("plain", "attached")]
        assert texts[0] == texts[1] and "kdpp" not in texts[1]
    loaded = type(pipe).from_pretrained(tmp_path / "attached")
    assert type(loaded.scheduler) is type(pipe.scheduler) is type(copied)
    assert vars(copied).keys() == vars(pipe.scheduler).keys()  # without the teacher
    assert torch.equal(theirs(loaded, noise, 2, 4.0), alone)
    loaded.scheduler = again
    assert torch.equal(theirs(loaded, noise, 2, 4.0), alone)


def test_what_diffusers_asks_of_a_scheduler():
    pipe = tiny.sd()
    own = pipe.scheduler
    with attach(pipe, other(tiny.sd), teacher_scale=0.0) as attached:
        scheduler = attached.scheduler
        assert isinstance(scheduler, diffusers.SchedulerMixin | diffusers.ConfigMixin)
        assert scheduler.config == own.config and scheduler.compatibles
        assert {"generator", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)
        assert inspect.signature(scheduler.set_timesteps) == inspect.signature(own.set_timesteps)
        for name in ("timesteps", "sigmas"):
            given = {"timesteps": [999, 500, 100], "sigmas": [10.0, 3.0, 1.0]}[name]
            noise = noise_for(pipe)
            found = theirs(pipe, noise, 3, 1.0, **{name: given})
            pipe.scheduler = own
            wanted = theirs(pipe, noise, 3, 1.0, **{name: given})
            pipe.scheduler = scheduler
            assert apart(found, wanted) < 1e-4
        scheduler.set_timesteps(3)
        sample = torch.randn(1, 4, 8, 8) * scheduler.init_noise_sigma
        given = (torch.randn(1, 4, 8, 8), scheduler.timesteps[0], sample)
        output = scheduler.step(*given)
        own.set_timesteps(3)
        torch.testing.assert_close(dict(output), dict(own.step(*given)))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_in_16_bits(family):
    """The state of a step is float32; latents keep the pipeline's dtype, as diffusers' Euler."""
    pipe, teacher_pipe = FAMILIES[family](), other(FAMILIES[family])
    for one in (pipe, teacher_pipe):
        one.to(torch.bfloat16)
    noise = noise_for(pipe).bfloat16()
    wanted = theirs(pipe, noise, 3, 4.0)
    with attach(pipe, teacher_pipe, sampler="euler", teacher_scale=0.0):
        found = theirs(pipe, noise, 3, 4.0)
        assert found.dtype == torch.bfloat16 and apart(found.float(), wanted.float()) < 0.03
    with attach(pipe, teacher_pipe, **GUIDANCE):
        assert apart(theirs(pipe, noise, 3, 4.0).float(), wanted.float()) > 0.05


def test_a_teacher_in_another_dtype():
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    noise = noise_for(pipe)
    with attach(pipe, teacher_pipe, **GUIDANCE):
        wanted = theirs(pipe, noise, 3, 1.0)
        teacher_pipe.unet.to(torch.bfloat16)
    with attach(pipe, teacher_pipe, **GUIDANCE):
        assert apart(theirs(pipe, noise, 3, 1.0), wanted) < 0.05


def test_a_run_after_one_that_stopped_where_it_begins():
    """Steps of two runs are not taken for one run's: a solver with a memory would mix them."""
    pipe = tiny.sd()
    output, sample = noise_for(pipe), 20.0 * noise_for(pipe, seed=1)
    with attach(pipe, sampler="dpmpp_2m", teacher_scale=0.0) as attached:
        scheduler = attached.scheduler

        def second():
            scheduler.set_timesteps(4)
            scheduler.set_begin_index(1)
            return scheduler.step(output, scheduler.timesteps[1], sample, return_dict=False)[0]

        wanted = second()
        scheduler.set_timesteps(4)
        scheduler.step(-output, scheduler.timesteps[0], sample)
        assert torch.equal(second(), wanted)


# The teacher's negative ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "z_image"])
def test_without_a_negative_the_teacher_has_the_empty_text(family):
    """At guidance 1 a run has none; SDXL's is that of the empty text, not of one left out."""
    pipe, teacher_pipe = FAMILIES[family](), other(FAMILIES[family])
    noise = noise_for(pipe)
    wanted = guided(pipe, teacher_pipe, noise, 3, 1.0, negative=None)
    with attach(pipe, teacher_pipe, **GUIDANCE):
        assert apart(theirs(pipe, noise, 3, 1.0), wanted) < 1e-4


def test_a_negative_of_the_teachers_own():
    """It is heard in the place of the run's; without CFG there is none to hear."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    noise = noise_for(pipe)

    def run(scale=4.0, **settings):
        with attach(pipe, teacher_pipe, **{**GUIDANCE, **settings}):
            return theirs(pipe, noise, 3, scale)

    assert torch.equal(run(negative_prompt=NEGATIVE), run())
    assert apart(run(negative_prompt="green hill"), run()) > 1e-4
    found = run(teacher_cfg_scale=1.0, negative_prompt="green hill")
    assert torch.equal(found, run(teacher_cfg_scale=1.0))


def test_embeddings_and_no_text_encoder():
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    made = pipelines.encode(pipe, PROMPTS, NEGATIVE)
    noise = noise_for(pipe)
    texts = {"prompt_embeds": made["cond"]["encoder_hidden_states"],
             "negative_prompt_embeds": made["uncond"]["encoder_hidden_states"]}  # fmt: skip
    wanted = guided(pipe, teacher_pipe, noise, 3, 4.0)
    pipe.text_encoder = None
    settings = {"num_inference_steps": 3, "latents": noise, "output_type": "latent",
                "height": 16, "width": 24}  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with attach(pipe, teacher_pipe, **GUIDANCE):
        assert apart(pipe(**texts, guidance_scale=4.0, **settings).images, wanted) < 1e-4
        del texts["negative_prompt_embeds"]
        with pytest.raises(ValueError, match=r"^the teacher's CFG needs a negative, this run has"):
            pipe(**texts, guidance_scale=1.0, **settings)


def test_texts_of_other_lengths():
    """Embeddings of more tokens than the negative's: SD pads and masks, FLUX is told its length."""
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    long = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(4))
    settings = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 24}
    pipe.set_progress_bar_config(disable=True)
    noise = noise_for(pipe)
    with attach(pipe, teacher_pipe, **GUIDANCE):
        found = pipe(prompt_embeds=long, guidance_scale=1.0, latents=noise, **settings).images
    *models, extra_args = pipelines.from_pipelines(pipe, teacher_pipe, ["", ""])
    uncond = extra_args["uncond"]["encoder_hidden_states"]
    short = torch.nn.functional.pad(uncond, (0, 0, 0, 24 - uncond.shape[1]))
    mask = torch.arange(24).expand(2, 24) < uncond.shape[1]
    sigmas = pipelines.pipeline_sigmas(pipe, 3, 16, 24)
    x = noise * sigmas[0]
    model = kdpp.TeacherGuidedDenoiser(
        *models, **GUIDANCE,
        renoise_noise_sampler=kdpp.SeededNoise(x, kdpp.row_seeds(0, x), stream=1),
    )  # fmt: skip
    extra_args = {
        "cond": {"encoder_hidden_states": long, "encoder_attention_mask": torch.ones(2, 24) > 0},
        "uncond": {"encoder_hidden_states": short, "encoder_attention_mask": mask},
    }
    wanted = kdpp.sample_euler_tg(model, x, sigmas, extra_args, disable=True)
    assert apart(found, wanted) < 1e-4

    flux = tiny.flux()
    flux.set_progress_bar_config(disable=True)
    settings |= {"max_sequence_length": 8, "height": 16}
    with (
        attach(flux, other(tiny.flux), **GUIDANCE),
        pytest.raises(ValueError, match=r"^the run's prompt has 8 tokens and the teacher's negati"),
    ):
        flux(PROMPTS, **settings)
    with attach(flux, other(tiny.flux), encoding={"max_sequence_length": 8}, **GUIDANCE):
        assert flux(PROMPTS, **settings).images.isfinite().all()


# Refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sampler": "oiler"}, ValueError, r"^unknown solver 'oiler'; did you mean 'euler'\?"),
        ({"sampler": "heun"}, ValueError, r"^heun evaluates more than once a step, and a pipeline "
         r"asks .*; take one of .*dpmpp_2m, .*euler, "),
        ({"sampler": "euler_cfg_pp"}, ValueError, "^euler_cfg_pp needs the unconditional estimate"),
        ({"sampler": "dpm_fast"}, ValueError, "^dpm_fast makes its own levels, and a pipeline"),
        ({"sampler": functools.partial(kdpp.sample_euler_tg, s_churn=1.0)}, ValueError,
         "^euler adds noise before it evaluates, and a pipeline"),
        ({"sampler": functools.partial(kdpp.sample_euler_tg, eta=1.0)}, ValueError,
         "^unknown option of euler 'eta'"),
        ({"teacher_scale": 2.0}, ValueError, r"^teacher_scale"),
        ({"teacher_size": 2.0}, TypeError, "teacher_size"),
        ({"teacher_pipe": tiny.sdxl}, ValueError, "take different texts"),
        ({"teacher_pipe": lambda: tiny.sd(in_channels=3, out_channels=3)}, ValueError,
         "have latents of 4 and 3 channels"),
        ({"teacher_pipe": tiny.sd3}, ValueError,
         r"^of the student .* and the teacher .*, only one is a flow model"),
        ({"encoding": {"nothing": 1}}, TypeError, "encode takes no nothing beside a prompt"),
    ],
)  # fmt: skip
def test_refused_before_any_work(settings, error, message):
    """And the pipeline is as it was."""
    pipe = tiny.sd()
    own = pipe.scheduler
    settings = dict(settings)
    teacher_pipe = settings.pop("teacher_pipe", tiny.sd)()
    with pytest.raises(error, match=message):
        attach(pipe, teacher_pipe, **settings)
    assert pipe.scheduler is own and hooks(pipe) == 0


def test_a_flow_student_with_another_teacher_is_refused():
    with pytest.raises(ValueError, match="only one is a flow model; they must both be"):
        attach(tiny.sd3(), tiny.sd())


@pytest.mark.parametrize(
    "kind", ["PNDMScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"]
)
def test_schedulers_of_more_evaluations_are_refused(kind):
    pipe = tiny.sd(getattr(diffusers, kind)(**tiny.TABLE))
    with pytest.raises(ValueError, match=rf"^{kind} has its network called more than once a step"):
        attach(pipe, tiny.sd(), sampler="euler")


def test_a_scheduler_without_a_solver_of_its_name_asks_for_one():
    pipe = tiny.sd(diffusers.DEISMultistepScheduler(**tiny.TABLE))
    with pytest.raises(
        ValueError, match=r"^none of kdpp's solvers is that of DEISMultistep.*euler"
    ):
        attach(pipe, tiny.sd())
    noise = noise_for(pipe)
    with attach(pipe, tiny.sd(), sampler="euler", teacher_scale=0.0):
        assert theirs(pipe, noise, 2, 1.0).isfinite().all()


def test_attached_twice():
    pipe = tiny.sd()
    with attach(pipe, tiny.sd()), pytest.raises(ValueError, match=r"already; detach it first$"):
        attach(pipe, tiny.sd())


def test_fewer_steps_than_the_teachers():
    pipe, teacher_pipe = tiny.sd(), other(tiny.sd)
    noise = noise_for(pipe)
    with attach(pipe, teacher_pipe, teacher_steps=3):
        with pytest.raises(ValueError, match=r"^teacher_steps is 3, and this run has 2 steps; att"):
            theirs(pipe, noise, 2, 4.0)
        assert theirs(pipe, noise, 3, 4.0).isfinite().all()


def test_a_network_in_the_place_of_the_one_attached():
    pipe = tiny.flux()
    noise = noise_for(pipe)
    attach(pipe, other(tiny.flux), **GUIDANCE)
    pipe.transformer = tiny.flux().transformer
    with pytest.raises(ValueError, match=r"^the pipeline's network was not called .*attach anew$"):
        theirs(pipe, noise, 2, 4.0)
