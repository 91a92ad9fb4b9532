"""The lab's training: settings, networks, checkpoints, the loop, its methods, kills and processes.

``python tests/test_lab_training.py kill N FOLDER`` kills a run N times; the test, a few times.
"""

import argparse
import csv
import dataclasses
import errno
import importlib
import io
import json
import os
import random
import re
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
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import kdpp
from kdpp.cli import main
from kdpp.digits import NULL_CLASS, load_student, load_teacher
from kdpp.lab import files, plugins, processes
from kdpp.lab import train as command
from kdpp.lab.console import say
from kdpp.lab.data import Data, load_data
from kdpp.lab.methods import METHODS, Draws, Method, Training, cosine, load_methods, method
from kdpp.lab.methods.consistency import Consistency, consistency_target
from kdpp.lab.methods.teacher import Teacher
from kdpp.lab.models import DataOrigin, ModelCard, Usage, load_model, save_model
from kdpp.lab.networks import VEDenoiser, VNetwork, build
from kdpp.lab.plugins import import_file
from kdpp.lab.settings import as_dict, fill, read_toml, read_value, setting, to_toml
from kdpp.lab.trainer import Loop, train
from trainings import check_samples, draws, small, spots, teacher, trained, training_of

TINY = {"width": 12, "hidden": 16, "blocks": 1}
DIGITS = {"shape": [1, 8, 8], "classes": 10}


@pytest.fixture(autouse=True)
def one_thread():
    with processes.single_thread():
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop(training: Training, out: Path, at: int, save_every: int = 2) -> None:
    """Train, and fail at iteration `at`."""
    step = training.method.step

    def failing(self, i, draws):
        if i == at:
            raise RuntimeError("stopped")
        return step(self, i, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.method, "step", failing)
        with pytest.raises(RuntimeError, match="stopped"):
            train(training, out, save_every=save_every)


def losses(folder: Path) -> list[float]:
    with open(folder / "log.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


class Toy(Method):
    """A method that draws from torch's global stream too, and breaks where it is told to."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        iterations: int = setting(10, "steps")
        nan_loss: int = setting(-1, "the step whose loss is no number")
        nan_weight: int = setting(-1, "the step that spoils a weight")

    name, summary, source, needs_teacher = "toy", "a toy", "none", False

    def __init__(self, training: Training) -> None:
        self.settings = training.settings
        self.iterations = training.settings.iterations
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(training.seed)
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

    def result(self) -> tuple[VNetwork, Usage]:
        return self.network, Usage(sampler="euler")


def toy(seed: int = 0, **settings: Any) -> Training:
    return Training(Toy, fill(Toy.Settings, settings), spots(), seed=seed)


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
    card = ModelCard(
        sampler="euler",
        levels=(2.0, 0.0),
        conditions={"w": (0.0, 4.0), "steps": (2.0, 8.0)},
        network=network.config,
        data=DataOrigin(source="tests", shape=(2, 4, 4), classes=3, bounded=True),
        method="tests",
    )
    save_model(tmp_path / "m.safetensors", network, card)
    model = load_model(tmp_path / "m.safetensors")
    assert torch.equal(model.network(x, t, cond, w=w, steps=steps), out)
    assert model.card == card and model.network.config == network.config
    assert (model.shape, model.classes, model.levels) == ((2, 4, 4), 3, (2.0, 0.0))
    assert (model.guidance_range, model.sampler) == ((1.0, 5.0), "euler")
    assert not any(p.requires_grad for p in model.network.parameters())


def test_a_new_condition_starts_without_effect():
    network = build({**TINY, **DIGITS, "conditions": ["w"]})
    for layer in (network.leave, network.modulation, network.blocks[0].modulation):
        torch.nn.init.normal_(layer.weight)
    x, t, cond = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500]), torch.arange(2)
    a, b = (network(x, t, cond, w=torch.tensor([w, w])) for w in (0.0, 3.0))
    assert torch.equal(a, b) and a.abs().max() > 0


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"kind": "resmpl", **DIGITS}, "unknown network kind 'resmpl'; did you mean 'resmlp'?"),
        ({"width": 4, "hidden": 4, "bloks": 1}, "kind 'resmlp' cannot be built: .*bloks"),
        ({"width": 0, "hidden": 4, "blocks": 1}, "width must be a whole number"),
        ({"kind": "unet", "shape": [4], "classes": 2}, "a unet needs images"),
    ],
)
def test_networks_that_cannot_be_are_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        build({**DIGITS, **config})


def test_the_shipped_models_are_the_shipped_networks():
    for name, shipped in (("digits:teacher", load_teacher()), ("digits:student", load_student())):
        model = load_model(name)
        for a, b in zip(model.network.parameters(), shipped.parameters(), strict=True):
            assert torch.equal(a, b)
        assert (model.shape, model.classes, model.levels) == ((1, 8, 8), NULL_CLASS, None)
        assert model.guidance_range is None and model.card.network == shipped.config
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
            ValueError, match=r"model\.safetensors is not a checkpoint of kdpp's lab: "
        ):
            load_model(tmp_path)


OLD = {
    "network": {"kind": "resmlp", "width": 4, "hidden": 4, "blocks": 1},
    "method": "consistency",
    "settings": {"w_range": [0.0, 3.0]},
    "seed": 0,
    "data": {"source": "digits", "shape": [1, 8, 8], "classes": 10, "bounded": True, "digest": "0"},
    "teacher": {"name": "digits:teacher", "digest": "1"},
    "kdpp": "0.1.0",
    "sampler": "lcm",
    "levels": None,
    "conditions": {"w": [0.0, 3.0]},
    "guidance": None,
    "evaluations": 4096,
    "iterations": 2,
}
"""The metadata of a file as kdpp 0.1.0 wrote it; what the digits' networks have is left out."""


def written(path: Path, about: Any, **more: torch.Tensor) -> Path:
    """A file of these metadata, and a network's weights or others in their place."""
    network = build({**OLD["network"], **DIGITS, "conditions": ["w"]})
    save_file({**network.state_dict(), **more}, path, {"kdpp.lab": json.dumps(about)})
    return path


def test_a_file_that_was_written_before_is_loaded(tmp_path):
    model = load_model(written(tmp_path / "old.safetensors", OLD))
    assert (model.shape, model.classes, model.levels) == ((1, 8, 8), 10, None)
    assert (model.sampler, model.guidance_range, model.card.guidance) == ("lcm", (1.0, 4.0), None)
    assert model.card.evaluations == 4096 and model.card.teacher.name == "digits:teacher"
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    made = model.denoiser(x, torch.ones(2), cond=labels, w=torch.zeros(2))
    assert made.shape == x.shape and made.isfinite().all()


def without(*path: str) -> dict[str, Any]:
    about = json.loads(json.dumps(OLD))
    inside = about
    for name in path[:-1]:
        inside = inside[name]
    del inside[path[-1]]
    return about


@pytest.mark.parametrize(
    ("about", "said"),
    [
        *((without(name), f"{name} is missing") for name in
          ("network", "data", "method", "sampler", "conditions", "levels", "guidance")),
        *((without("data", name), f"data.{name} is missing") for name in ("shape", "classes")),
        (OLD | {"data": 3}, "data is 3; it must be a table"),
        (OLD | {"data": OLD["data"] | {"shape": "8"}}, r"data\.shape is '8'; it must be a list"),
        (OLD | {"data": OLD["data"] | {"classes": 2.5}}, r"data\.classes is 2.5; it must be a who"),
        (OLD | {"method": None}, "method is None; it must be text"),
        (OLD | {"sampler": ["lcm"]}, r"sampler is \['lcm'\]; it must be text"),
        (OLD | {"levels": [1.0, "a"]}, r"levels is \[1.0, 'a'\]; it must be a list"),
        (OLD | {"levels": [1.0, float("inf")]}, "levels is .*it must be a list"),
        (OLD | {"conditions": ["w"]}, r"conditions is \['w'\]; it must be a table"),
        (OLD | {"conditions": {"w": [0]}}, "conditions is .*each entry 2 numbers"),
        (OLD | {"guidance": "2"}, "guidance is '2'; it must be a finite number or none"),
        (OLD | {"guidance": 10**400}, "guidance is 1000+; it must be a finite number or none"),
        (OLD | {"network": {"kind": []}}, "unhashable"),
        (OLD | {"network": {"kind": "resmlp"}}, "cannot be built: .*width"),
        (OLD | {"network": OLD["network"] | {"width": 8}}, "size mismatch"),
        ([], "not a table"),
        (3, "not a table"),
    ],
)  # fmt: skip
def test_a_card_that_is_not_in_order_is_refused_by_file_and_entry(tmp_path, about, said):
    path = written(tmp_path / "m.safetensors", about)
    with pytest.raises(ValueError, match=rf"(?s)m\.safetensors is not a checkpoint of .*{said}"):
        load_model(path)


@given(data=st.data())
def test_no_card_is_a_traceback(tmp_path_factory, data):
    """Any entry replaced by anything that JSON has: a model, or a sentence that names the file."""
    junk = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=5,
    )
    about = json.loads(json.dumps(OLD))
    inside = data.draw(st.sampled_from([about, about["data"], about["network"], about["teacher"]]))
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(junk)
    path = written(tmp_path_factory.mktemp("card") / "m.safetensors", about)
    try:
        load_model(path)
    except ValueError as error:
        assert "m.safetensors" in str(error)


def test_weights_that_are_no_finite_floats_are_refused_by_name(tmp_path):
    bias = build(OLD["network"] | DIGITS).leave.bias.detach()
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"m\.safetensors is not .*leave\.bias is int8; weights"):
        load_model(written(path, OLD, **{"leave.bias": bias.to(torch.int8)}))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"m\.safetensors is damaged: leave\.bias holds val"):
            load_model(written(path, OLD, **{"leave.bias": torch.full_like(bias, wrong)}))
    half = load_model(written(path, OLD, **{"leave.bias": bias.half() + 1}))
    assert half.network.leave.bias.dtype == torch.float32 and half.network.leave.bias[0] == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    network = build(TINY | DIGITS)
    network.leave.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"leave\.bias is not finite"):
        save_model(tmp_path / "m.safetensors", network, load_model("digits:teacher").card)
    assert contents(tmp_path) == {}


# Draws


def everything(some: Draws) -> list[torch.Tensor]:
    images, labels = some.batch(8)
    rest = some.timesteps(len(images)), some.integers(1000, len(images)), some.noise(images)
    return [images, labels, some.dropped(labels, 0.5), *rest]


def test_draws_are_those_of_their_seed_and_iteration():
    first = everything(draws(3))
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, everything(draws(3))))
    assert torch.equal(torch.get_rng_state(), state)
    for other in (draws(4), draws(3, seed=1)):
        assert not any(map(torch.equal, first, everything(other)))


def test_draws_have_their_distributions():
    some = draws(3)
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
    whole = everything(draws(3))
    monkeypatch.setattr(processes, "size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(everything(draws(3)))
    for share, parts in zip(whole, zip(*shares)):
        assert torch.equal(torch.cat(parts), share)
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 2 processes"):
        draws(3).batch(7)


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
    other = Data(spots().images + 0.01, spots().labels, 3, "spots")
    for training, sentence in (
        (toy(iterations=11), "holds a run with iterations 10 and not 11; give the same"),
        (toy(seed=1), "holds a run with seed 0 and not 1"),
        (dataclasses.replace(toy(), data=other), r"holds a run with data '\w+' and not '\w+'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(training, tmp_path)
        assert contents(tmp_path) == before


def test_a_damaged_state_is_refused(tmp_path):
    stop(toy(), tmp_path, 5)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged, .*; remove it to start"):
        train(toy(), tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda about: about.pop("training"),  # as kdpp 0.1.0 wrote it
        lambda about: about.pop("evaluations"),
        lambda about: about.update(training=3),
        lambda about: about.update(numbers=[]),
        lambda about: about.update(iteration="four"),
    ],
)
def test_a_state_whose_metadata_are_not_in_order_is_refused(tmp_path, spoil):
    stop(toy(), tmp_path, 5)
    path = tmp_path / "state.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["kdpp.lab.state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    spoil(about)
    save_file(tensors, path, {"kdpp.lab.state": json.dumps(about)})
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged, or of an earlier kdpp"):
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
        loop = Loop(toy(**settings), tmp_path, 4, main=True)
        assert loop._load_state() in (4, 8)
        assert all(p.isfinite().all() for p in loop.method.network.parameters())


def interrupt(training: Training, times: dict[int, int], patch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in these steps, so many times."""
    step = training.method.step

    def interrupted(self, i, draws):
        for _ in range(times.pop(i, 0)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # here Python looks for signals
        return step(self, i, draws)

    patch.setattr(training.method, "step", interrupted)


def test_ctrl_c_saves_what_is_done_and_says_how_to_go_on(tmp_path, monkeypatch):
    train(toy(), tmp_path / "whole")
    out, handler = tmp_path / "parts", signal.getsignal(signal.SIGINT)
    interrupt(toy(), {3: 1, 6: 1, 9: 1}, monkeypatch)
    for done in (4, 7):
        said = rf"^stopped after {done} of 10 iterations, .* in \S+parts; give the same command"
        with pytest.raises(KeyboardInterrupt, match=said):
            train(toy(), out)  # a state is due after 200
        assert set(contents(out)) == {"state.safetensors", "log.csv", "settings.toml"}
        assert signal.getsignal(signal.SIGINT) is handler
    assert train(toy(), out)  # in the last step there is nothing left to stop
    assert contents(out) == contents(tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    train(toy(), tmp_path / "whole")
    out = tmp_path / "parts"
    interrupt(toy(), {5: 2}, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="at once; the same command goes on from the last"):
        train(toy(), out, save_every=2)
    assert train(toy(), out)
    assert contents(out) == contents(tmp_path / "whole")


def test_all_processes_stop_where_one_is_asked_to(tmp_path, monkeypatch):
    """The flags are averaged with the losses, so that all save the same iteration."""
    calls = []

    def average(tensors):
        calls.append(tensors := list(tensors))
        if len(calls) == 4:  # as if one of two had been pressed in iteration 3
            tensors[0][-1] = 0.5

    monkeypatch.setattr(processes, "average", average)
    monkeypatch.setattr("kdpp.lab.trainer._average_gradients", lambda *_: None)
    with pytest.raises(KeyboardInterrupt, match="stopped after 4 of 10 iterations"):
        train(toy(), tmp_path)


def test_what_does_not_fit_into_memory_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch is 1000000000000; it must be at most 65536"):
        trained(tmp_path, "teacher", {"batch": 10**12})
    assert contents(tmp_path) == {}
    with pytest.raises(ValueError, match=r"the network needs more memory than .*smaller"):
        trained(tmp_path, "ddil", {"capacity": 10**14})

    def hungry(self, i, draws):
        return draws.noise(torch.zeros(1).expand(10**7, 10**7))

    monkeypatch.setattr(Toy, "step", hungry)
    with pytest.raises(ValueError, match=r"iteration 0 needs more memory than .*smaller b"):
        train(toy(), tmp_path)


def test_a_rate_too_high_is_said_where_it_shows(tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is (inf|nan) at iteration \d+; .*lower ra"):
        trained(tmp_path, "teacher", small(Teacher) | {"rate": 1e30})


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


def test_teacher_and_data_must_fit(tmp_path):
    with pytest.raises(ValueError, match="consistency needs a teacher: --teacher FILE"):
        trained(tmp_path, "consistency", {}, teacher=None)
    with pytest.raises(ValueError, match=r"makes images \[1, 4, 4\] of 3 classes, and the data ar"):
        trained(tmp_path, "consistency", {}, data=load_data("digits"))
    with pytest.raises(ValueError, match="save_every is 0"):
        train(toy(), tmp_path, save_every=0)
    assert contents(tmp_path) == {}


# Methods


def tiny(name: str, **settings: Any) -> Training:
    chosen = load_methods()[name]
    return training_of(name, small(chosen) | {"iterations": 12} | settings)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 0.9),
        # The loss on ε leaves the high noise levels, where the label is decided, for later.
        ({"loss": "eps", "network": {"width": 16, "hidden": 32, "blocks": 1}}, 0.6),
    ],
)
def test_a_teacher_draws_what_it_is_asked_for(tmp_path, settings, least):
    longer = {"iterations": 200, "batch": 64, "rate": 1e-2, "average": 0.9}
    model = trained(tmp_path, "teacher", small(Teacher) | longer | settings)
    curve = losses(tmp_path)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    assert check_samples(model, 4) > least


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("consistency", {"skip": 300.0}),
        ("consistency", {"loss": "huber", "network": None}),
        ("consistency", {"skip": 300.0, "guidance_range": (1.0, 3.0)}),
        ("lora-consistency", {"rank": 2}),
    ],
)
def test_a_consistency_student_draws_what_it_is_asked_for(tmp_path, name, settings):
    if name.startswith("lora"):
        pytest.importorskip("peft")
    longer = {"iterations": 80, "batch": 64, "rate": 1e-2}
    model = trained(tmp_path, name, small(load_methods()[name]) | longer | settings)
    curve = losses(tmp_path)
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    assert check_samples(model, 3) > 0.9


def test_a_card_says_how_the_model_was_made(tmp_path):
    card = trained(tmp_path, "consistency", small(Consistency)).card
    assert (card.method, card.iterations, card.seed) == ("consistency", 24, 0)
    assert card.settings["batch"] == 16 and card.guidance == 2.0 and card.conditions == {}
    data = DataOrigin(source="spots", shape=(1, 4, 4), classes=3, bounded=True)
    assert dataclasses.replace(card.data, digest=None) == data
    assert len(card.data.digest) == len(card.teacher.digest) == 16


@pytest.mark.parametrize("loss", ["v", "eps"])
def test_the_teachers_loss_is_that_of_its_docstring(loss):
    """Written out in VP, x_vp = a x0 + b n and v = a n - b x0, at iteration 6 of 12."""
    run = tiny("teacher", loss=loss, dropout=0.5)
    task = Teacher(run)
    for p in task.network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    some = draws(6)
    images, labels = some.batch(16)
    labels = some.dropped(labels, 0.5)
    t, noise = some.uniform(16) * 999, some.noise(images)
    a = (1 + task.network.sigma(t) ** 2).rsqrt().view(-1, 1, 1, 1)
    b = (1 - a**2).sqrt()
    x_vp = a * images + b * noise
    v = task.network(x_vp, t, labels)
    wrong = v - (a * noise - b * images) if loss == "v" else b * x_vp + a * v - noise
    expected = wrong.square().mean().item()
    found = task.step(6, draws(6))["loss"].item()
    assert found == pytest.approx(expected, rel=1e-4)
    rate = task.optimisers["network"].param_groups[0]["lr"]
    assert rate == pytest.approx(run.settings.rate / 2)  # half way down the cosine
    assert (cosine(0, 12, 0.1), cosine(12, 12, 0.1)) == (0.1, 0.0)


def test_the_two_distances():
    a, b = torch.tensor([0.0, 1.0]), torch.tensor([0.3, 1.0])
    for loss, expected in (("squared", 0.045), ("huber", ((0.09 + 0.01) ** 0.5 - 0.1) / 2)):
        task = Consistency(tiny("consistency", loss=loss, huber=0.1))
        assert task._distance(a, b).item() == pytest.approx(expected)


def test_the_consistency_target_is_the_average_at_the_end_of_the_teachers_step():
    """Written out at a timestep above the skip, and at one below, where the step ends at 0."""
    task = Consistency(tiny("consistency", guidance_range=(1.0, 4.0)))
    for p in task.average.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, labels = torch.randn(2, 1, 4, 4) * 3, torch.tensor([1, 2])
    t, w = torch.tensor([300.5, 7.0]), torch.tensor([0.5, 2.0])
    net = teacher().network
    target = consistency_target(net, task.average, x, t, labels, 1 + w, 20.0, w=w)
    null = torch.full_like(labels, 3)
    halves = net.denoise(x, t, null), net.denoise(x, t, labels)
    scale = (1 + w).view(-1, 1, 1, 1)
    estimate = halves[0] + scale * (halves[1] - halves[0])
    torch.testing.assert_close(target[1], estimate[1])
    s = t[:1] - 20
    x_s = estimate[:1] + net.sigma(s) * (x - estimate)[:1] / net.sigma(t[:1])
    expected = task.average.denoise(x_s, s, labels[:1], w=w[:1])
    torch.testing.assert_close(target[:1], expected)


def test_a_student_from_the_teachers_weights_starts_as_the_teacher():
    task = Consistency(tiny("consistency", network=None, guidance_range=(1.0, 4.0)))
    x, t, labels = torch.randn(3, 1, 4, 4), torch.tensor([1.0, 500, 900]), torch.arange(3)
    for network in (task.network, task.average):
        made = network(x, t, labels, w=torch.tensor(1.5))
        assert torch.equal(made, teacher().network(x, t, labels))


def test_a_low_rank_student_changes_the_teacher_by_its_rank(tmp_path):
    pytest.importorskip("peft")
    train(tiny("lora-consistency", rank=2), tmp_path)
    model = load_model(tmp_path)
    before = teacher().network.state_dict()
    changed = []
    for name, after in model.network.state_dict().items():
        change = after - before[name]
        if change.abs().max() == 0:
            continue
        changed.append(name)
        assert torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
    layers = [n for n, m in teacher().network.named_modules() if isinstance(m, torch.nn.Linear)]
    assert changed == [f"{name}.weight" for name in layers]


def test_a_teacher_with_guidance_inside_is_refused(tmp_path):
    card = dataclasses.replace(teacher().card, guidance=2.0)
    with pytest.raises(ValueError, match="the teacher is guided already"):
        trained(tmp_path, "consistency", {}, teacher=dataclasses.replace(teacher(), card=card))


# The registry and the command


def test_the_registry_names_what_there_is():
    found = {kind.__module__.removeprefix("kdpp.lab.methods.") for kind in load_methods().values()}
    files = {path.stem for path in Path(next(iter(kdpp.lab.methods.__path__))).glob("*.py")}
    assert files - {"__init__"} <= found and len(load_methods()) >= 12
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    taken = set(vars(parser.parse_args([])))
    for name, entry in METHODS.items():
        fields = dataclasses.fields(entry.Settings)
        assert not {field.name for field in fields} & taken, name
    assert not METHODS["teacher"].needs_teacher and METHODS["consistency"].needs_teacher
    assert list(load_methods())[:2] == ["classifier", "teacher"]  # what needs no other comes first
    with pytest.raises(ValueError, match="there is a method named 'teacher' already"):
        method("teacher", summary="", source="")(Toy)


def run_command(*arguments: Any) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="session")
def spots_file(tmp_path_factory) -> Path:
    """The spots as a file."""
    path = tmp_path_factory.mktemp("data") / "spots.safetensors"
    data = spots()
    save_file({"images": data.images, "labels": data.labels}, path)
    return path


def test_the_command_trains_from_flags_and_from_its_own_settings_file(tmp_path, spots_file, capsys):
    flags = ("--iterations", 3, "--batch", 8, "--network", "{width=4, hidden=4, blocks=1}")
    a, b = tmp_path / "a", tmp_path / "b"
    run_command("teacher", "--out", a, "--seed", 5, "--data", spots_file, *flags)
    assert capsys.readouterr().out == f"wrote {a}/model.safetensors\n"
    card = load_model(a).card
    assert card.seed == 5 and card.settings["network"]["width"] == 4
    run_command("--config", a / "settings.toml", "--out", b, "teacher")
    assert contents(a) == contents(b)
    run_command("teacher", "--config", a / "settings.toml", "--out", b)
    assert capsys.readouterr().out.endswith(f"finished before: {b}/model.safetensors\n")
    run_command("teacher", "--config", a / "settings.toml", "--out", tmp_path / "c", "--seed", 6)
    assert load_model(tmp_path / "c").card.seed == 6
    small = ("--iterations", 2, "--batch", 8, "--network", "none", "--guidance-range", "[1, 2]")
    run_command(
        "consistency", "--out", tmp_path / "d", "--teacher", a, "--data", spots_file, *small
    )
    model = load_model(tmp_path / "d")
    assert model.guidance_range == (1.0, 2.0) and model.card.teacher.name == str(a)


def test_the_command_lists_and_explains_the_methods(capsys):
    run_command("--list")
    listed = capsys.readouterr().out
    assert "lora-consistency" in listed and "Luo et al. 2023 (LCM), Algorithm 1" in listed
    with pytest.raises(SystemExit) as stopped:
        run_command("consistency", "--help")
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "share of labels that are dropped (default: 0.12)" in said
    assert '(default: {kind = "resmlp", width = 64, hidden = 128, blocks = 1})' in said
    assert "`guidance` is built in (default: none)" in said


def test_a_list_may_be_cut_off_by_its_reader():
    """As in a shell: `kdpp train --list | head -1`, whose reader has gone."""
    code = "import sys; from kdpp.cli import main; sys.exit(main(['train', '--list']))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(120) == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_stdout_cannot_show_is_a_question_mark(monkeypatch, encoding):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    say("λ = 0.1")
    assert shown.getvalue().decode(encoding).strip() in ("? = 0.1", "λ = 0.1")


def test_large_images_get_a_hint_towards_a_network_that_can(tmp_path, capsys):
    pytest.importorskip("diffusers")
    data = {"images": torch.rand(6, 3, 32, 32), "labels": torch.tensor([0, 0, 0, 1, 1, 1])}
    save_file(data, tmp_path / "images.safetensors")
    few = ("--data", tmp_path / "images.safetensors", "--iterations", 1, "--batch", 2)
    run_command("teacher", "--out", tmp_path / "a", *few)
    said = capsys.readouterr().err
    assert "of images 3 x 32 x 32 it will give little but noise. Take a U-Net" in said
    network = re.search(r"--network '(.*)'$", said, re.M)[1]
    run_command("teacher", "--out", tmp_path / "b", *few, "--network", network)
    assert "little but noise" not in capsys.readouterr().err
    assert load_model(tmp_path / "b").card.network["kind"] == "unet"
    run_command("consistency", "--teacher", tmp_path / "b", "--out", tmp_path / "c", *few)
    assert "Take the teacher's network, from its weights: --network none" in capsys.readouterr().err


def test_ctrl_c_ends_the_command_with_one_line(tmp_path, monkeypatch, capsys):
    interrupt(tiny("teacher"), {1: 1}, monkeypatch)
    words = ["teacher", "--out", tmp_path / "a", "--batch", 8, "--iterations", 5]
    assert main(["train", *map(str, words)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kdpp: stopped after 2 of 5 iterations, which are saved in ")
    assert last.endswith("; give the same command again to go on")


MINE = """
from kdpp.lab.methods import method
from kdpp.lab.methods.teacher import Teacher

@method("mine", summary="a teacher of one's own", source="none", teacher=False)
class Mine(Teacher):
    pass
"""


@pytest.fixture
def registry():
    """What is entered during the test is not there after it."""
    before = dict(load_methods())
    yield
    METHODS.clear()
    METHODS.update(before)


def test_a_method_of_ones_own_is_imported_from_a_file(tmp_path, spots_file, registry, capsys):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    few = ("--data", spots_file, "--iterations", 2, "--batch", 4)
    run_command("mine", "--import", path, "--out", tmp_path / "a", *few)
    assert load_model(tmp_path / "a").card.method == "mine"
    run_command("mine", "--import", path, "--out", tmp_path / "b", *few)  # once in a process
    assert "mine" in load_methods()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import kdpp.nothing", r"mine\.py, line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n\ndef f():\n    raise KeyError('a')\nf()", r"mine\.py, line 4: KeyError: 'a'"),
        ("x = = 1", r"mine\.py, line 1: SyntaxError"),
        (
            MINE.replace('"mine"', '"teacher"'),
            r"line [56]: ValueError: there is a method named",  # 6 before Python 3.11
        ),
    ],
)
def test_a_file_that_fails_is_said_with_its_line(tmp_path, text, said, registry):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ImportError, match=said):
        import_file(tmp_path / "mine.py")
    with pytest.raises(FileNotFoundError, match="no Python file at"):
        import_file(tmp_path / "none.py")


def test_methods_of_installed_packages_are_found(tmp_path, monkeypatch, registry):
    """By entry points, as a package's metadata name them."""
    (tmp_path / "some_package.py").write_text(MINE)
    info = tmp_path / "some_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[kdpp.methods]\nmine = some_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_entry_points.cache_clear()
    assert load_methods()["mine"].summary == "a teacher of one's own"
    (info / "entry_points.txt").write_text("[kdpp.methods]\nmine = some_packag\n")
    plugins.load_entry_points.cache_clear()
    with pytest.raises(ImportError, match=r"^some-package, installed here, .* 'mine' \(some_p"):
        load_methods()
    monkeypatch.undo()
    plugins.load_entry_points.cache_clear()


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
        (
            ("teacher", "--out", "x", "--teacher", "a"),
            "teacher has no teacher; leave --teacher out",
        ),
        (("teacher", "--out", "x", "--batch", "0"), "batch is 0; it must be at least 1"),
        (("teacher", "--out", "x", "--seed", "-1"), r"seed is -1; it must be in \[0, 4294967295\]"),
        (
            ("teacher", "--out", "x", "--data", "digts"),
            "unknown data 'digts'; did you mean 'digits",
        ),
        (("teacher", "--out", "x", "--device", "gpu"), "the device is 'gpu'"),
        (
            ("consistency", "--out", "x", "--guidance_range", "[2, 1]"),
            "guidance_range is .*the least and the most",
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
    assert a.card == b.card and set(contents(several)) == set(contents(alone))
    for p, q in zip(a.network.parameters(), b.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which every optimiser does, and which makes folders
    work = {"kill": kill_again_and_again, "share": share_among_processes}
    work[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
