"""How trainings compute: precision, clipped gradients, compiled networks, log-normal levels."""

import dataclasses
import math

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from kdpp.cli import main
from kdpp.lab import processes
from kdpp.lab.arithmetic import Arithmetic
from kdpp.lab.methods import Training, load_methods
from kdpp.lab.models import load_model
from kdpp.lab.settings import read_toml
from kdpp.lab.trainer import Loop
from kdpp.lab.trainer import train as run
from trainings import TINY, draws, method_of, small, training_of

SHORT = {"iterations": 6, "batch": 16, "network": TINY}


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


def with_arithmetic(method: str = "consistency", **settings) -> Training:
    return dataclasses.replace(training_of(method, SHORT), arithmetic=Arithmetic(**settings))


def weights(folder):
    return load_model(folder).network.state_dict()


def watch_products(monkeypatch) -> set[torch.dtype]:
    """The types of all linear layers' outputs from here on."""
    found, forward = set(), nn.Linear.forward

    def noting(layer, x):
        out = forward(layer, x)
        found.add(out.dtype)
        return out

    monkeypatch.setattr(nn.Linear, "forward", noting)
    return found


@pytest.mark.parametrize("method", ["teacher", "consistency", "sfd", "guided-stage-one"])
def test_products_in_bfloat16_and_weights_in_float32(tmp_path, monkeypatch, method):
    training = training_of(method, small(load_methods()[method]))
    found = watch_products(monkeypatch)
    training = dataclasses.replace(training, arithmetic=Arithmetic(precision="bfloat16"))
    run(training, tmp_path, disable=True)
    assert found == {torch.bfloat16}
    assert all(
        v.dtype == torch.float32 for v in weights(tmp_path).values() if v.is_floating_point()
    )


def test_products_in_float32_are_the_default(tmp_path, monkeypatch):
    training = with_arithmetic()
    found = watch_products(monkeypatch)
    run(training, tmp_path, disable=True)
    assert found == {torch.float32}


def norm_of(optimiser: torch.optim.Optimizer) -> float:
    parameters = (p for group in optimiser.param_groups for p in group["params"])
    squares = [p.grad.square().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def test_gradients_are_clipped_after_they_are_averaged(tmp_path, monkeypatch):
    """A mean over processes of clipped gradients would be another one."""
    norms, order = [], []
    average = processes.average

    def averaging(tensors):
        tensors = list(tensors)
        if len(tensors) > 1:  # gradients, not the losses
            order.append("average")
            for tensor in tensors:
                tensor.mul_(100)  # as if another process had larger ones
        average(tensors)

    def noting(loop):
        hook_optimisers(loop)
        for optimiser in loop.method.optimisers.values():
            optimiser.register_step_pre_hook(lambda o, *_: norms.append(norm_of(o)))

    hook_optimisers = Loop._hook_optimisers
    monkeypatch.setattr(Loop, "_hook_optimisers", noting)
    monkeypatch.setattr(processes, "average", averaging)
    run(with_arithmetic("teacher"), tmp_path / "a", disable=True)
    free = norms.copy()
    run(with_arithmetic("teacher", clip=0.5), tmp_path / "b", disable=True)
    assert len(order) == 12 and min(free) > 10
    assert max(norms[6:]) <= 0.5 * (1 + 1e-5)


def test_a_norm_that_is_never_reached_changes_nothing(tmp_path):
    run(with_arithmetic(), tmp_path / "a", disable=True)
    run(with_arithmetic(clip=1e6), tmp_path / "b", disable=True)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_networks_are_compiled_for_the_training_and_left_as_they_were(tmp_path, monkeypatch):
    compiled, original = [], torch.compile

    def eagerly(function):  # the whole compiler takes minutes
        compiled.append(function.__self__)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", eagerly)
    training = with_arithmetic(compile=True)
    run(training, tmp_path / "a", disable=True)
    assert training.teacher.network in compiled and len(compiled) > 1
    assert all("forward" not in vars(network) for network in compiled)
    run(with_arithmetic(), tmp_path / "b", disable=True)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert (
        load_model(tmp_path / "a").card.evaluations == load_model(tmp_path / "b").card.evaluations
    )


def test_a_run_says_how_it_was_computed_and_goes_on_in_that_way_only(tmp_path):
    run(with_arithmetic(precision="bfloat16", clip=1.0), tmp_path, disable=True)
    card = load_model(tmp_path).card
    assert card.settings["precision"] == "bfloat16" and card.settings["clip"] == 1.0
    assert "compile" not in card.settings
    table = read_toml(tmp_path / "settings.toml")
    assert (table["precision"], table["clip"]) == ("bfloat16", 1.0)
    with pytest.raises(ValueError, match="precision 'bfloat16' and not None"):
        run(with_arithmetic(), tmp_path, disable=True)


def test_what_is_not_asked_for_is_not_written(tmp_path):
    """So a folder of an earlier kdpp is the same run."""
    run(with_arithmetic(), tmp_path, disable=True)
    assert not {"precision", "clip", "compile"} & load_model(tmp_path).card.settings.keys()


def test_the_command_takes_it_by_flag_and_by_file(tmp_path):
    short = [
        "--iterations",
        "2",
        "--batch",
        "8",
        "--network",
        "{width = 16, hidden = 16, blocks = 1}",
    ]
    given = ["train", "teacher", "--out", str(tmp_path / "a"), *short]
    assert not main([*given, "--clip", "0.5", "--precision", "bfloat16"])
    config = ["--config", str(tmp_path / "a" / "settings.toml")]
    assert not main(["train", "teacher", "--out", str(tmp_path / "b"), *config])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("flag", "value"), [("--precision", "float16"), ("--clip", "0"), ("--compile", "maybe")]
)
def test_what_cannot_be_is_refused(tmp_path, capsys, flag, value):
    assert main(["train", "teacher", "--out", str(tmp_path / "a"), flag, value])
    assert flag.strip("-") in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_log_normal_levels_are_edms(monkeypatch):
    """ln σ has the mean and deviation that are asked for, cut at the schedule's ends."""
    method = method_of("teacher", {**SHORT, "lognormal": [-1.2, 0.8]})
    sigma = method.network.sigma(method._timesteps(draws(0), 20_000))
    logs = sigma.log()
    assert math.isclose(float(logs.mean()), -1.2, abs_tol=0.02)
    assert math.isclose(float(logs.std()), 0.8, abs_tol=0.02)
    low, high = method.network.log_sigmas[[0, -1]]
    wide = method_of("teacher", {**SHORT, "lognormal": [0.0, 5.0]})
    t = wide._timesteps(draws(0), 1_000)
    assert float(t.min()) == 0.0 and float(t.max()) == 999.0
    assert logs.min() >= low and logs.max() <= high


def test_the_timestep_is_sigmas_inverse():
    network = method_of("teacher", SHORT).network
    t = torch.linspace(0, 999, 400)
    assert (network.timestep(network.sigma(t)) - t).abs().max() < 0.01
    assert network.timestep(torch.tensor([1e-9, 1e9])).tolist() == [0.0, 999.0]


def test_a_setting_that_is_none_is_none_again_from_the_file(tmp_path):
    """The default of consistency's network is a small one; none is the teacher's."""
    given = ["train", "consistency", "--iterations", "2", "--batch", "8"]
    assert not main([*given, "--out", str(tmp_path / "a"), "--network", "none"])
    config = ["--config", str(tmp_path / "a" / "settings.toml")]
    assert not main(["train", "consistency", "--out", str(tmp_path / "b"), *config])
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
