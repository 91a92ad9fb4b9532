"""The lab's training: settings, networks, checkpoints, the loop, its methods, kills and processes.

``python tests/test_lab_training.py kill N FOLDER`` kills a run N times; the test, a few times.
"""

import argparse
import csv
import dataclasses
import errno
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

pytest.importorskip("sklearn")

import kdpp
from kdpp.digits import NULL_CLASS, load_student, load_teacher
from kdpp.lab import files, processes
from kdpp.lab import train as command
from kdpp.lab.data import Data, load_data
from kdpp.lab.methods import METHODS, Draws, Job, Method, Task, cosine, load_methods, method
from kdpp.lab.methods.consistency import Consistency
from kdpp.lab.methods.teacher import Teacher
from kdpp.lab.models import load_model, save_model
from kdpp.lab.networks import VEDenoiser, build
from kdpp.lab.settings import as_dict, fill, read_toml, read_value, setting, to_toml
from kdpp.lab.trainer import Run, train

TINY = {"width": 12, "hidden": 16, "blocks": 1}
LARGER = {"width": 16, "hidden": 32, "blocks": 1}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


def tiny_data(count: int = 60, shape: tuple[int, ...] = (1, 4, 4)) -> Data:
    """Three classes, each a bright spot somewhere else."""
    random_state = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.full((count, *shape), -0.8)
    images.flatten(1)[torch.arange(count), labels * 3] = 0.8
    images += 0.1 * torch.randn(images.shape, generator=random_state)
    return Data(images.clamp(-1, 1), labels, 3, "spots")


def tiny_run(name: str, seed: int = 0, teacher: Any = None, data: Any = None, **settings) -> Run:
    chosen = load_methods()[name]
    small = {"iterations": 12, "batch": 16}
    names = [field.name for field in dataclasses.fields(chosen.settings)]
    small |= {"network": TINY} if "network" in names else {}
    return Run(
        chosen, fill(chosen.settings, small | settings), data or tiny_data(), teacher, "t", seed
    )


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A teacher of the spots, good enough to be distilled."""
    out = tmp_path_factory.mktemp("teacher")
    with processes.single_thread():
        settings = {"iterations": 200, "batch": 64, "rate": 1e-2, "average": 0.95}
        train(tiny_run("teacher", network=LARGER, **settings), out)
    return load_model(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop(run: Run, out: Path, at: int, save_every: int = 2) -> None:
    """Train, and fail at iteration `at`."""
    step = run.method.make.step

    def failing(self, i, draws):
        if i == at:
            raise RuntimeError("stopped")
        return step(self, i, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.method.make, "step", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            train(run, out, save_every=save_every)


def losses(folder: Path) -> list[float]:
    with open(folder / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


class Toy(Task):
    """A Task that draws from torch's global stream too, and breaks where it is told to."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        iterations: int = setting(10, "steps")
        nan_loss: int = setting(-1, "the step whose loss is no number")
        nan_weight: int = setting(-1, "the step that spoils a weight")

    def __init__(self, job: Job) -> None:
        self.settings = job.settings
        self.iterations = job.settings.iterations
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            self.network = build(TINY | {"shape": [1, 4, 4], "classes": 3})
        self.modules = {"network": self.network, "again": self.network}  # they share tensors
        self.optimisers = {"network": torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9)}

    def step(self, i: int, draws: Draws) -> dict[str, torch.Tensor]:
        s = self.settings
        images, labels = draws.batch(8)
        t = torch.rand(8) * 999
        loss = (self.network(images, t, labels.clamp(min=1)) - draws.noise(images)).square().mean()
        self.optimisers["network"].zero_grad()
        loss.backward()
        self.optimisers["network"].step()
        if i == s.nan_weight:  # no loss shows this one
            self.network.label.weight.data[0] = torch.inf
        bad = torch.tensor(torch.nan if i == s.nan_loss else 1.0)
        return {"loss": loss.detach(), "other": bad} if i % 2 == 0 else {"loss": loss.detach()}

    def result(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        about = {"sampler": "euler", "levels": None, "conditions": {}, "guidance": None}
        return self.network, about | {"evaluations": 8 * self.iterations}


TOY = Method("toy", "a toy", "none", Toy.Settings, Toy, teacher=False)


def toy(seed: int = 0, **settings: Any) -> Run:
    return Run(TOY, fill(Toy.Settings, settings), tiny_data(), seed=seed)


# Settings


@dataclasses.dataclass(frozen=True)
class Some:
    count: int = setting(3, "a count", low=1, high=9)
    rate: float = setting(0.1, "a rate", low=0)
    kind: Literal["a", "b"] = setting("a", "a kind")
    name: str = setting("x", "a name")
    flag: bool = setting(False, "a flag")
    levels: tuple[float, ...] = setting((1.0, 0.0), "levels", low=0)
    network: dict[str, Any] | None = setting({"width": 4}, "a table")


def test_settings_are_filled_and_converted():
    given = {"rate": 2, "levels": [3, 2, 0], "network": None, "kind": "b"}
    filled = fill(Some, given)
    assert filled == Some(rate=2.0, levels=(3.0, 2.0, 0.0), network=None, kind="b")
    assert isinstance(filled.rate, float) and isinstance(filled.levels[0], float)
    assert fill(Some, {}) == Some() and Some().network is not Some().network


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cuont": 3}, "unknown setting of toy 'cuont'; did you mean 'count'?"),
        ({"count": 3.0}, "count is 3.0; it must be a whole number"),
        ({"count": True}, "count is True; it must be a whole number"),
        ({"count": 10}, r"count is 10; it must be in \[1, 9\]"),
        ({"rate": "1"}, "rate is '1'; it must be a finite number"),
        ({"rate": float("nan")}, "rate is nan; it must be a finite number"),
        ({"rate": -1}, "rate is -1.0; it must be at least 0"),
        ({"kind": "c"}, "kind is 'c'; it must be 'a' or 'b'"),
        ({"flag": 1}, "flag is 1; it must be true or false"),
        ({"name": 1}, "name is 1; it must be text"),
        ({"levels": 1.0}, r"levels is 1.0; it must be a list \(a finite number, …\)"),
        ({"levels": [1, "a"]}, r"levels is \[1, 'a'\]; it must be a list"),
        ({"levels": [1, -1]}, r"levels is \(1.0, -1.0\); it must be at least 0"),
        ({"network": 4}, "network is 4; it must be a table or none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        fill(Some, given, "of toy")


def test_flags_are_read_as_toml():
    texts = {
        "count": ("7", 7),
        "rate": ("2e-3", 2e-3),
        "kind": ("b", "b"),
        "name": ("a b", "a b"),
        "flag": ("true", True),
        "levels": ("[1, 0.5]", [1, 0.5]),
        "network": ("{width = 8, list = [1]}", {"width": 8, "list": [1]}),
    }
    for name, (text, value) in texts.items():
        assert read_value(Some, name, text) == value
    assert read_value(Some, "network", "none") is None
    with pytest.raises(ValueError, match="count is 'many'; it must be a whole number"):
        fill(Some, {"count": read_value(Some, "count", "many")})


def test_settings_survive_a_toml_file(tmp_path):
    some = Some(
        rate=1e-7, name='a "b" \\ ü', network={"width": 4, "list": ["x", 1.5], "none": None}
    )
    (tmp_path / "s.toml").write_text(to_toml(as_dict(some)), encoding="utf-8")
    back = fill(Some, read_toml(tmp_path / "s.toml"))
    assert back == dataclasses.replace(some, network={"width": 4, "list": ["x", 1.5]})
    with pytest.raises(FileNotFoundError, match=r"none\.toml could not be read"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "s.toml").write_text("a = = b")
    with pytest.raises(ValueError, match=r"s\.toml is no TOML file: "):
        read_toml(tmp_path / "s.toml")


# Files


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, place):
    path = tmp_path / "a.txt"
    files.write_atomically(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, place, full)
    with pytest.raises(OSError, match=r"^\S+a\.txt could not be written \(No space left on device"):
        files.write_atomically(path, b"new")
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_a_folder_is_one_run_at_a_time(tmp_path):
    # Another process's lock is another open file's lock.
    with files.locked(tmp_path):
        with pytest.raises(BlockingIOError, match="another run writes to"):
            train(toy(), tmp_path)
        assert contents(tmp_path) == {}
    assert train(toy(), tmp_path)


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert train(toy(), tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=r"the folder \S+b could not be made .*; name another"):
        train(toy(), tmp_path / "a" / "b")


# Networks and models


def test_the_denoiser_is_k_diffusions():
    external = kdpp.kdiffusion.external
    network = load_teacher()
    ours, theirs = VEDenoiser(network), external.CompVisDenoiser(network)
    torch.manual_seed(0)
    sigma = torch.tensor([0.0292, 0.03, 0.05, 0.7, 1.3, 3.0, 14.6, 14.6146])
    x = torch.randn(8, 1, 8, 8) * (1 + sigma.view(-1, 1, 1, 1))
    cond = torch.arange(8)
    torch.testing.assert_close(
        ours(x, sigma, cond), theirs(x, sigma, cond=cond), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.sigma_to_t(sigma), theirs.sigma_to_t(sigma))
    torch.testing.assert_close(ours.get_sigmas(7), theirs.get_sigmas(7))
    torch.testing.assert_close(ours.sigma_min, theirs.sigma_min)
    torch.testing.assert_close(ours.sigma_max, theirs.sigma_max)
    t = torch.tensor([0.0, 17.25, 999.0])
    torch.testing.assert_close(ours.t_to_sigma(t), theirs.t_to_sigma(t))


def filled(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    network = build(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network.eval().requires_grad_(False)


UNET = {
    "kind": "unet",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


@pytest.mark.parametrize("config", [TINY, UNET], ids=["resmlp", "unet"])
def test_networks_take_other_shapes_classes_and_conditions(tmp_path, config):
    if config is UNET:
        pytest.importorskip("diffusers")
    whole = {**config, "shape": [2, 4, 4], "classes": 3, "conditions": ["w", "steps"]}
    network = filled(whole)
    x, t, cond = torch.randn(4, 2, 4, 4), torch.tensor([0.0, 3.5, 500, 999]), torch.arange(4)
    w, steps = torch.tensor([0.0, 1, 2, 3]), torch.tensor(8.0)
    out = network(x, t, cond, w=w, steps=steps)
    assert out.shape == x.shape
    for other in (
        network(x, t, cond, w=w + 0.1, steps=steps),
        network(x, t, cond, w=w, steps=steps / 2),
        network(x, t + 0.5, cond, w=w, steps=steps),
        network(x, t, 3 - cond, w=w, steps=steps),
    ):
        assert (other - out).flatten(1).abs().amax(1).min() > 1e-5
    one = network(x[2:3], t[2:3], cond[2:3], w=w[2:3], steps=steps)
    torch.testing.assert_close(one, out[2:3], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"conditions are \['steps', 'w'\], given: \['w'\]"):
        network(x, t, cond, w=w)
    about = {"network": network.config, "data": {"shape": [2, 4, 4], "classes": 3}}
    about |= {"conditions": {"w": [0, 4]}, "levels": [2.0, 0.0], "sampler": "euler"}
    save_model(tmp_path / "m.safetensors", network, about)
    model = load_model(tmp_path / "m.safetensors")
    assert torch.equal(model.network(x, t, cond, w=w, steps=steps), out)
    assert model.about == about and model.network.config == network.config
    assert (model.shape, model.classes, model.levels) == ((2, 4, 4), 3, (2.0, 0.0))
    assert (model.needs_w, model.sampler) == (True, "euler")
    assert not any(p.requires_grad for p in model.network.parameters())


def test_a_new_condition_starts_without_effect():
    network = build({**TINY, "conditions": ["w"]})
    for layer in (network.leave, network.modulation, network.blocks[0].modulation):
        torch.nn.init.normal_(layer.weight)
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500]), torch.arange(2)
    a, b = (network(x, t, cond, w=torch.tensor([w, w])) for w in (0.0, 3.0))
    assert torch.equal(a, b) and a.abs().max() > 0


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"kind": "resmpl"}, "unknown network kind 'resmpl'; did you mean 'resmlp'?"),
        ({"width": 4, "hidden": 4, "bloks": 1}, "kind 'resmlp' cannot be built: .*bloks"),
        ({"width": 0, "hidden": 4, "blocks": 1}, "width must be a whole number"),
        ({"kind": "unet", "shape": [4], "classes": 2}, "a unet needs images"),
    ],
)
def test_networks_that_cannot_be_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(config)


def test_the_shipped_models_are_the_shipped_networks():
    for name, shipped in (("digits:teacher", load_teacher()), ("digits:student", load_student())):
        model = load_model(name)
        for a, b in zip(model.network.parameters(), shipped.parameters(), strict=True):
            assert torch.equal(a, b)
        assert (model.shape, model.classes, model.levels) == ((1, 8, 8), NULL_CLASS, None)
        assert not model.needs_w
    assert load_model("digits:teacher").sampler == "euler" and model.sampler == "lcm"
    with pytest.raises(ValueError, match="unknown model 'digits:techer'; did you mean 'digits:te"):
        load_model("digits:techer")


def test_damaged_checkpoints_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in .*; is its training"):
        load_model(tmp_path)
    train(toy(iterations=1), tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    damage = (
        whole[:-10],
        b"",
        whole.replace(b"kdpp.lab", b"kdpp.lob"),
        whole.replace(b"12", b"13"),
    )
    for damaged in damage:
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"model\.safetensors is no checkpoint of kdpp's lab: "
        ):
            load_model(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    network = build(TINY)
    network.leave.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"leave\.bias is not finite"):
        save_model(tmp_path / "m.safetensors", network, {})
    assert contents(tmp_path) == {}


# Draws


def draws(i: int = 3, seed: int = 0) -> Draws:
    return Draws(tiny_data(), seed, i, CPU)


def everything(some: Draws) -> list[torch.Tensor]:
    images, labels = some.batch(8)
    rest = some.uniform(len(images)), some.integers(1000, len(images)), some.noise(images)
    return [images, labels, some.dropped(labels, 0.5), *rest]


def test_draws_are_those_of_their_seed_and_iteration():
    first = everything(draws())
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, everything(draws())))
    assert torch.equal(torch.get_rng_state(), state)
    for other in (draws(i=4), draws(seed=1)):
        assert not any(map(torch.equal, first, everything(other)))


def test_draws_have_their_distributions():
    some = draws()
    uniform, noise = some.uniform(20_000), some.noise(torch.zeros(20_000, 2))
    assert uniform.min() >= 0 and uniform.max() < 1 and uniform.dtype == torch.float32
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    assert some.integers(3, 20_000).bincount().tolist() == pytest.approx([6667] * 3, rel=0.05)
    labels = torch.arange(20_000) % 3
    dropped = some.dropped(labels, 0.12)
    assert (dropped == 3).double().mean() == pytest.approx(0.12, abs=0.01)
    assert torch.equal(dropped[dropped != 3], labels[dropped != 3])


def test_processes_share_what_one_would_draw(monkeypatch):
    whole = everything(draws())
    monkeypatch.setattr(processes, "size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(everything(draws()))
    for share, parts in zip(whole, zip(*shares)):
        assert torch.equal(torch.cat(parts), share)
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 2 processes"):
        draws().batch(7)


# The loop


def test_one_run_is_reproducible_and_leaves_the_global_stream_alone(tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(toy(seed), tmp_path / name)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and set(a) == {"model.safetensors", "log.csv", "settings.toml"}
    assert a["model.safetensors"] != c["model.safetensors"] and a["log.csv"] != c["log.csv"]


def test_the_log_has_every_iteration_and_settings_can_be_given_back(tmp_path):
    train(toy(), tmp_path)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == [str(i) for i in range(10)]
    assert [row["other"] for row in rows] == ["1.0", ""] * 5
    assert all(float(row["loss"]) > 0 for row in rows)
    table = read_toml(tmp_path / "settings.toml")
    assert table == {"method": "toy", "seed": 0, "data": "spots", **as_dict(Toy.Settings())}


@pytest.mark.parametrize("at", [1, 4, 6, 9])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, at):
    """Stopped by an error; what a kill may leave besides is put there by hand."""
    train(toy(), tmp_path / "whole")
    out = tmp_path / "stopped"
    stop(toy(), out, at)
    assert (out / "state.safetensors").exists() == (at > 1)
    (out / ".state.safetensors.17.part").write_bytes(b"half a st")
    with open(out / "log.csv", "a") as log:
        log.write("4,0.1,0.2\n5,0.")
    assert train(toy(), out, save_every=5)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    train(toy(), tmp_path)
    before = contents(tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"of a run killed just before its end")
    assert not train(toy(), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_run_is_refused_with_what_differs(tmp_path, finished):
    if finished:
        train(toy(), tmp_path)
    else:
        stop(toy(), tmp_path, 5)
    before = contents(tmp_path)
    other = Data(tiny_data().images + 0.01, tiny_data().labels, 3, "spots")
    for run, sentence in (
        (toy(iterations=11), "holds a run with iterations 10 and not 11; give the same"),
        (toy(seed=1), "holds a run with seed 0 and not 1"),
        (Run(TOY, toy().settings, other), r"holds a run with data '\w+' and not '\w+'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(run, tmp_path)
        assert contents(tmp_path) == before


def test_a_damaged_state_is_refused(tmp_path):
    stop(toy(), tmp_path, 5)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged .*; remove it to start"):
        train(toy(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"nan_loss": 6}, "other is nan at iteration 6; the state after 4 iterations is kept in"),
        (
            {"nan_weight": 5},
            r"label\.weight of network is not finite after iteration 7; the state af",
        ),
        ({"nan_weight": 9}, "of network is not finite after iteration 9; the state after 8 iterat"),
        ({"nan_loss": 2}, "other is nan at iteration 2; Train anew into another folder with a low"),
    ],
)
def test_a_run_that_diverges_stops_and_keeps_the_last_good_state(tmp_path, settings, sentence):
    with pytest.raises(FloatingPointError, match=sentence):
        train(toy(**settings), tmp_path, save_every=4)
    assert not (tmp_path / "model.safetensors").exists()
    names = set(contents(tmp_path))
    assert names - {"state.safetensors"} == {"log.csv", "settings.toml"}
    if "state.safetensors" in names:
        task = Toy(Job(tiny_data(), None, toy(**settings).settings, 0, CPU))
        from kdpp.lab.trainer import _load_state

        _load_state(toy(**settings), task, tmp_path)
        assert all(p.isfinite().all() for p in task.network.parameters())


def test_a_rate_too_high_is_said_where_it_shows(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is (inf|nan) at iteration \d+; .*lower ra"):
        train(tiny_run("teacher", rate=1e30), tmp_path)


@pytest.mark.parametrize("write", range(1, 6))
def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_later(tmp_path, monkeypatch, write):
    """Whichever write fails, of settings, log, states and model."""
    train(toy(), tmp_path / "whole")
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == write:
            os.ftruncate(handle, max(0, os.fstat(handle).st_size - 10))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "full"
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\)"):
        train(toy(), out, save_every=6)
    assert not [name for name in os.listdir(out) if name.endswith(".part")]
    monkeypatch.undo()
    assert train(toy(), out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_loss_that_was_not_there_at_first_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "step", lambda self, i, draws: {f"loss{i}": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="toy has a loss at iteration 1 that it had not at first"):
        train(toy(), tmp_path)


def test_teacher_and_data_must_fit(tmp_path, teacher):
    with pytest.raises(ValueError, match="consistency needs a teacher: --teacher FILE"):
        train(tiny_run("consistency"), tmp_path)
    with pytest.raises(ValueError, match=r"makes images \[1, 4, 4\] of 3 classes, and the data ar"):
        train(tiny_run("consistency", teacher=teacher, data=load_data("digits")), tmp_path)
    with pytest.raises(ValueError, match="save_every is 0"):
        train(toy(), tmp_path, save_every=0)
    assert contents(tmp_path) == {}


# Methods

VARIANTS = [
    ("teacher", {"average": 0.9}),
    ("teacher", {"average": 0.9, "loss": "eps", "network": LARGER}),
    ("consistency", {"skip": 300.0}),
    ("consistency", {"loss": "huber", "network": None}),
    ("consistency", {"skip": 300.0, "w_range": (0.0, 2.0)}),
    ("lora-consistency", {"rank": 2}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_method_learns_and_its_model_samples(tmp_path, teacher, name, settings):
    if name.startswith("lora"):
        pytest.importorskip("peft")
    iterations = 200 if name == "teacher" else 80
    run = tiny_run(name, teacher=teacher, iterations=iterations, batch=64, rate=1e-2, **settings)
    assert train(run, tmp_path)
    curve = losses(tmp_path)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    model = load_model(tmp_path / "model.safetensors")
    assert model.about["method"] == name and model.about["iterations"] == iterations
    assert model.about["evaluations"] == iterations * 64 * (1 if name == "teacher" else 4)
    digest = model.about["data"].pop("digest")
    assert len(digest) == 16
    spots = {"source": "spots", "shape": [1, 4, 4], "classes": 3, "bounded": True}
    assert model.about["data"] == spots
    assert model.needs_w == ("w_range" in settings)
    student = kdpp.GuidanceConditioned(model.denoiser) if model.needs_w else model.denoiser
    guided = kdpp.TeacherGuidedDenoiser(student, teacher.denoiser, teacher_scale=0.1)
    sample = getattr(kdpp, f"sample_{model.sampler}_tg")
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    sigmas = torch.tensor([14.6, 3.0, 0.5, 0.0])
    extra_args = {"cond": labels, "uncond": torch.full_like(labels, 3), "cond_scale": 1.0}
    images = sample(guided, torch.randn(60, 1, 4, 4) * 14.6, sigmas, extra_args, disable=True)
    brightest = images.flatten(1)[:, [0, 3, 6]].argmax(1)
    # The loss on ε leaves the high noise levels, where the label is decided, for later.
    least = 0.6 if settings.get("loss") == "eps" else 0.9
    assert images.isfinite().all() and (brightest == labels).double().mean() > least


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_every_method_resumes_bit_for_bit(tmp_path, teacher, name, settings):
    if name.startswith("lora"):
        pytest.importorskip("peft")
    run = tiny_run(name, teacher=teacher, **settings)
    train(run, tmp_path / "whole")
    stop(run, tmp_path / "stopped", 7, save_every=3)
    train(run, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["v", "eps"])
def test_the_teachers_loss_is_that_of_its_docstring(loss):
    """Written out in VP, x_vp = a x0 + b n and v = a n - b x0, at iteration 6 of 12."""
    run = tiny_run("teacher", loss=loss, dropout=0.5)
    task = Teacher(Job(run.data, None, run.settings, 0, CPU))
    for p in task.network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    some = Draws(run.data, 0, 6, CPU)
    images, labels = some.batch(16)
    labels = some.dropped(labels, 0.5)
    t, noise = some.uniform(16) * 999, some.noise(images)
    a = (1 + task.network.sigma(t) ** 2).rsqrt().view(-1, 1, 1, 1)
    b = (1 - a**2).sqrt()
    x_vp = a * images + b * noise
    v = task.network(x_vp, t, labels)
    wrong = v - (a * noise - b * images) if loss == "v" else b * x_vp + a * v - noise
    expected = wrong.square().mean().item()
    found = task.step(6, Draws(run.data, 0, 6, CPU))["loss"].item()
    assert found == pytest.approx(expected, rel=1e-4)
    rate = task.optimisers["network"].param_groups[0]["lr"]
    assert rate == pytest.approx(run.settings.rate / 2)  # half way down the cosine
    assert (cosine(0, 12, 0.1), cosine(12, 12, 0.1)) == (0.1, 0.0)


def test_the_two_distances(teacher):
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.3, 1.0])
    for loss, expected in (("squared", 0.045), ("huber", ((0.09 + 0.01) ** 0.5 - 0.1) / 2)):
        run = tiny_run("consistency", teacher=teacher, loss=loss, huber=0.1)
        task = Consistency(Job(run.data, teacher, run.settings, 0, CPU))
        assert task._distance(a, b).item() == pytest.approx(expected)


def test_the_consistency_target_is_the_average_at_the_end_of_the_teachers_step(teacher):
    """Written out at a timestep above the skip, and at one below, where the step ends at 0."""
    run = tiny_run("consistency", teacher=teacher, w_range=(0.0, 3.0))
    task = Consistency(Job(run.data, teacher, run.settings, 0, CPU))
    for p in task.average.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, labels = torch.randn(2, 1, 4, 4) * 3, torch.tensor([1, 2])
    t, w = torch.tensor([300.5, 7.0]), torch.tensor([0.5, 2.0])
    target = task._target(x, t, labels, {"w": w})
    net = teacher.network
    null = torch.full_like(labels, 3)
    halves = net.denoise(x, t, null), net.denoise(x, t, labels)
    scale = (1 + w).view(-1, 1, 1, 1)
    estimate = halves[0] + scale * (halves[1] - halves[0])
    torch.testing.assert_close(target[1], estimate[1])
    s = t[:1] - 20
    x_s = estimate[:1] + net.sigma(s) * (x - estimate)[:1] / net.sigma(t[:1])
    expected = task.average.denoise(x_s, s, labels[:1], w=w[:1])
    torch.testing.assert_close(target[:1], expected)


def test_a_student_from_the_teachers_weights_starts_as_the_teacher(teacher):
    run = tiny_run("consistency", teacher=teacher, network=None, w_range=(0.0, 3.0))
    task = Consistency(Job(run.data, teacher, run.settings, 0, CPU))
    x, t, labels = torch.randn(3, 1, 4, 4), torch.tensor([1.0, 500, 900]), torch.arange(3)
    for network in (task.network, task.average):
        made = network(x, t, labels, w=torch.tensor(1.5))
        assert torch.equal(made, teacher.network(x, t, labels))


def test_a_low_rank_student_changes_the_teacher_by_its_rank(tmp_path, teacher):
    pytest.importorskip("peft")
    train(tiny_run("lora-consistency", teacher=teacher, rank=2), tmp_path)
    model = load_model(tmp_path)
    before = teacher.network.state_dict()
    changed = []
    for name, after in model.network.state_dict().items():
        change = after - before[name]
        if change.abs().max() == 0:
            continue
        changed.append(name)
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    layers = [n for n, m in teacher.network.named_modules() if isinstance(m, torch.nn.Linear)]
    assert changed == [f"{name}.weight" for name in layers]


def test_a_teacher_with_guidance_inside_is_refused(tmp_path, teacher):
    inside = dataclasses.replace(teacher, about=teacher.about | {"guidance": 2.0})
    with pytest.raises(ValueError, match="the teacher is guided already"):
        train(tiny_run("consistency", teacher=inside), tmp_path)


# The registry and the command


def test_the_registry_names_what_there_is():
    assert {"teacher", "consistency", "lora-consistency"} <= set(load_methods())
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    taken = set(vars(parser.parse_args([])))
    for name, entry in METHODS.items():
        assert entry.name == name and entry.summary and entry.source
        entry.settings()  # every setting has a default
        fields = dataclasses.fields(entry.settings)
        assert all(field.metadata.get("help") for field in fields)
        assert not {field.name for field in fields} & taken
    assert not METHODS["teacher"].teacher and METHODS["consistency"].teacher
    with pytest.raises(ValueError, match="there is a method named 'teacher' already"):
        method("teacher", summary="", source="")(Toy)


def run_command(*arguments: Any) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="session")
def spots(tmp_path_factory) -> Path:
    """The spots as a file."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("data") / "spots.safetensors"
    data = tiny_data()
    save_file({"images": data.images, "labels": data.labels}, path)
    return path


def test_the_command_trains_from_flags_and_from_its_own_settings_file(tmp_path, spots, capsys):
    flags = ("--iterations", 3, "--batch", 8, "--network", "{width=4, hidden=4, blocks=1}")
    a, b = tmp_path / "a", tmp_path / "b"
    run_command("teacher", "--out", a, "--seed", 5, "--data", spots, *flags)
    assert capsys.readouterr().out == f"wrote {a}/model.safetensors\n"
    about = load_model(a).about
    assert about["seed"] == 5 and about["settings"]["network"]["width"] == 4
    run_command("--config", a / "settings.toml", "--out", b, "teacher")
    assert contents(a) == contents(b)
    run_command("teacher", "--config", a / "settings.toml", "--out", b)
    assert capsys.readouterr().out.endswith(f"finished before: {b}/model.safetensors\n")
    run_command("teacher", "--config", a / "settings.toml", "--out", tmp_path / "c", "--seed", 6)
    assert load_model(tmp_path / "c").about["seed"] == 6
    small = ("--iterations", 2, "--batch", 8, "--network", "none", "--w-range", "[0, 1]")
    run_command("consistency", "--out", tmp_path / "d", "--teacher", a, "--data", spots, *small)
    about = load_model(tmp_path / "d").about
    assert about["conditions"] == {"w": [0.0, 1.0]} and about["teacher"]["name"] == str(a)


def test_the_command_lists_and_explains_the_methods(capsys):
    run_command("--list")
    listed = capsys.readouterr().out
    assert "lora-consistency" in listed and "Luo et al. 2023 (LCM), Algorithm 1" in listed
    with pytest.raises(SystemExit) as stopped:
        run_command("consistency", "--help")
    assert stopped.value.code == 0
    assert "share of labels that are dropped (default: 0.12)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "which METHOD?"),
        (("techer", "--out", "x"), "unknown method 'techer'; did you mean 'teacher'?"),
        (("teacher",), "--out DIR"),
        (
            ("teacher", "--out", "x", "--itertions", "3"),
            "'--itertions'; did you mean '--iterations",
        ),
        (
            ("teacher", "--out", "x", "--rank", "3"),
            "unknown argument '--rank'; did you mean '--rate",
        ),
        (("teacher", "--out", "x", "--batch", "0"), "batch is 0; it must be at least 1"),
        (("teacher", "--out", "x", "--seed", "-1"), r"seed is -1; it must be in \[0, 4294967295\]"),
        (
            ("teacher", "--out", "x", "--data", "digts"),
            "unknown data 'digts'; did you mean 'digits",
        ),
        (("teacher", "--out", "x", "--device", "gpu"), "the device is 'gpu'"),
        (
            ("consistency", "--out", "x", "--w_range", "[1, 0]"),
            "w_range is .*two numbers that rise",
        ),
        (("consistency", "--out", "x", "--teacher", "digits:x"), "unknown model 'digits:x'"),
    ],
)
def test_the_command_refuses_what_cannot_be_before_any_work(
    tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        run_command(*arguments)
    assert contents(tmp_path) == {}


def test_a_settings_file_is_checked_as_flags_are(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('method = "teacher"\niteratons = 3\n')
    with pytest.raises(ValueError, match="setting of teacher 'iteratons'; did you mean 'iteration"):
        run_command("teacher", "--config", path, "--out", tmp_path / "a")
    with pytest.raises(ValueError, match=r"s\.toml is for another method than consistency"):
        run_command("consistency", "--config", path, "--out", tmp_path / "a")
    assert set(contents(tmp_path)) == {"s.toml"}


# Kills and processes. A fresh interpreter forks the runs, so that each need not import torch; it
# trains none itself, since torch cannot fork once it has (where there is a GPU).


def forked(work) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(pid: int) -> int:
    """The signal that ended the process, 0 if none did; SystemExit if it failed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code > 0:
        raise SystemExit("a run failed")
    return -code


SMALL_FLAGS = ("--batch", 8, "--network", "{width = 8, hidden = 8, blocks = 1}")


def kill_again_and_again(kills: int, folder: Path) -> None:
    """Kill one run so often, a few states further each time: at any moment, and within a write."""
    flags = (*SMALL_FLAGS, "--iterations", 40 * kills, "--save-every", 3)
    whole, out = folder / "whole", folder / "killed"
    ended(forked(lambda: run_command("teacher", "--out", whole, *flags)))

    def state() -> int:
        path = out / "state.safetensors"
        return path.stat().st_mtime_ns if path.exists() else 0

    def until(true, pause: float) -> None:
        patience = time.monotonic() + 60
        while not true() and time.monotonic() < patience:
            time.sleep(pause)

    moment, killed = random.Random(time.time_ns()), []
    while len(killed) < kills:
        pid = forked(lambda: run_command("teacher", "--out", out, *flags))
        for _ in range(moment.randint(1, 3)):
            before = state()
            until(lambda before=before: state() != before, 0.0003)
        if len(killed) % 2:
            until(lambda: any(out.glob(".state*.part")), 0)
        else:
            time.sleep(moment.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == signal.SIGKILL, "it ended before it was killed"
        killed.append(any(out.glob(".*.part")))
    ended(forked(lambda: run_command("teacher", "--out", out, *flags)))
    assert contents(out) == contents(whole)
    print(f"killed {kills} times, within a write {sum(killed)} of them")


def share_among_processes(count: int, folder: Path) -> None:
    """Train once alone and once in so many processes, of which the main one alone may write."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    flags = ("teacher", *SMALL_FLAGS, "--iterations", 12, "--save-every", 5)

    def refuse(*_: Any) -> None:
        raise AssertionError("only the main process writes")

    def one_of_several(rank: int) -> None:
        os.environ |= several | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank:
            os.fsync = os.replace = os.mkdir = refuse
        run_command(*flags, "--out", folder / "several")

    ended(forked(lambda: run_command(*flags, "--out", folder / "alone")))
    for pid in [forked(lambda rank=rank: one_of_several(rank)) for rank in range(count)]:
        ended(pid)


def in_a_fresh_interpreter(what: str, number: int, folder: Path) -> str:
    if not hasattr(os, "fork"):
        pytest.skip("runs are killed and joined as forks, which this system has not")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__, what, str(number), str(folder)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(tmp_path):
    assert "killed 4 times" in in_a_fresh_interpreter("kill", 4, tmp_path)


def test_two_processes_train_what_one_does_and_one_writes(tmp_path):
    said = in_a_fresh_interpreter("share", 2, tmp_path)
    assert said.count("wrote") == 2
    alone, several = tmp_path / "alone", tmp_path / "several"
    assert losses(several) == pytest.approx(losses(alone), rel=1e-5)
    a, b = load_model(alone), load_model(several)
    assert a.about == b.about and set(contents(several)) == set(contents(alone))
    for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which every optimiser does, and which makes folders
    work = {"kill": kill_again_and_again, "share": share_among_processes}
    work[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
