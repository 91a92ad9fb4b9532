"""The web UI extension in doubles of Forge and Forge Neo; docs/webui.md says what ran in the real
ones."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

import forge_double as double
import kdpp
import webui_double as webui
from kdpp.hosts import webui as package
from kdpp.hosts.webui import convention
from kdpp.hosts.webui.settings import SAME, Settings
from problems import relative

ON = Settings(enabled=True, teacher="teacher.safetensors", teacher_steps=2, teacher_scale=0.5,
              teacher_cfg=4.0)  # fmt: skip
FAST, STYLE = 0.3, -0.2
LORA_PROMPT = "a cat <lora:fast:1>"
CALLS = 5  # changes of place of a run with two guided steps: the first, and two for each of them


@pytest.fixture(params=[double.Forge, double.Neo])
def host(request, tmp_path, monkeypatch):
    """A double in the host's place, with a student, teachers and two LoRAs; afterwards nothing of
    it is left."""
    made = request.param(tmp_path)
    made.checkpoint("student.safetensors", 0.0)
    made.checkpoint("teacher.safetensors", 0.5)
    made.checkpoint("xl.safetensors", 0.1, context=2048)
    made.checkpoint("latents.safetensors", 0.1, latents=double.SDXL)
    made.checkpoint("flow.safetensors", 0.1, flow=True)
    made.checkpoint("inpaint.safetensors", 0.1, inpaint=True)
    made.checkpoint("broken.safetensors", 0.1, broken=True)
    made.lora("fast", FAST)
    made.lora("style", STYLE)
    made.read.clear()
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(convention, "find_spec", sys.modules.get)
    yield made
    convention.FOUND.clear()
    for name in ("common", "forge", "neo", "panel"):
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
    made = double.Processing(host, **given).draw(script, asked)
    assert host.reported == []
    return made


def by_hand(p, asked=ON, student=0.0, teacher=0.5, solver="euler"):
    """The same by kdpp's own CFG, on networks whose LoRAs are merged into their weights."""
    bare = SimpleNamespace(loras=SimpleNamespace(loaded_networks=[]))
    texts = webui.Network(bare, None, 0.0).get_learned_conditioning

    def denoiser(shift):
        network = double.Network(shift)
        return lambda x, sigma, cond: network.apply_model(x, sigma, cond)

    prompts = [webui.parse_prompt(text)[0] for text in p.texts]
    negative = [asked.teacher_negative] * len(p.seeds) if asked.teacher_negative else None
    merged = {"cond": texts(prompts) + student, "uncond": texts(p.negative_prompts) + student}
    own = {
        "cond": texts(prompts) + teacher,
        "uncond": texts(negative or p.negative_prompts) + teacher,
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
    scale = p.hr_cfg if p.is_hr_pass else p.cfg_scale
    return kdpp.sample(
        solver, model, x, p.sigmas, {**merged, "cond_scale": scale}, disable=True, **noise
    )


# ------------------------------------------------------------------------------- a guided run


def test_the_host_is_told(host, script):
    title = {double.Forge: "Forge", double.Neo: "Forge Neo"}[type(host)]
    assert convention.here().title == title
    assert convention.which() == title


def test_a_web_ui_that_kdpp_does_not_know_is_told_so(monkeypatch):
    """reForge has modules_forge, but not Forge's backend."""
    monkeypatch.setattr(convention, "find_spec", {"modules_forge": True}.get)
    with pytest.raises(ImportError, match="does not know this web UI; it runs in A1111, Forge, "):
        convention.which()


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "KDPP euler_ancestral_cfg_pp"])
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
    p = double.Processing(host, sampler, prompts=[prompt] * 2, seeds=[1, 2])
    found = p.draw(script, asked)
    assert host.reported == []
    solver = {"Euler": "euler", "Euler a": "euler_ancestral"}.get(sampler, sampler[5:])
    assert relative(found, by_hand(p, asked, student, teacher, solver)) < 1e-6


def test_the_teacher_is_asked_with_the_prompt_of_the_students_step(host, script, monkeypatch):
    """The student has been asked before it, and its step is counted."""
    parser = sys.modules["modules.prompt_parser"]
    asked = []

    def hear(conds, step, of=parser.reconstruct_multicond_batch):
        asked.append(step)
        return of(conds, step)

    monkeypatch.setattr(parser, "reconstruct_multicond_batch", hear)
    first = picture(host, script, prompts=["a cat"])
    assert asked == [0, 1]  # the student's own calls go elsewhere
    assert not torch.equal(picture(host, script, prompts=["a cat|a dog AND red:0.5"]), first)


def test_hires_guides_once_though_its_hook_is_called_twice(host, script):
    p = double.Processing(host)
    p.is_hr_pass, p.hr_prompts, p.hr_negative_prompts = True, ["a cat"], ["bad"]
    p.hr_upscale_to_x = p.hr_upscale_to_y = 32
    p.hr_distilled_cfg, p.hr_second_pass_steps, p.firstpass_steps = 3.5, 4, 4
    found = p.draw(script, ON._replace(hires=True))
    assert host.reported == []
    assert host.read == ["teacher.safetensors"]
    assert relative(found, by_hand(p)) < 1e-6


def test_a_batch_is_its_single_pictures(host, script):
    both = picture(host, script, sampler="Euler a", prompts=["a cat"] * 2, seeds=[3, 4])
    for row, seed in enumerate([3, 4]):
        alone = picture(host, script, sampler="Euler a", seeds=[seed])
        assert torch.equal(both[row : row + 1], alone)


@pytest.mark.parametrize("sampler", ["Euler", "Euler a"])
@pytest.mark.parametrize("masked", [False, True])
def test_without_help_it_is_the_hosts_picture(host, script, sampler, masked):
    """λ = 0, and switched off; the host draws from torch's stream inside a mask."""

    def drawn(asked):
        p = double.Processing(host, sampler)
        if masked:
            p.init_latent = torch.ones(1, *p.shape, dtype=torch.float64)
            p.mask = torch.zeros(p.shape, dtype=torch.float64)
            p.mask[..., :2] = 1.0
            p.nmask = 1.0 - p.mask
        torch.manual_seed(0)
        made = p.draw(script if asked else None, asked or ())
        assert host.reported == []
        return made

    stock = drawn(None)
    assert relative(drawn(ON._replace(teacher_scale=0.0)), stock) < 1e-6
    assert torch.equal(drawn(Settings()), stock)
    assert host.read == []
    helped = drawn(ON._replace(teacher_steps=4, renoise="current"))
    assert relative(helped, stock) > 1e-3
    if masked:  # the teacher stays inside, in the last step, too
        assert relative(helped[..., :2], torch.ones(1, 4, 4, 2, dtype=torch.float64)) < 1e-12


def test_at_cfg_1_the_teacher_has_its_own_negative(host, script):
    """The host works out none for the student there."""

    class Plain(double.Processing):
        cfg_scale = 1

    p = Plain(host)
    found = p.draw(script, ON)
    assert host.reported == [] and p.uc is None
    assert relative(found, by_hand(p)) < 1e-6
    with pytest.raises(ValueError, match="unconditional estimate"):
        Plain(host, "KDPP res_multistep_cfg_pp").draw(script, ON)


def test_of_a_host_that_guides_cfg_pp_nothing_stays(host, script):
    picture(host, script, sampler="KDPP res_multistep_cfg_pp")
    unet = host.engine.forge_objects.unet
    assert unet.model_options == {"transformer_options": {}}


# ------------------------------------------------------------------------ weights and memory


def test_the_networks_change_places_in_guided_steps_alone(host, script):
    picture(host, script, prompts=[LORA_PROMPT], asked=ON._replace(teacher=SAME))
    student = host.engine.forge_objects.unet
    swaps = [one for one in host.swaps if one.model is student.model]
    assert len(swaps) == CALLS and swaps[-1] is student
    assert student.model.loras == ((FAST, 1.0),)


def test_a_teacher_is_loaded_once_and_let_go_when_it_is_switched_off(host, script):
    state = torch.get_rng_state()
    picture(host, script)
    picture(host, script)
    held = convention.here().held
    assert host.read == ["teacher.safetensors"]
    assert torch.equal(torch.get_rng_state(), state)
    assert held.forge_objects.vae is None and held.forge_objects_original.vae is None
    assert host.engine.forge_objects.vae is not None
    picture(host, script, asked=Settings())
    assert convention.here().held is None
    both = {held.forge_objects.unet.model, held.forge_objects.clip.patcher.model}
    assert {one.model for one in host.unloaded} == both
    assert not both & {one.model.model for one in host.current_loaded_models}


def test_the_host_hears_nothing_of_the_teacher(host, script):
    """What its text encoders tell infotext, and what its loader keeps of the active model."""
    if isinstance(host, double.Neo):
        host.dynamic_args.ref_latents = ["of the run"]
    picture(host, script)
    assert host.told == {}
    if isinstance(host, double.Neo):
        assert host.dynamic_args.ref_latents == ["of the run"]
        assert host.dynamic_args.loading_refiner is False
        host.checkpoint("kontext.safetensors", 0.2)
        names = sys.modules["modules.sd_models"].checkpoint_aliases
        names["kontext.safetensors"] = host.checkpoints["kontext.safetensors"][0]
        picture(host, script, asked=ON._replace(teacher="kontext.safetensors"))
        assert host.dynamic_args.kontext is False


@pytest.mark.parametrize("teacher", ["teacher.safetensors", SAME])
def test_an_interrupt_in_the_teachers_call_leaves_all_as_it_was(host, script, teacher):
    asked = ON._replace(teacher=teacher)
    first = picture(host, script, asked, prompts=[LORA_PROMPT])
    Asked = importlib.import_module("kdpp.hosts.webui.forge").Asked
    ask, state = Asked.__call__, host.shared.state

    def interrupted(*args, **given):
        state.interrupted = True
        ask(*args, **given)
        raise AssertionError("the teacher has answered")

    Asked.__call__ = interrupted
    stopped = picture(host, script, asked, prompts=[LORA_PROMPT])
    Asked.__call__, state.interrupted = ask, False
    assert relative(stopped, first) > 1e-3
    assert convention.here().held is None
    assert host.engine.forge_objects.unet.model.loras == ((FAST, 1.0),)
    assert torch.equal(picture(host, script, asked, prompts=[LORA_PROMPT]), first)


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("changes", "words", "read"),
    [
        ({"teacher": "gone.safetensors"}, "no checkpoint 'gone.safetensors'", []),
        ({"teacher": "xl.safetensors"}, "latents differ", []),
        ({"teacher": "latents.safetensors"}, "latents are SD15", ["latents.safetensors"]),
        ({"teacher": "flow.safetensors"}, "the teacher is a flow model", ["flow.safetensors"]),
        ({"teacher": "inpaint.safetensors"}, "masked picture", ["inpaint.safetensors"]),
        ({"teacher": "broken.safetensors"}, "Failed to recognize", ["broken.safetensors"]),
        ({"teacher_lora": "<lora:gone:1>"}, "no LoRA 'gone'", []),
        ({"teacher_lora": "a house"}, "must be tags", []),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_stays(host, script, changes, words, read):
    before = picture(host, script, Settings())
    with pytest.raises(ValueError, match=words):
        double.Processing(host).draw(script, ON._replace(**changes))
    assert host.read == read
    assert convention.here().held is None
    assert torch.equal(picture(host, script, Settings()), before)


def test_samplers_of_another_formula_are_refused(host, script):
    """Forge's IPNDM and Neo's UniPC are not kdpp's, which are offered beside them."""
    name, _ = host.other
    for sampler in (name, "Restart"):
        with pytest.raises(ValueError, match=f"{sampler} has no guided form"):
            double.Processing(host, sampler).draw(script, ON)
    p = double.Processing(host)
    p.sampler = host.sd_samplers.all_samplers_map["DDIM"].constructor(host.engine)
    assert convention.here().solver(p) is None
    assert f"KDPP {name.lower()}" in host.sd_samplers.all_samplers_map
    assert host.read == []


def test_kdpps_own_samplers_are_those_that_the_host_has_not(host, script):
    names = host.sd_samplers.all_samplers_map
    assert "KDPP er_sde" in names and "KDPP euler" not in names
    assert ("KDPP euler_cfg_pp" in names) == (type(host) is double.Forge)


@pytest.mark.parametrize(
    ("predictor", "found"),
    [
        (double.PredictionFlux(), ("euler_ancestral_rf", {})),
        (double.Predictor(flow=True), None),
        (double.Predictor(), ("euler_ancestral", {})),
    ],
)
def test_a_flow_models_sampler_is_the_hosts_formula_for_it(host, script, predictor, found):
    """Forge's Euler a is the rectified flow's form for FLUX, and for other flow models wrong."""
    host.engine.forge_objects.unet.model.predictor = predictor
    p = double.Processing(host, "Euler a")
    p.sampler = host.sd_samplers.all_samplers_map["Euler a"].constructor(host.engine)
    if isinstance(host, double.Neo) and predictor.prediction_type == "const":
        found = None
    made = convention.here().solver(p)
    assert (made and (made[0].name, dict(made[1]))) == found
    p.sampler = host.sd_samplers.all_samplers_map["Euler"].constructor(host.engine)
    assert convention.here().solver(p) == (kdpp.SOLVERS["euler"], {})


def test_neos_own_forms_have_kdpps_name_for_them(host, script):
    def sample_dpmpp_2m_cfg_pp(model, x, sigmas):
        return x

    p = double.Processing(host)
    p.sampler = host.sampler_class(sample_dpmpp_2m_cfg_pp, host.engine)
    found, options = convention.here().solver(p)
    neo = isinstance(host, double.Neo)
    assert found.name == ("dpmpp_2m_cfg_pp_mixed" if neo else "dpmpp_2m_cfg_pp")
    assert options == {}


def test_a_network_that_holds_its_loras_itself_is_refused(host, script):
    """Neo's Nunchaku models; the teacher would have the prompt's LoRAs, in silence."""
    if isinstance(host, double.Neo):
        host.dynamic_args.nunchaku = True
        with pytest.raises(ValueError, match="Nunchaku"):
            double.Processing(host).draw(script, ON)


def test_an_inpainting_models_teacher_is_given_the_masked_picture(host, script, monkeypatch):
    """By the host's image_cond, where it is of the latent's size."""
    host.engine.is_inpaint = True
    given = []
    ask = double.Network.apply_model

    def hear(network, x, sigma, c_crossattn, c_concat=None):
        if network is not host.engine.forge_objects.unet.model:
            given.append(c_concat)
        return ask(network, x, sigma, c_crossattn, c_concat)

    monkeypatch.setattr(double.Network, "apply_model", hear)
    picture(host, script, asked=ON._replace(teacher="inpaint.safetensors"))
    assert given and all(one is None for one in given)  # a host without a masked picture: 1 x 1
    given.clear()
    picture(host, script, asked=ON._replace(teacher="inpaint.safetensors"), shape=(4, 1, 1))
    assert given and all(one.shape == (1, 5, 1, 1) for one in given)
