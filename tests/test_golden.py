"""Every solver gives what it gave: the golden trajectories (tests/golden.py)."""

import pytest
from safetensors.torch import load_file

import golden
import needs
from problems import relative

KEPT = load_file(golden.FILE)
SOLVERS = {short: (sample, parameters) for short, sample, parameters in golden.solvers()}


def check(made, prefix):
    """The runs are those that are kept, to 1e-12: the last bits may differ between processors."""
    kept = {name: KEPT[name] for name in KEPT if name.startswith(prefix) and name != golden.TREE}
    made = {f"{prefix}{name}": found for name, found in made}
    assert made.keys() == kept.keys(), "write the golden runs anew, and say why in docs/changes.md"
    for name, found in made.items():
        assert relative(found, kept[name]) <= 1e-12, name


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_gives_what_it_gave(solver):
    """Plain, guided, CFG++, flow, seeded, churned; all its options."""
    check(golden.runs_of(solver, *SOLVERS[solver]), f"{solver}: ")


def test_the_rest_gives_what_it_gave():
    """Rollouts, encoding, editing, and the sources of noise."""
    check(golden.other_runs(), "other: ")


@needs.k_diffusion
def test_the_tree_gives_what_it_gave():
    """k-diffusion's Brownian tree, where no noise sampler is given."""
    assert relative(golden.tree_run(), KEPT[golden.TREE]) <= 1e-12


def test_no_kept_run_is_of_a_solver_that_is_gone():
    assert {name.partition(":")[0] for name in KEPT} == {*SOLVERS, "other"}
