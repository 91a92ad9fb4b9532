"""The nodes for ComfyUI, in `comfy_double`; docs/comfyui.md says what ran in the real one."""

import asyncio
import importlib
import itertools
import json
import logging
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import comfy_double as comfy
import kdpp
from kdpp.checkpoints.presets import PRESETS
from kdpp.hosts.comfyui import nodes
from kdpp.hosts.comfyui.forms import form_of
from kdpp.lab import tuning as kdpp_tuning
from problems import SHAPE, Gaussian, conditions, karras, mixture, relative, seeded

BATCH, SEED = 3, 42
COND, UNCOND = conditions(BATCH)
NOISE = seeded(BATCH, *SHAPE, seed=9)
EMPTY = torch.zeros(BATCH, *SHAPE, dtype=torch.float64)
SIGMAS = {"ve": karras(4), "flow": torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)}
LORA = 0.25  # what the student's patch adds to the network's estimate


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """The double in the place of ComfyUI; afterwards nothing of it is left."""
    for name, module in comfy.modules(v3=True).items():
        monkeypatch.setitem(sys.modules, name, module)
    for told in (comfy.LOADED, comfy.SHOWN, comfy.ROOM, comfy.INTERRUPT):
        told.clear()
    yield
    for name in ("sampling", "tuning"):
        sys.modules.pop(f"kdpp.hosts.comfyui.{name}", None)
        vars(sys.modules["kdpp.hosts.comfyui"]).pop(name, None)


def network(seed, kind="ve"):
    return kdpp.as_flow(mixture(seed), sigma_max=1e4) if kind == "flow" else mixture(seed)


def pair(kind="ve", shared=False):
    """A student's and a teacher's MODEL: two networks, or a LoRA and its base on one."""
    levels = comfy.CONST if kind == "flow" else comfy.VE
    base = comfy.Base(network(0, kind), levels)
    other = base if shared else comfy.Base(network(1, kind), levels)
    return comfy.Patcher(base, LORA), comfy.Patcher(other, name="teacher")


def guider(student, teacher, cfg=2.0, teacher_cfg=4.0):
    (made,) = nodes.make_guider(student, COND, UNCOND, cfg, teacher, teacher_cfg)
    return made


SETTINGS = {
    "solver": "euler", "teacher_steps": 2, "teacher_scale": 0.5, "renoise": "next", "level": 1.0,
    "eta": 1.0, "s_noise": 1.0, "noise": nodes.BY_ROW,
}  # fmt: skip


def picture(
    guided, rows=slice(None), latent=EMPTY, mask=None, kind="ve", callback=None, **settings
):
    """What SamplerCustomAdvanced makes of these rows."""
    (sampler,) = nodes.make_sampler(**{**SETTINGS, **settings})
    guided.set_conds(COND[rows], UNCOND[rows])
    if hasattr(guided, "teacher"):
        guided.teacher.set_conds(COND[rows], UNCOND[rows])
    mask = None if mask is None else mask[rows]
    return guided.sample(
        NOISE[rows], latent[rows], sampler, SIGMAS[kind], mask, callback, True, SEED
    )


def by_hand(student, teacher, kind="ve", solver="euler", scale=0.5, cfg=2.0):
    """The same picture by kdpp's own CFG on plain denoisers, in model space and out of it."""
    sigmas = SIGMAS[kind]
    x = NOISE if kind == "flow" else NOISE * (1 + sigmas[0] ** 2).sqrt()
    seeds = kdpp.row_seeds(SEED, NOISE)
    model = kdpp.TeacherGuidedDenoiser(
        student, teacher, teacher_steps=2, teacher_scale=scale, teacher_cfg_scale=4.0,
        renoise_noise_sampler=kdpp.SeededNoise(x, seeds, 1), flow=kind == "flow",
    )  # fmt: skip
    extra_args = {"cond": COND, "uncond": UNCOND, "cond_scale": cfg}
    source = None
    if kdpp.SOLVERS[solver].noise == "plain":
        source = kdpp.SeededNoise(x, seeds)
    elif kdpp.SOLVERS[solver].noise == "brownian":
        source = kdpp.BrownianNoise(x, sigmas[-2], sigmas[0], seed=seeds)
    return kdpp.sample(
        solver, model, x, sigmas, extra_args, None, True, source
    ) / 0.5  # fmt: skip


def plus_lora(denoiser):
    return lambda x, sigma, cond=None: denoiser(x, sigma, cond=cond) + LORA


# ------------------------------------------------------------------------------- a guided run


@pytest.mark.parametrize(
    "solver", ["euler", "euler_ancestral", "dpmpp_sde", "euler_cfg_pp", "heun"]
)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "one loader"])
def test_the_picture_is_kdpps_own(solver, shared):
    """Student and teacher by their guiders make what plain denoisers make; so does one network."""
    student, teacher = pair(shared=shared)
    found = picture(guider(student, teacher), solver=solver)
    expected = by_hand(plus_lora(mixture(0)), mixture(0 if shared else 1), solver=solver)
    assert relative(found, expected) < 1e-12


def test_a_flow_model_is_sampled_as_one():
    student, teacher = pair("flow")
    found = picture(guider(student, teacher), kind="flow")
    denoisers = plus_lora(network(0, "flow")), network(1, "flow")
    assert relative(found, by_hand(*denoisers, kind="flow")) < 1e-12


@pytest.mark.parametrize("error", [None, RuntimeError("lost"), KeyboardInterrupt()])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "one loader"])
def test_the_student_is_as_it_was_whatever_ends_the_run(shared, error):
    """Its weights are in place after the teacher's call, and the next run is a clean one."""
    student, teacher = pair(shared=shared)
    expected = picture(guider(student, teacher))
    assert comfy.LOADED[-1] == "student" and student.model.patch == LORA
    if error is not None:
        teacher.model.interrupt = error
        with pytest.raises(type(error)):
            picture(guider(student, teacher))
        teacher.model.interrupt = None
        assert comfy.LOADED[-1] == "student" and student.model.patch == LORA
    assert torch.equal(picture(guider(student, teacher)), expected)


def test_weights_change_places_in_guided_steps_alone():
    """For the run, for its preparation, then round each of two teacher's calls."""
    student, teacher = pair(shared=True)
    picture(guider(student, teacher))
    assert " ".join(comfy.LOADED) == "student teacher student" + 2 * " teacher student"


def test_room_for_an_evaluation_is_left_beside_the_weights():
    """Of both halves of CFG, for all rows, as the host does for its own samplers."""
    picture(guider(*pair(shared=True)))
    assert comfy.ROOM[2:] == [2 * NOISE.numel()] * 5  # after the host's own for both


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_sde", "lcm"])
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "one loader"])
def test_a_batch_is_its_single_pictures(solver, shared):
    """Also in image to image, and where no noise is added (rows told apart by the latent)."""
    made = guider(*pair(shared=shared))
    batch = picture(made, solver=solver)
    for i in range(BATCH):
        one = picture(made, slice(i, i + 1), solver=solver)
        assert relative(batch[i : i + 1], one) < 1e-6


def test_a_second_pass_without_noise_has_rows_of_its_own(monkeypatch):
    """Two latents without initial noise do not share their solver's noise."""
    monkeypatch.setattr(sys.modules[__name__], "NOISE", EMPTY)
    heard = []

    def row_seeds(*shown):
        heard.append(made := row_seeds_of(*shown))
        return made

    row_seeds_of = kdpp.row_seeds
    monkeypatch.setattr(kdpp, "row_seeds", row_seeds)
    latent = seeded(BATCH, *SHAPE, seed=3)
    made = guider(*pair())
    batch = picture(made, latent=latent, solver="euler_ancestral")
    for i in range(BATCH):
        one = picture(made, slice(i, i + 1), latent=latent, solver="euler_ancestral")
        assert relative(batch[i : i + 1], one) < 1e-6
    assert len(set(heard[0])) == BATCH and heard[0] == [one for (one,) in heard[1:]]


def test_the_kept_region_of_an_inpainted_picture_stays():
    """The teacher is called inside the same mask, on the same latent."""
    latent = seeded(BATCH, *SHAPE, seed=3)
    mask = torch.zeros_like(latent)
    mask[..., 0] = 1.0
    student, teacher = pair()
    found = picture(guider(student, teacher), latent=latent, mask=mask)
    alone = picture(guider(student, teacher), latent=latent, mask=mask, teacher_scale=0.0)
    assert torch.equal(found[..., 1], latent[..., 1])
    assert relative(found[..., 0], alone[..., 0]) > 1e-3


def test_the_teachers_conditions_are_prepared_for_the_same_latent():
    """It goes into model space once, not twice; and the patcher is a clone, with its own hooks."""
    student, teacher = pair()
    made = guider(student, teacher)
    picture(made, latent=seeded(BATCH, *SHAPE, seed=3))
    assert torch.equal(made.teacher.mapped, made.mapped)
    assert made.teacher.model_patcher is not teacher and teacher.is_clone(
        made.teacher.model_patcher
    )


@pytest.mark.parametrize("off", [{"teacher_scale": 0.0}, {"teacher_steps": 0}])
def test_a_teacher_that_is_not_asked_is_not_loaded(off):
    student, teacher = pair()
    found = picture(guider(student, teacher), **off)
    assert comfy.LOADED == ["student"]
    assert relative(found, by_hand(plus_lora(mixture(0)), mixture(1), scale=0.0)) < 1e-12


def test_another_guider_samples_the_student_alone(caplog):
    """And says that there is no teacher to ask."""
    student, teacher = pair()
    alone = picture(guider(student, teacher), teacher_scale=0.0)
    plain = comfy.CFGGuider(student)
    plain.set_conds(COND, UNCOND)
    plain.set_cfg(2.0)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(picture(plain), alone)
    assert "the guider holds no teacher" in caplog.text


def test_cfg_pp_has_the_negatives_estimate_at_a_scale_of_1():
    """Where the host would skip it and hand over zeros."""
    student, teacher = pair()
    found = picture(guider(student, teacher, cfg=1.0), solver="euler_cfg_pp")
    expected = by_hand(plus_lora(mixture(0)), mixture(1), solver="euler_cfg_pp", cfg=1.0)
    assert relative(found, expected) < 1e-12


def test_cfg_pp_without_a_negative_is_an_error(monkeypatch):
    """Zeros in its place would spoil the picture."""
    student, teacher = pair()
    made = guider(student, teacher, cfg=1.0)
    predict = comfy.CFGGuider.predict_noise

    def without(self, x, timestep, model_options=None, seed=None):
        self.conds["negative"] = None
        return predict(self, x, timestep, model_options, seed)

    monkeypatch.setattr(comfy.CFGGuider, "predict_noise", without)
    with pytest.raises(ValueError, match=r"CFG\+\+ needs the unconditional estimate"):
        picture(made, solver="euler_cfg_pp")


def test_the_host_hears_of_every_step():
    """For previews, the progress bar and interrupts; two-evaluation solvers, too."""
    heard = []
    picture(guider(*pair()), solver="heun", callback=lambda *told: heard.append(told))
    assert [(i, total) for i, _, _, total in heard] == [(i, 4) for i in range(4)]
    assert all(x0.shape == x.shape == NOISE.shape for _, x0, x, _ in heard)


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_sde"])
def test_the_hosts_noise_is_looked_up_when_it_is_needed(solver, monkeypatch):
    """Its samplers' own, with the run's seed; packs load that module anew."""
    made = guider(*pair())
    first = picture(made, solver=solver, noise=nodes.HOST)
    assert torch.equal(first, picture(made, solver=solver, noise=nodes.HOST))
    assert not torch.equal(first, picture(made, solver=solver))
    host = sys.modules["comfy.k_diffusion.sampling"]
    seeds = []

    def silent(x, *levels, seed=None, cpu=True):
        seeds.append(seed)
        return lambda *_: torch.zeros_like(x)

    monkeypatch.setattr(host, "default_noise_sampler", silent)
    monkeypatch.setattr(host, "BrownianTreeNoiseSampler", silent)
    assert not torch.equal(first, picture(made, solver=solver, noise=nodes.HOST))
    assert seeds == [SEED]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"latents": comfy.Flux},
            r"are SD15 \(4 channels\) and the teacher's Flux \(16 channels\)",
        ),
        ({"latents": comfy.Wide}, r"are SD15 \(4 channels\) and the teacher's SD15 \(9 channels\)"),
        ({"levels": comfy.CONST}, "student is not a flow model and the teacher is a flow model"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_any_work(teacher, message):
    student = comfy.Patcher(comfy.Base(mixture(0)))
    with pytest.raises(ValueError, match=message):
        guider(student, comfy.Patcher(comfy.Base(mixture(1), **teacher)))
    assert comfy.LOADED == []


# ------------------------------------------------------------------------------- Compare


def compared(made, **settings):
    (sampler,) = nodes.make_sampler(**{**SETTINGS, **settings})
    noise = SimpleNamespace(seed=SEED, generate_noise=lambda latent: NOISE)
    latent = {"samples": EMPTY, "noise_mask": None}
    return nodes.make_comparison(noise, made, sampler, SIGMAS["ve"], latent)


def test_compare_shows_with_without_and_the_student_in_the_teachers_place():
    """From the same noise, in one batch; the user's guider and sampler stay as they were."""
    student, teacher = pair()
    made = guider(student, teacher)
    before = picture(made)
    batch, _ = compared(made)
    alone, helped, control = batch["samples"].split(BATCH)
    assert batch.keys() == {"samples"}
    assert torch.equal(helped, before) and torch.equal(picture(made), before)
    assert torch.equal(alone, picture(made, teacher_scale=0.0))
    itself = comfy.Patcher(comfy.Base(mixture(0)), LORA, name="teacher")
    assert relative(control, picture(guider(student, itself, teacher_cfg=2.0))) < 1e-12
    assert relative(control, helped) > 1e-3 and relative(control, alone) > 1e-3


@pytest.mark.parametrize(
    ("cfg", "solver", "student", "teacher"),
    [(1.0, "euler", 4, 2), (2.0, "euler", 8, 4), (1.0, "euler_cfg_pp", 8, 2), (1.0, "heun", 7, 2)],
)
def test_compare_counts_evaluations(cfg, solver, student, teacher):
    """A CFG scale of 1 takes one, others two; CFG++ two of the student. As many as were heard."""
    asked = []

    def heard(network):
        return lambda *given, **more: asked.append(network) or network(*given, **more)

    one, other = pair()
    for patcher in (one, other):
        patcher.model.network = heard(patcher.model.network)
    _, text = compared(guider(one, other, cfg=cfg, teacher_cfg=cfg), solver=solver)
    assert text.splitlines() == [
        f"1 to 3: student alone; {student} evaluations of the student",
        f"4 to 6: with its teacher; {student} evaluations of the student, {teacher} of the teacher",
        f"7 to 9: with itself in the teacher's place; {student} evaluations of the student, "
        f"{teacher} more in the teacher's place",
    ]
    assert len(asked) == 3 * student + 2 * teacher


def test_compare_takes_its_own_guider_and_sampler():
    student, _ = pair()
    with pytest.raises(ValueError, match="the guider of Teacher Guider and the sampler of KDPP"):
        compared(comfy.CFGGuider(student))
    assert comfy.LOADED == []


# ------------------------------------------------------------------------------- Tune


def tuned(made, kind="ve", noise=None, **settings):
    """The verdict of Tune and its picture, with 20 samples and a teacher's run of 8 steps."""
    (sampler,) = nodes.make_sampler(**{**SETTINGS, **settings})
    noise = noise or SimpleNamespace(seed=SEED, generate_noise=many)
    latent = {"samples": EMPTY}
    for one in (made, made.teacher):  # those of one picture, as prompts are
        one.set_conds(COND[:1], UNCOND[:1])
    return nodes.make_tuning(noise, made, sampler, SIGMAS[kind], latent, 20, 8, 8)


ROWS = torch.empty(20, *SHAPE)


def many(latent):
    """Noise for all rows of a latent."""
    return seeded(*latent["samples"].shape, seed=9)


def by_the_lab(kind, solver, teacher, cfg):
    """The answer of `kdpp.lab.tune.tune` in VE form, with the pair's own CFG, on the same noise."""

    def host(denoiser):
        def ask(x, sigma, cfg_scale):
            cond, uncond = (denoiser(x, sigma, cond=one[:1]) for one in (COND, UNCOND))
            return uncond + (cond - uncond) * cfg_scale, uncond

        return kdpp.HostModel(ask, flow=False, sigma_min=comfy.VE.sigma_min, sigma_max=1e4)

    levels, first = SIGMAS[kind].tolist(), (1 + SIGMAS[kind][0] ** 2).sqrt()
    if kind == "flow":
        levels = kdpp_tuning.levels_in_ve(levels)
        first = levels[0]
    if (kind, solver) == ("flow", "heun"):
        solver = partial(kdpp.sample_heun_tg, variable="tau")
    return kdpp_tuning.tune(
        host(plus_lora(mixture(0))), host(teacher), many({"samples": ROWS}) * first, levels,
        {"cond_scale": cfg}, sampler=solver, teacher_cfg_scale=4.0, detail=8, batch=4, seed=SEED,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "solver", "cfg", "shared"),
    [
        ("ve", "euler", 2.0, False),
        ("ve", "euler_ancestral", 1.0, True),
        ("ve", "euler_cfg_pp", 1.0, False),
        ("flow", "heun", 2.0, True),  # ComfyUI's form of it
        ("flow", "euler_cfg_pp", 1.0, False),
    ],
)
def test_tune_says_what_kdpp_tune_says(kind, solver, cfg, shared):
    """The same answer, price and table, with what to set in the nodes."""
    said, image = tuned(guider(*pair(kind, shared), cfg=cfg), kind, solver=solver)
    found = by_the_lab(kind, solver, mixture(0 if shared else 1), cfg)
    assert said.startswith(found.advice) and said.endswith(found.table)
    assert found.by == "teacher"
    (step,), level = found.settings["teacher_steps"], found.settings["renoise"]
    level = level / (1 + level) if kind == "flow" else level
    assert (
        f"KDPP Sampler: first_step {step}, teacher_steps 1, teacher_scale "
        f"{found.settings['teacher_scale']:g}, renoise level, level {level:.6g}, "
        f"renoise_eta {found.settings['renoise_eta']:g}.\nTeacher Guider: teacher_cfg "
        f"{found.settings['teacher_cfg_scale']:g}."
    ) in said
    assert ("that of the setting is τ" in said) == (kind == "flow")
    assert image.shape[0] == 1 and image.shape[3] == 3 and 0.0 <= image.min() < image.max() <= 1.0


def test_the_price_is_said_before_the_work():
    """In the log and on the node; the bar runs to what was announced, or less."""
    server = sys.modules["server"].PromptServer.instance
    tuned(guider(*pair()))
    ((price, node),) = server.told
    total = sum(
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+)\s+(?:evaluations|of)", price)
    )
    assert node == server.last_node_id and re.match("20 samples, .* seconds$", price)
    done, all_of_it = zip(*comfy.SHOWN)
    assert set(all_of_it) == {total} and 0 < done[0] < done[-1] <= total
    assert list(done) == sorted(done)


@pytest.mark.parametrize("at", [1, 2, 40])
def test_tune_can_be_interrupted(at, monkeypatch):
    """Within one call of a model; the guider has the user's CFG scale afterwards, too, and the
    answer is the same."""
    made = guider(*pair(shared=True))
    said, _ = tuned(made)
    before = picture(made)
    asked = []

    def look():
        asked.append(None)
        if len(asked) == at:
            raise KeyboardInterrupt

    name = "throw_exception_if_processing_interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["comfy.model_management"], name, look)
        with pytest.raises(KeyboardInterrupt):
            tuned(made)
    assert len(asked) == at and comfy.LOADED[-1] == "student"
    assert torch.equal(picture(made), before)
    assert tuned(made)[0] == said


def test_weights_change_places_where_another_is_asked():
    """Not round each of the teacher's many calls."""
    made = guider(*pair(shared=True))
    tuned(made)
    assert len(comfy.LOADED) < len(comfy.SHOWN)
    assert all(one != other for one, other in itertools.pairwise(comfy.LOADED))


def exact(x, sigma, cond=None):
    """A consistency model of `GAUSSIAN`: where its ODE ends."""
    mean, variance = (one.to(x) for one in (GAUSSIAN.mean, GAUSSIAN.variance))
    return mean + (x - mean) * (variance / (variance + sigma.view(-1, 1, 1, 1) ** 2)).sqrt()


GAUSSIAN = Gaussian(torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.5))


@pytest.mark.parametrize(
    ("student", "solver", "said"),
    [
        (exact, "lcm", "KDPP Sampler: teacher_steps 0."),
        (GAUSSIAN, "euler", "Teacher Guider: connect the student's MODEL to teacher as well."),
    ],
)
def test_what_tune_says_where_the_teacher_is_not_needed(student, solver, said):
    """A student that misses nothing, and one whose own second look gains as much."""
    bases = [comfy.Base(lambda x, sigma, cond, of=of: of(x, sigma)) for of in (student, GAUSSIAN)]
    patchers = [comfy.Patcher(base, name=name) for base, name in zip(bases, ("student", "teacher"))]
    made = guider(*patchers, cfg=1.0, teacher_cfg=1.0)
    verdict, _ = tuned(made, solver=solver)
    assert said in verdict


@pytest.mark.parametrize(
    ("mask", "sampler", "message"),
    [
        (EMPTY, True, "Tune takes no mask"),
        (None, False, "the guider of Teacher Guider and the sampler of KDPP"),
    ],
)
def test_what_tune_refuses_it_refuses_before_any_work(mask, sampler, message):
    (own,) = nodes.make_sampler(**SETTINGS)
    noise = SimpleNamespace(seed=SEED, generate_noise=many)
    latent = {"samples": EMPTY, "noise_mask": mask}
    with pytest.raises(ValueError, match=message):
        nodes.make_tuning(
            noise, guider(*pair()), own if sampler else object(), SIGMAS["ve"], latent, 20, 8, 8
        )
    assert comfy.LOADED == []


# ------------------------------------------------------------------------------- the nodes


def entry(v3, monkeypatch):
    """The pack as the host imports it."""
    for name in ("comfy_api", "comfy_api.latest"):
        if not v3:
            monkeypatch.setitem(sys.modules, name, None)
            monkeypatch.delitem(sys.modules, name)
    pack = importlib.reload(importlib.import_module("kdpp.hosts.comfyui"))
    return {name: getattr(pack, name) for name in pack.__all__}


def test_both_schemas_say_the_same_of_every_node(monkeypatch):
    """Names, types, defaults, ranges, choices and tooltips of inputs; outputs; other words."""
    (entrypoint,) = entry(True, monkeypatch).values()
    extension = asyncio.run(entrypoint())
    schemas = [node.define_schema() for node in asyncio.run(extension.get_node_list())]
    old = entry(False, monkeypatch)
    assert [one.node_id for one in schemas] == list(old["NODE_CLASS_MAPPINGS"])
    for schema in schemas:
        made = old["NODE_CLASS_MAPPINGS"][schema.node_id]
        assert schema.display_name == old["NODE_DISPLAY_NAME_MAPPINGS"][schema.node_id]
        assert schema.category == made.CATEGORY and schema.description == made.DESCRIPTION
        assert schema.search_aliases == made.SEARCH_ALIASES
        inputs = made.INPUT_TYPES()
        told = {**inputs["required"], **inputs["optional"]}
        assert [one.name for one in schema.inputs] == list(told)
        for one in schema.inputs:
            kind, said = told[one.name]
            assert one.optional == (one.name in inputs["optional"])
            if isinstance(kind, list):
                assert (one.type, one.options) == ("Combo", kind) and said["default"] in kind
            else:
                assert one.type.upper() == kind
            assert {name: getattr(one, name) for name in said} == said
            assert said["tooltip"].endswith(".")
            if "min" in said:
                assert said["min"] <= said["default"] <= said["max"]
        outputs = [(one.display_name, one.type.upper()) for one in schema.outputs]
        assert outputs == list(zip(made.RETURN_NAMES, made.RETURN_TYPES))


def test_the_nodes_run_by_either_schema(monkeypatch):
    """With their defaults: the same preset."""
    defaults = {field.name: field.default for field in nodes.PRESET.fields}
    (entrypoint,) = entry(True, monkeypatch).values()
    extension = asyncio.run(entrypoint())
    new = asyncio.run(extension.get_node_list())[2].execute(**defaults)
    old = entry(False, monkeypatch)["NODE_CLASS_MAPPINGS"]["KDPPPreset"]
    old = getattr(old(), old.FUNCTION)(**defaults)
    assert torch.equal(new[0], old[0]) and new[2:] == old[2:]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_levels_and_settings(name):
    preset = PRESETS[name]
    sigmas, sampler, cfg, teacher_cfg = nodes.make_preset(name, 0, 1024, 768)
    assert sigmas.tolist() == pytest.approx(preset.sigmas(None, (768, 1024)))
    assert (cfg, teacher_cfg) == (preset.cond_scale, preset.teacher_cfg_scale)
    assert sampler.name == preset.sampler and not sampler.comfyui
    assert sampler.guidance["teacher_scale"] == preset.teacher_scale


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("euler", {"s_noise": 1.0}),
        ("dpmpp_2m", {}),
        ("euler_ancestral", {"eta": 0.5, "s_noise": 1.0}),
        ("dpm_fast", {"s_noise": 1.0}),
    ],
)
def test_settings_that_a_solver_does_not_have_are_left_out(solver, options):
    """So is eta where noise is not added unless it is asked for."""
    (sampler,) = nodes.make_sampler(**{**SETTINGS, "solver": solver, "eta": 0.5})
    assert sampler.form(comfy.VE(), SIGMAS["ve"]).options == options


def test_the_forms_are_those_of_the_page():
    """docs/solvers.md says what to run for ComfyUI's sampler; every name but those without twin."""
    page = Path(__file__).parents[1].joinpath("docs/solvers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert len(rows) > 25
    sigmas = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.0])
    for name, *cells in rows:
        for flow, cell in enumerate(cells):
            if not cell.startswith("`"):
                continue
            if name == "dpm_adaptive":  # no levels of its own, and no solver of kdpp's
                continue
            form = form_of(name, sigmas, comfy.CONST(), bool(flow), True)
            fixed = {k: v for k, v in form.options.items() if k not in ("s_tmin", "s_tmax")}
            said = re.match(r"`(\w+)(?:\((.*)\))?`", cell)
            expected = dict(part.split("=") for part in (said[2] or "").split(", ") if part)
            expected = {k: float(v) if v.isdigit() else v for k, v in expected.items()}
            assert form.solver.name == said[1] and fixed == expected, name
            stars = cell.replace("\\", "").split("` ")[-1].split()
            assert (form.sigmas[0] < 1.0) == (bool(flow) and "*" in stars), name
            assert (form.sigmas[-1] > 0.0) == ("unipc" in cell)


def test_comfyuis_form_or_kdpps():
    """kdpp's own formula is there, too; a name that kdpp does not have is ComfyUI's always."""
    for form, rule in ((nodes.COMFYUI, {"variable": "tau"}), (nodes.KDPP, {})):
        (sampler,) = nodes.make_sampler(**{**SETTINGS, "solver": "dpmpp_2m", "form": form})
        assert sampler.form(comfy.CONST(), SIGMAS["flow"]).options == rule
        (sampler,) = nodes.make_sampler(**{**SETTINGS, "solver": "uni_pc", "form": form})
        assert sampler.form(comfy.CONST(), SIGMAS["flow"]).solver.name == "unipc"


def test_dpm_fast_has_the_schedules_ends():
    """Its own levels between them, and a bar that comes to its end."""
    heard = []
    found = picture(
        guider(*pair()), solver="dpm_fast", teacher_scale=0.0,
        callback=lambda *told: heard.append(told),
    )  # fmt: skip
    assert [(i, total) for i, _, _, total in heard] == [(i, len(heard)) for i in range(len(heard))]
    x = NOISE * (1 + SIGMAS["ve"][0] ** 2).sqrt()
    model = kdpp.TeacherGuidedDenoiser(plus_lora(mixture(0)), mixture(1), teacher_steps=0)
    extra_args = {"cond": COND, "uncond": UNCOND, "cond_scale": 2.0}
    ends = [float(level) for level in (SIGMAS["ve"][-2], SIGMAS["ve"][0])]
    expected = kdpp.sample_dpm_fast_tg(model, x, *ends, 4, extra_args, disable=True) / 0.5
    assert relative(found, expected) < 1e-12


def test_a_model_with_louder_noise():
    """Some flow models' noise is not of unit variance: the noise that is added is as loud."""
    made = guider(*pair("flow"))
    plain = picture(made, kind="flow", solver="lcm")
    comfy.CONST.noise_scale = 8.0
    try:
        loud = picture(made, kind="flow", solver="lcm")
    finally:
        del comfy.CONST.noise_scale
    assert relative(loud, plain) > 1e-3


def test_renoise_may_be_a_level():
    (sampler,) = nodes.make_sampler(**{**SETTINGS, "renoise": nodes.LEVEL, "level": 0.7})
    assert sampler.guidance["renoise"] == 0.7


# ------------------------------------------------------------------------ the example workflows

PACK = Path(nodes.__file__).parent / "pack"
WORKFLOWS = sorted(PACK.glob("example_workflows/*.json"))


def test_there_are_examples():
    """Of a separate teacher, a LoRA with its base, a preset, Compare and Tune."""
    used = [one["type"] for path in WORKFLOWS for one in json.loads(path.read_text())["nodes"]]
    ours = {one for one in used if one.startswith("KDPP")}
    assert len(WORKFLOWS) == 5 and ours == {node.id for node in nodes.NODES}
    assert "LoraLoaderModelOnly" in used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_fits_the_nodes(path):
    """Its links join what its nodes have; its settings are those that a node of kdpp's takes."""
    graph = json.loads(path.read_text(encoding="utf-8"))
    by_id = {one["id"]: one for one in graph["nodes"]}
    for number, start, out, end, into, kind in graph["links"]:
        given, taken = by_id[start]["outputs"][out], by_id[end]["inputs"][into]
        assert number in given["links"] and number == taken["link"]
        assert given["type"] == kind and taken["type"] in (kind, "*")
    known = {node.id: node for node in nodes.NODES}
    for one in graph["nodes"]:
        if one["type"] not in known:
            continue
        node = known[one["type"]]
        fields = {field.name: field for field in node.fields}
        slots = {slot["name"]: slot for slot in one["inputs"]}
        assert all(slot["type"] == fields[name].type for name, slot in slots.items())
        outputs = tuple((slot["name"], slot["type"]) for slot in one["outputs"])
        assert outputs == node.outputs
        widgets = [field for field in node.fields if field.default is not None]
        assert len(widgets) == len(one["widgets_values"])
        for field, value in zip(widgets, one["widgets_values"]):
            assert value in field.choices if field.choices else field.low <= value <= field.high
        unset = [field for field in node.fields if field.default is None and not field.optional]
        assert all(slots[field.name]["link"] is not None for field in unset)
