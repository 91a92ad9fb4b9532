"""The extension for web UIs, in `webui_double`; docs/webui.md says what ran in the real ones."""

import importlib
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

import kdpp
import webui_double as webui
from kdpp.hosts import webui as package
from kdpp.hosts.webui import convention, settings
from kdpp.hosts.webui.settings import FIELDS, SAME, Settings
from kdpp.standin import CompVisDenoiser
from problems import relative

ON = Settings(enabled=True, teacher="teacher.safetensors", teacher_steps=2, teacher_scale=0.5,
              teacher_cfg=4.0)  # fmt: skip
FAST, STYLE = 0.3, -0.2
LORA_PROMPT = "a cat <lora:fast:1>"
TOLD_BY_WEIGHTS = (
    "scaled.safetensors",
    "flow.safetensors",
    "edit.safetensors",
    "broken.safetensors",
)
MODULES = ("a1111", "common", "panel")


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The double in the place of A1111, with a student, a teacher and two LoRAs; afterwards nothing
    of it is left."""
    made = webui.A1111(tmp_path)
    made.checkpoint("student.safetensors", 0.0)
    made.checkpoint("teacher.safetensors", 0.5)
    made.checkpoint("xl.safetensors", 0.1, context=2048)
    made.checkpoint("scaled.safetensors", 0.1, scale_factor=0.13025)
    made.checkpoint("flow.safetensors", 0.1, is_sd3=True)
    made.checkpoint("edit.safetensors", 0.1, cond_stage_key="edit")
    made.checkpoint("broken.safetensors", 0.1, broken=True)
    made.lora("fast", FAST)
    made.lora("style", STYLE)
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield made
    convention.FOUND.clear()
    for name in MODULES:
        sys.modules.pop(f"kdpp.hosts.webui.{name}", None)
        vars(package).pop(name, None)


@pytest.fixture
def script(host):
    """The panel's script, begun as the host begins it."""
    panel = importlib.import_module("kdpp.hosts.webui.panel")
    panel.begin()
    return panel.TeacherScript()


def picture(host, script, asked=ON, **given):
    """Latents; AssertionError where a hook failed."""
    made = webui.Processing(host, **given).draw(script, asked)
    assert host.reported == []
    return made


def by_hand(host, p, asked=ON, student=0.0, teacher=0.5, solver="euler"):
    """The same by kdpp's own CFG, on networks whose LoRAs are merged into their weights."""
    bare = SimpleNamespace(loras=SimpleNamespace(loaded_networks=[]))

    def texts(prompts, shift):
        rows = webui.Network(bare, None, shift).get_learned_conditioning(prompts)
        return rows - shift

    def denoiser(shift):
        inner = CompVisDenoiser(webui.Network(bare, None, shift))

        def denoise(x, sigma, cond):
            given = {"c_crossattn": [cond], "c_concat": [x]}
            return inner(x, sigma, cond=given)

        return denoise

    negative = [asked.teacher_negative] * len(p.seeds) if asked.teacher_negative else None
    prompts = [webui.parse_prompt(text)[0] for text in p.texts]
    merged = {"cond": texts(prompts, 0) + student, "uncond": texts(p.negative_prompts, 0) + student}
    own = {
        "cond": texts(prompts, 0) + teacher,
        "uncond": texts(negative or p.negative_prompts, 0) + teacher,
    }
    rng = webui.Generators(p.seeds, p.shape)
    x = rng() * p.sigmas[0]
    noise = {"noise_sampler": lambda *_: rng()} if kdpp.SOLVERS[solver].noise == "plain" else {}
    model = kdpp.TeacherGuidedDenoiser(
        denoiser(student),
        kdpp.Teacher(
            denoiser(teacher), asked.teacher_scale, asked.teacher_steps, asked.teacher_cfg,
            asked.renoise, extra_args=own,
        ),
        renoise_noise_sampler=kdpp.SeededNoise(x, p.seeds, 1),
    )  # fmt: skip
    return kdpp.sample(
        solver, model, x, p.sigmas, {**merged, "cond_scale": p.cfg_scale}, disable=True, **noise
    )


# ------------------------------------------------------------------------------- a guided run


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "KDPP euler_cfg_pp"])
@pytest.mark.parametrize(
    ("prompt", "changes", "student", "teacher"),
    [
        ("a cat", {}, 0.0, 0.5),
        (LORA_PROMPT, {}, FAST, 0.5),
        (LORA_PROMPT, {"teacher": SAME}, FAST, 0.0),
        (LORA_PROMPT, {"teacher": "student.safetensors"}, FAST, 0.0),
        ("a cat", {"teacher_lora": "<lora:style:0.5>"}, 0.0, 0.5 + STYLE / 2),
        (LORA_PROMPT, {"teacher": SAME, "teacher_lora": "<lora:fast:0.5>"}, FAST, FAST / 2),
        ("a cat", {"teacher_negative": "ugly", "renoise": "current"}, 0.0, 0.5),
    ],
)
def test_the_picture_is_kdpps_own(host, script, sampler, prompt, changes, student, teacher):
    """A second checkpoint, a base under its LoRA, LoRAs of the teacher's own."""
    asked = ON._replace(**changes)
    p = webui.Processing(host, sampler, prompts=[prompt] * 2, seeds=[1, 2])
    found = p.draw(script, asked)
    assert host.reported == []
    solver = {"Euler": "euler", "Euler a": "euler_ancestral"}.get(sampler, sampler[5:])
    assert relative(found, by_hand(host, p, asked, student, teacher, solver)) < 1e-6


def test_the_teacher_is_asked_with_the_prompt_of_the_students_step(host, script, monkeypatch):
    """The student has been asked before it, and its step is counted."""
    parser = sys.modules["modules.prompt_parser"]
    asked = []

    def hear(conds, step, of=parser.reconstruct_multicond_batch):
        asked.append(step)
        return of(conds, step)

    monkeypatch.setattr(parser, "reconstruct_multicond_batch", hear)
    first = picture(host, script, prompts=["a cat"])
    assert asked == [0, 1]
    assert not torch.equal(picture(host, script, prompts=["a cat|a dog AND red:0.5"]), first)


@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
@pytest.mark.parametrize("changes", [{"teacher_scale": 0.0}, {"teacher_steps": 0}])
def test_without_a_share_it_is_the_hosts_own_sampler(host, script, sampler, changes):
    """And no teacher is loaded."""
    expected = picture(host, None, sampler=sampler, prompts=["a|b AND c:0.3"])
    found = picture(
        host, script, ON._replace(**changes), sampler=sampler, prompts=["a|b AND c:0.3"]
    )
    assert relative(found, expected) < 1e-12
    assert len(host.loaded_callbacks) == 1  # the student's


def test_off_it_touches_nothing(host, script):
    """Neither the picture, nor the sampler, nor torch's stream."""
    p = webui.Processing(host, "Euler a", prompts=["a cat"])
    state = torch.get_rng_state()
    found = p.draw(script, ON._replace(enabled=False))
    assert p.sampler.func is host.k_diffusion.sampling.sample_euler_ancestral
    assert torch.equal(torch.get_rng_state(), state) and p.extra_generation_params == {}
    assert torch.equal(found, picture(host, None, sampler="Euler a", prompts=["a cat"]))


def test_a_guided_run_does_not_move_torchs_stream(host, script):
    """The teacher's file is loaded in it."""
    state = torch.get_rng_state()
    picture(host, script)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "KDPP er_sde", "KDPP dpmpp_3m_sde_o3"])
@pytest.mark.parametrize("teacher", ["teacher.safetensors", SAME])
def test_a_batch_is_its_single_pictures(host, script, sampler, teacher):
    asked = ON._replace(teacher=teacher)
    prompts = [LORA_PROMPT, "a dog <lora:fast:1>"]
    batch = picture(host, script, asked, sampler=sampler, prompts=prompts, seeds=[3, 4])
    for i, seed in enumerate([3, 4]):
        one = picture(
            host, script, asked, sampler=sampler, prompts=prompts[i : i + 1], seeds=[seed]
        )
        assert relative(batch[i:i + 1], one) < 1e-12  # fmt: skip


def test_the_host_gives_what_it_gives_its_own(host, script):
    """It looks at the parameters' names: the guided form has the stock one's."""
    p = webui.Processing(host, "Euler", prompts=["a cat"])
    p.s_noise = 0.5
    p.draw(script, ON)
    own = host.k_diffusion.sampling.sample_euler
    assert inspect.signature(p.sampler.func) == inspect.signature(own)


def test_calls_that_count_are_the_students(host, script):
    """``step`` tells which prompt is due and when the run ends."""
    p = webui.Processing(host, prompts=["a cat"])
    p.draw(script, ON)
    assert p.sampler.model_wrap_cfg.step == 4


def test_what_is_outside_the_mask_stays(host, script):
    p = webui.Processing(host, "Euler a", prompts=["a cat"])
    mask = torch.zeros(1, *p.shape)
    mask[..., :2] = 1
    alone, helped = webui.Processing(host, "Euler a", prompts=["a cat"]), p
    for one in (alone, helped):
        one.mask, one.nmask, one.init_latent = mask, 1 - mask, torch.full(p.shape, 0.7)
        one.init_latent = one.init_latent[None]
    told = []
    helped.callback = told.append
    first, second = alone.draw(), helped.draw(script, ON)
    assert torch.equal(first[..., :2], second[..., :2])
    assert not torch.equal(first[..., 2:], second[..., 2:])
    assert torch.equal(told[0]["denoised_teacher"][..., :2], p.init_latent[..., :2].double())


def test_hires_is_guided_where_it_is_asked_for(host, script):
    """The second pass makes a sampler of its own."""
    p = webui.Processing(host, prompts=["a cat"])
    p.draw(script, ON._replace(hires=False))
    assert hasattr(p.sampler.func, "stock")
    for hires in (False, True):
        p.is_hr_pass, p.hr_prompts, p.hr_negative_prompts = True, ["a cat"], ["bad"]
        p.hr_upscale_to_x = p.hr_upscale_to_y = 64
        p.hr_second_pass_steps, p.firstpass_steps = 0, 4
        p.draw(script, ON._replace(hires=hires))
        assert hasattr(p.sampler.func, "stock") == hires


def test_a_sampler_object_that_serves_two_batches(host, script):
    """Image to image has one for all; its function is found guided already."""
    p = webui.Processing(host, prompts=["a cat"])
    first = p.draw(script, ON)
    config = p.sampler.config
    kept = p.sampler
    host.sd_samplers.all_samplers_map["Euler"] = config._replace(constructor=lambda model: kept)
    assert torch.equal(p.draw(script, ON), first)
    assert p.sampler.func.stock is host.k_diffusion.sampling.sample_euler


# ------------------------------------------------------------------ nothing is left behind


def held(host):
    """What the host has of one kind, for comparison."""
    return (
        host.data.sd_model, [*host.data.loaded_sd_models], host.hijack.clip, host.hijack.layers,
        host.sd_vae.checkpoint_info, dict(host.opts.data), host.active().device,
        [*host.loras.loaded_networks],
    )  # fmt: skip


def test_the_active_model_stays_active(host, script):
    """Loading the teacher throws nothing away, and what the host keeps of a model is put back."""
    before = held(host)
    picture(host, script)
    assert held(host) == before
    teacher = convention.here().held
    assert teacher.shift == 0.5 and teacher.device == "cpu" and teacher.first_stage_model is None
    assert host.loaded_callbacks == [host.active(), teacher, host.active()]
    picture(host, script)
    assert convention.here().held is teacher  # not loaded twice


@pytest.mark.parametrize("after", ["off", "another", "its own"])
def test_a_teacher_that_is_not_wanted_is_let_go(host, script, after):
    picture(host, script)
    teacher = convention.here().held
    changes = {"off": {"enabled": False}, "another": {"teacher": "third.safetensors"},
               "its own": {"teacher": SAME}}  # fmt: skip
    host.checkpoint("third.safetensors", 0.7)
    sys.modules["modules.sd_models"].checkpoint_aliases["third.safetensors"] = host.checkpoints[
        "third.safetensors"
    ][0]
    picture(host, script, ON._replace(**changes[after]))
    assert teacher.device == "meta"


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), webui.InterruptedException()])
@pytest.mark.parametrize("teacher", ["teacher.safetensors", SAME])
def test_what_ends_a_run_leaves_the_host_as_it_was(host, script, error, teacher):
    """In the teacher's call: the prompt's LoRAs are back, the teacher is let go, and the next
    picture is a clean one."""
    asked = ON._replace(teacher=teacher)
    expected = picture(host, script, asked, prompts=[LORA_PROMPT])
    before = held(host)
    network = convention.here().held or host.active()
    network.interrupt, calls = None, network.asked

    def fail(x, t, cond, of=network.apply_model):
        if network is not host.active() or network.asked > calls:
            raise error
        return of(x, t, cond)

    network.apply_model = fail
    p = webui.Processing(host, prompts=[LORA_PROMPT])
    if isinstance(error, Exception):
        with pytest.raises(RuntimeError, match="out of memory"):
            p.draw(script, asked)
    else:
        p.draw(script, asked)
    del network.apply_model
    assert [one.name for one in host.loras.loaded_networks] == ["fast"]
    assert held(host)[:-1] == before[:-1]
    assert convention.here().held is None
    assert network is host.active() or network.device == "meta"
    assert torch.equal(picture(host, script, asked, prompts=[LORA_PROMPT]), expected)


def test_an_interrupt_is_seen_in_the_teachers_call(host, script):
    """The host tells it by its state."""
    picture(host, script)
    teacher = convention.here().held
    network = host.active()

    def hear(x, t, cond, of=network.apply_model):
        host.shared.state.interrupted = True
        return of(x, t, cond)

    network.apply_model = hear
    before = teacher.asked
    picture(host, script)
    assert teacher.asked == before and convention.here().held is None


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "sampler", "message"),
    [
        ({"teacher": "xl.safetensors"}, "Euler", "the student is SD 1.x and the teacher SDXL"),
        ({"teacher": "scaled.safetensors"}, "Euler", "scaled by 0.18215, and the teacher's of 4"),
        ({"teacher": "flow.safetensors"}, "Euler", "not a flow model and the teacher is a flow"),
        ({"teacher": "edit.safetensors"}, "Euler", "needs the picture that it edits"),
        ({"teacher": "broken.safetensors"}, "Euler", "size mismatch"),
        ({"teacher": "none.safetensors"}, "Euler", "there is no checkpoint 'none.safetensors'"),
        ({"teacher_lora": "<lora:none:1>"}, "Euler", "there is no LoRA 'none'"),
        ({"teacher_lora": "fast"}, "Euler", "it must be tags such as <lora:name:1>"),
        ({"teacher_lora": "<hypernet:fast:1>"}, "Euler", "it must be tags such as <lora:name:1>"),
        ({"teacher_lora": "<lora:fast:much>"}, "Euler", "a weight must be a number"),
        ({"teacher_scale": 1.5}, "Euler", r"teacher_scale is 1.5; it must be a number in \[0, 1\]"),
        ({"teacher_steps": -1}, "Euler", "teacher_steps is -1"),
        ({"teacher_cfg": "much"}, "Euler", "Teacher CFG is 'much'; it must be a number"),
        ({"renoise": "later"}, "Euler", "must be one of next, current, random"),
        ({}, "DDIM", "the sampler DDIM has no guided form"),
        ({}, "Restart", "the sampler Restart has no guided form"),
    ],
)
def test_bad_input_ends_as_a_pictures_error(host, script, changes, sampler, message):
    """Not as one of a hook, which the host only logs; and the host is as it was."""
    before = held(host)
    p = webui.Processing(host, prompts=["a cat"])
    if sampler != "Euler":
        p.sampler_name = sampler
        host.sd_samplers.all_samplers_map["DDIM"] = host.sd_samplers.all_samplers_map[
            "DDIM"
        ]._replace(constructor=timesteps(host))
    with pytest.raises((ValueError, RuntimeError), match=message):
        p.draw(script, ON._replace(**changes))
    assert host.reported == [] and held(host) == before and convention.here().held is None
    if changes.get("teacher") not in TOLD_BY_WEIGHTS:
        assert host.loaded_callbacks == [host.active()]  # nothing was loaded for it
    assert torch.equal(picture(host, None), picture(host, script, ON._replace(enabled=False)))


def timesteps(host):
    """A sampler over timesteps, of another class."""

    class Timesteps(webui.KDiffusionSampler):
        pass

    Timesteps.host = host
    return lambda model: Timesteps(webui.ddim, model)


def test_a_file_that_disappeared(host, script):
    """Also one whose model is still held."""
    picture(host, script)
    (host.folder / "teacher.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="the teacher's checkpoint: there is no file"):
        webui.Processing(host, prompts=["a cat"]).draw(script, ON)
    assert convention.here().held is None


def test_a_teacher_that_is_no_safetensors_file(host, script):
    (host.folder / "teacher.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"teacher's checkpoint: .*pickle"):
        webui.Processing(host, prompts=["a cat"]).draw(script, ON)


def test_a_lora_that_is_no_safetensors_file(host, script):
    host.loras.available_network_aliases["fast"].filename = str(host.folder / "fast.pt")
    (host.folder / "fast.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="LoRA 'fast' is not a safetensors file"):
        webui.Processing(host).draw(script, ON._replace(teacher_lora="<lora:fast:1>"))


def test_without_the_hosts_lora_extension(host, script, monkeypatch):
    """A teacher without LoRAs is all that there is."""
    monkeypatch.delitem(sys.modules, "networks")
    picture(host, script, prompts=["a cat"])
    with pytest.raises(ValueError, match="need the host's extension Lora, which is off"):
        webui.Processing(host).draw(script, ON._replace(teacher_lora="<lora:fast:1>"))


@pytest.mark.parametrize("sampler", ["Euler", "KDPP er_sde"])
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_a_flow_model_as_the_student(host, script, sampler, scale):
    """The host runs the formulas of σ on its τ."""
    host.active().is_sd3 = True
    with pytest.raises(ValueError, match="in A1111 SD3 has no guided form"):
        webui.Processing(host, sampler).draw(script, ON._replace(teacher=SAME, teacher_scale=scale))


def test_cfg_pp_needs_the_negative_estimate(host, script):
    """The host leaves it out by two of its settings."""
    host.opts.skip_early_cond = 0.2
    p = webui.Processing(host, "KDPP euler_cfg_pp", prompts=["a cat"])
    for asked in (ON, ON._replace(enabled=False)):
        with pytest.raises(ValueError, match=r"CFG\+\+ needs the negative prompt's estimate"):
            p.draw(script, asked)


def test_a_unet_that_answers_for_every_model(host, script):
    host.sd_unet.current_unet = object()
    with pytest.raises(ValueError, match="SD Unet"):
        webui.Processing(host, prompts=["a cat"]).draw(script, ON)


# ----------------------------------------------------------------------- samplers of kdpp's own


def test_names_of_kdpps_samplers_are_found(host, script):
    """The host splits what ends in a scheduler's label, and takes its first for what it does not
    know."""
    names = [one.name for one in host.sd_samplers.all_samplers if one.name.startswith("KDPP")]
    assert len(names) > 15 and "KDPP euler" not in names and "KDPP res_multistep" in names
    assert all(convention.here().knows(name) for name in names) and host.reported == []
    for end in host.callbacks["unloaded"]:
        end()
    left = [one.name for one in host.sd_samplers.all_samplers]
    assert left == ["Euler", "Euler a", "Restart", "DDIM"] == [*host.sd_samplers.all_samplers_map]


def test_a_failed_registration_is_seen(host):
    """In the log and in the panel: the host would draw with another sampler in silence."""
    host.sd_samplers.schedulers.append("sa_solver")
    panel = importlib.import_module("kdpp.hosts.webui.panel")
    panel.begin()
    assert host.reported == ["kdpp: A1111 does not find these samplers: KDPP sa_solver"]
    assert "A1111 did not take these samplers: KDPP sa_solver." in panel.said(convention.here())


def test_a_name_that_was_asked_for_too_early_is_found(host):
    """The host remembers what it did not know."""
    host.sd_samplers.get_sampler_and_scheduler("KDPP er_sde", None)
    importlib.import_module("kdpp.hosts.webui.panel").begin()
    assert host.sd_samplers.get_sampler_and_scheduler("KDPP er_sde", None)[0] == "KDPP er_sde"


def test_begun_twice_there_is_one_of_each(host, script):
    """The host reads its scripts anew when its page is reloaded."""
    importlib.import_module("kdpp.hosts.webui.panel").begin()
    names = [one.name for one in host.sd_samplers.all_samplers]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("solver", ["euler_cfg_pp", "res_multistep", "er_sde", "dpmpp_3m_sde_o3"])
def test_kdpps_own_samplers_without_a_teacher(host, script, solver):
    p = webui.Processing(host, f"KDPP {solver}", prompts=["a cat"] * 2, seeds=[1, 2])
    found = p.draw(script, ON._replace(enabled=False))
    if kdpp.SOLVERS[solver].noise == "brownian":
        assert found.isfinite().all()
    else:
        alone = ON._replace(teacher_steps=0)
        assert relative(found, by_hand(host, p, alone, solver=solver)) < 1e-6


# ---------------------------------------------------------------------------------- the panel


def test_the_panels_order_is_the_apis(host, script):
    components = script.ui(is_img2img=False)
    assert [one.value for one in components] == [*Settings()]
    assert len(script.infotext_fields) == len(components)


@pytest.mark.parametrize("hires", [True, False])
def test_infotext_there_and_back(host, script, hires):
    """What the host writes, pasted as the host does, is what was asked."""
    asked = Settings(True, "teacher.safetensors", "<lora:style:0.5>", 3, 0.25, 2.5, "bad, \"x\"",
                     "current", hires)  # fmt: skip
    p = webui.Processing(host, prompts=["a cat"])
    p.draw(script, asked)
    written = {key: str(value) for key, value in p.extra_generation_params.items()}
    script.ui(is_img2img=False)
    found = []
    for component, key in script.infotext_fields:
        value = key(written)["value"] if callable(key) else written.get(key, component.value)
        found.append(type(component.value)(value))
    assert Settings(*found) == asked
    off = [key({})["value"] for _, key in script.infotext_fields if callable(key)]
    assert off == [False, False]


def test_axes_of_the_xyz_plot(host, script):
    """One for each setting; their values take the panel's place."""

    class AxisOption:
        def __init__(self, label, kind, apply, cost=0.0, choices=None):
            self.label, self.kind, self.apply, self.choices = label, kind, apply, choices

    plot = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    sys.modules["modules.scripts"].scripts_data += [SimpleNamespace(module=plot), object()]
    panel = importlib.import_module("kdpp.hosts.webui.panel")
    panel.begin()  # a host without a page does no more
    assert len(plot.axis_options) == 1 + len(FIELDS)
    for add in host.callbacks["before_ui"]:
        add()
    axes = {one.label: one for one in plot.axis_options}
    assert len(axes) == len(plot.axis_options) == 1 + len(FIELDS)
    p = webui.Processing(host, prompts=["a cat"])
    for label, text in (("λ", "0.25"), ("Teacher", "true"), ("Guided steps", "3"),
                        ("Teacher checkpoint", SAME), ("Renoise", "random")):  # fmt: skip
        axis = axes[f"[kdpp] {label}"]
        assert axis.choices is None or text in axis.choices()
        axis.apply(p, axis.kind(text), [])
    found = settings.read(p, Settings())
    assert found == Settings(True, SAME, teacher_scale=0.25, teacher_steps=3, renoise="random")


def test_too_few_arguments_are_the_defaults():
    """As an API's request may have them."""
    assert settings.read(SimpleNamespace(), [True]) == Settings(enabled=True)
