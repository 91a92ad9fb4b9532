"""Presets: their levels are those of diffusers' schedulers, and others are named as wrong."""

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import presets_table
from kdpp import SOLVERS
from kdpp.checkpoints import presets
from kdpp.checkpoints.architectures import CONTEXT, FLOWS
from kdpp.checkpoints.presets import PRESETS, check_levels, shifted
from kdpp.kinds import is_flow
from kdpp.models import FlowDenoiser

ALL = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
VE = [preset for preset in PRESETS.values() if not preset.flow]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def schedulers():
    return pytest.importorskip("diffusers.schedulers", reason="compared with diffusers")


@ALL
def test_each_can_be_sampled(preset):
    """Its sampler exists; its levels fall, are as many as it says and end in 0."""
    assert preset.sampler in SOLVERS and SOLVERS[preset.sampler].own_levels is None
    assert PRESETS[preset.name] is preset and preset.source and preset.what
    assert bool(preset.timesteps) != bool(preset.taus)
    assert preset.flow == (preset.architecture in FLOWS)
    assert preset.flow or preset.architecture in CONTEXT.values()
    assert len(set(preset.steps)) == len(preset.steps)
    for steps in preset.steps:
        sigmas = preset.sigmas(steps)
        assert len(sigmas) == steps + 1 and sigmas[-1] == 0.0
        assert all(a > b for a, b in pairwise(sigmas))
        assert sigmas[0] == (1.0 if preset.flow else pytest.approx(14.6146, rel=1e-5))
        assert all(isinstance(sigma, float) for sigma in sigmas)
        assert SOLVERS[preset.sampler].plan(sigmas)
    assert preset.sigmas() == preset.sigmas(preset.steps[0])
    assert 0 < preset.teacher_scale < 1 and preset.teacher_cfg_scale >= 1 <= preset.cond_scale


@ALL
def test_none_is_called_tried_that_was_not(preset):
    """Nothing was run on real weights; the paper's are SDXL in 4 steps."""
    assert not preset.run
    if preset.paper:
        assert preset.architecture == "SDXL" and preset.steps[0] == 4
        assert (preset.teacher_steps, preset.teacher_cfg_scale) == (1, 7.5)
        assert preset.teacher_scale == (0.02 if preset.sampler == "lcm" else 0.1)


def test_other_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="sdxl-lightning-4 was made for 4 steps, not 6"):
        PRESETS["sdxl-lightning-4"].sigmas(6)
    with pytest.raises(ValueError, match="made for 2 or 3 or 4 or 5 or 6 or 7 or 8 steps, not 9"):
        PRESETS["lcm-sdxl"].sigmas(9)


# Levels, against diffusers ------------------------------------------------------------------------

TRAILING = [p for p in VE if not p.name.startswith("lcm")]


@pytest.mark.parametrize("preset", TRAILING, ids=[preset.name for preset in TRAILING])
def test_trailing_levels_are_those_of_diffusers_euler(preset, schedulers):
    euler = schedulers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    for steps, times in zip(preset.steps, preset.timesteps):
        euler.set_timesteps(steps)
        assert tuple(map(int, euler.timesteps)) == times
        assert preset.sigmas(steps) == pytest.approx(euler.sigmas.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", [preset.name for preset in VE if preset.name.startswith("lcm")])
def test_lcm_timesteps_are_those_of_diffusers(name, schedulers):
    scheduler = schedulers.LCMScheduler(**BETAS)
    for steps, times in zip(PRESETS[name].steps, PRESETS[name].timesteps):
        scheduler.set_timesteps(steps)
        assert tuple(scheduler.timesteps.tolist()) == times
        table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
        expected = [*table[list(times)].tolist(), 0.0]
        assert PRESETS[name].sigmas(steps) == pytest.approx(expected, rel=1e-5)


FLOW = {
    "sd35-turbo": (4, 3.0), "flux-schnell": (4, 1.0), "z-image-turbo": (8, 3.0),
    "qwen-image-lightning-4": (4, 3.0), "qwen-image-lightning-8": (8, 3.0),
    "wan22-lightning-t2v": (4, 5.0), "wan22-lightning-i2v": (4, 5.0),
    "krea2-turbo": (8, math.exp(1.15)),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOW)
def test_flow_levels_are_those_of_diffusers(name, schedulers):
    """Equal steps, shifted once, by its own scheduler."""
    steps, shift = FLOW[name]
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[i / steps for i in range(steps, 0, -1)])
    assert PRESETS[name].sigmas(steps) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    assert PRESETS[name].sigmas(steps) == pytest.approx((*shifted(shift, steps), 0.0), rel=1e-12)


def test_every_flow_preset_is_compared():
    assert {p.name for p in PRESETS.values() if p.flow} == {*FLOW, "flux2-klein"}


def test_qwen_lightning_as_its_card_sets_the_scheduler(schedulers):
    """Dynamic shifting between log 3 and log 3, no terminal shift."""
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(
        base_shift=math.log(3), max_shift=math.log(3), use_dynamic_shifting=True
    )
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=math.log(3))
    expected = PRESETS["qwen-image-lightning-4"].sigmas()
    assert scheduler.sigmas.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1360), (2048, 2048)])
def test_klein_s_levels_follow_the_size(size, schedulers):
    """As diffusers' pipeline and scheduler make them."""
    klein = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein", reason="klein")
    mu = klein.compute_empirical_mu(size[0] // 16 * (size[1] // 16), 4)
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=mu)
    found = PRESETS["flux2-klein"].sigmas(size=size)
    assert found == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)


def test_what_diffusers_gives_by_default_is_named_as_wrong(schedulers):
    """The wasted step: 1, .858, .602, .009."""
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    wrong = PRESETS["sd35-turbo"].check(scheduler.sigmas.tolist())
    assert "was trained for the levels 1, 0.9, 0.75, 0.5, 0, and these are 1, 0.8577" in wrong
    euler = schedulers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    euler.set_timesteps(4)
    assert PRESETS["sdxl-lightning-4"].check(euler.sigmas.tolist())


# Checking -----------------------------------------------------------------------------------------


@ALL
def test_its_own_levels_are_right(preset):
    """In float32 and at any number of steps; a level off by 3 % is not."""
    for steps in preset.steps:
        sigmas = torch.tensor(preset.sigmas(steps), dtype=torch.float32)
        assert preset.check(sigmas) is None
        for i in range(steps):
            wrong = sigmas.clone()
            wrong[i] *= 0.97
            said = preset.check(wrong)
            right = ", ".join(f"{level:.4g}" for level in preset.sigmas(steps))
            assert said.startswith(f"{preset.name} was trained for the levels {right}, and these")


@pytest.mark.parametrize("preset", VE, ids=[preset.name for preset in VE])
@pytest.mark.parametrize("by", [-1, 1])
def test_timesteps_may_be_rounded_either_way(preset, by):
    table = presets.log_sigmas().exp()
    for times in preset.timesteps:
        moved = table[[min(t + by, 999) for t in times]].tolist()
        assert preset.check([*moved, 0.0]) is None


def test_lcm_s_timesteps_are_not_dmd2_s():
    """999, 759, 499, 259 and 999, 749, 499, 249 are told apart."""
    dmd2, lcm = PRESETS["dmd2"], PRESETS["lcm-lora-sdxl"]
    assert "4.082" in dmd2.check(lcm.sigmas(4))
    assert "4.261" in lcm.check(dmd2.sigmas())


def test_the_end_of_a_run_is_right():
    """What image to image leaves of it; its start or its middle alone is not."""
    sigmas = PRESETS["sdxl-lightning-4"].sigmas()
    for n in (2, 3, 4):
        assert PRESETS["sdxl-lightning-4"].check(sigmas[-n:]) is None
    for wrong in (sigmas[:-1], sigmas[1:3], sigmas[-1:], (), (*sigmas, 0.0), (sigmas[0], 0.0)):
        assert PRESETS["sdxl-lightning-4"].check(wrong)


def test_a_student_of_ones_own():
    trained = [(14.6, 1.6, 0.0), (14.6, 4.0, 1.6, 0.6, 0.0)]
    assert check_levels("mine", trained, [14.6, 1.6, 0.0]) is None
    said = check_levels("mine", trained, [14.6, 3.0, 0.0])
    assert said.startswith("mine was trained for the levels 14.6, 1.6, 0, and these are 14.6, 3, 0")
    assert check_levels("mine", trained, [math.nan, 1.6, 0.0])


def test_klein_is_checked_at_its_size():
    klein = PRESETS["flux2-klein"]
    small = klein.sigmas(size=(512, 512))
    assert klein.check(small, size=(512, 512)) is None and klein.check(small)


def test_experts_of_wan():
    """Two steps for each expert, on either side of the boundary."""
    for name, boundary in (("wan22-lightning-t2v", 0.875), ("wan22-lightning-i2v", 0.9)):
        preset = PRESETS[name]
        assert preset.expert_boundary == boundary
        assert [tau >= boundary for tau in preset.sigmas()[:-1]] == [True, True, False, False]


# The docs -----------------------------------------------------------------------------------------


def test_the_docs_table_is_the_code_s():
    stored = presets_table.TABLE.read_text(encoding="utf-8")
    assert stored == presets_table.text(), "make it anew: python benchmarks/presets_table.py"


def test_the_page_s_example(capsys):
    """Its levels are those in its comment, and the wrong ones are told."""
    page = Path(presets_table.TABLE).with_name("presets.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    variables = {}
    exec(compile(code, "presets.md", "exec"), variables)
    said = re.search(r"# (14\.61, .*)", code)[1]
    assert said == ", ".join(f"{sigma:.4g}" for sigma in variables["sigmas"])
    assert "was trained for the levels" in capsys.readouterr().out


def test_flow_is_kdpp_s_word_for_it():
    """A preset with τ is for a denoiser that says flow = True."""
    assert is_flow(FlowDenoiser(lambda x, t: x)) == PRESETS["flux-schnell"].flow
