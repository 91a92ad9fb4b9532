"""The docs' tables of solvers say what the code says and what a measurement gives."""

import inspect
import re
from pathlib import Path

import pytest

import kdpp
import solver_table

COMFYUI = """
euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 exp_heun_2_x0
exp_heun_2_x0_sde dpm_2 dpm_2_ancestral lms dpm_fast dpm_adaptive dpmpp_2s_ancestral
dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_heun
dpmpp_3m_sde ddpm lcm ipndm ipndm_v deis cfgpp_ud10_ab res_multistep res_multistep_cfg_pp
res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation
gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc uni_pc_bh2
"""
"""Its list of samplers in September 2026, but for those that end in _gpu."""

LINES = {solver_table.facts(*line)[0]: line for line in solver_table.lines()}
STORED = {row[0]: row for row in solver_table.stored()}


def test_it_lists_every_solver_with_its_facts():
    """In the code's order."""
    facts = [solver_table.facts(*line) for line in LINES.values()]
    found = [row[: len(solver_table.FACTS)] for row in STORED.values()]
    assert found == facts, "make the table anew: python benchmarks/solver_table.py"


@pytest.mark.parametrize("name", [name for name in STORED if name in LINES])
def test_the_figures_are_what_is_measured(name):
    """Orders measured again to 0.02, errors to 2 %."""
    again = solver_table.figures(*LINES[name])
    for cell, now in zip(STORED[name][len(solver_table.FACTS) :], again, strict=True):
        if cell == "–":
            assert now == "–"
            continue
        said, found = (float(text.split()[0]) for text in (cell, now))
        assert found == pytest.approx(said, abs=0.02, rel=0.02)


def test_every_sampler_of_comfyui_has_a_twin():
    """Named in the page with options that it takes, for ε models at least."""
    page = (Path(__file__).parents[1] / "docs" / "solvers.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \| `(.+?)`[^|]*\| (?:`(.+?)`|–)", page, re.MULTILINE)
    twins = {name: [one for one in cells if one] for name, *cells in found}
    assert set(twins) == set(COMFYUI.split())
    for twin in (one for cells in twins.values() for one in cells):
        name, _, options = twin.rstrip(")").partition("(")
        given = dict(pair.split("=") for pair in options.split(", ") if pair)
        if name in kdpp.SOLVERS:
            known = kdpp.SOLVERS[name].options
            for option, value in given.items():
                number = not isinstance(known[option].default, str)
                known[option].read(option, type(known[option].default)(value) if number else value)
        else:
            assert given.keys() <= inspect.signature(getattr(kdpp, name)).parameters.keys()
