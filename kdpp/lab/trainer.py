"""The training loop: seeded, resumable bit for bit, stopped by the first loss that is no number."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm.auto import tqdm

from kdpp import _version
from kdpp.checks import check_count
from kdpp.lab import processes
from kdpp.lab.data import Data
from kdpp.lab.files import locked, make_folder, remove_leftovers, write_atomically
from kdpp.lab.methods import Draws, Job, Method, Task
from kdpp.lab.models import FILE, Model, load_model, save_model
from kdpp.lab.settings import as_dict, to_toml

__all__ = ["Run", "train"]

STATE, LOG, SETTINGS = "state.safetensors", "log.csv", "settings.toml"
KEY = "kdpp.lab.state"


@dataclass(frozen=True)
class Run:
    """What is trained, on what, from which seed: all that decides the outcome.

    Attributes:
        teacher: None for a method that needs none.
        teacher_name: as it was given.
    """

    method: Method
    settings: Any
    data: Data
    teacher: Model | None = None
    teacher_name: str | None = None
    seed: int = 0

    @cached_property
    def about(self) -> dict[str, Any]:
        """It as JSON, data and teacher with digests; see `kdpp.lab.models.save_model`."""
        data, teacher = self.data, None
        if self.teacher:
            weights = self.teacher.network.state_dict()
            teacher = {"name": self.teacher_name, "digest": _digest(weights)}
        return {
            "method": self.method.name,
            "settings": as_dict(self.settings),
            "seed": self.seed,
            "data": {
                "source": data.source,
                "shape": list(data.shape),
                "classes": data.classes,
                "bounded": data.bounded,
                "digest": _digest({"images": data.images, "labels": data.labels}),
            },
            "teacher": teacher,
            "kdpp": _version.__version__,
        }


def train(
    run: Run,
    out: Path,
    *,
    save_every: int = 200,
    device: torch.device | None = None,
    disable: bool | None = None,
) -> bool:
    """Train into the folder ``out``, from where the same run stood if it was killed there.

    The same is one of equal method, settings, seed, data and teacher; it ends in equal files.

    It holds ``settings.toml`` (which ``kdpp train --config`` reads), ``log.csv`` (the losses of
    every iteration), ``state.safetensors`` (where to resume, until the end) and, at the end,
    ``model.safetensors``. Every file but the log is there whole or not at all, and the log is put
    right by the run that resumes. Under several processes (`kdpp.lab.processes.joined`) only the
    main one writes, and every one must see the folder.

    Args:
        save_every: iterations from one state to the next; it does not change the outcome.
        disable: True hides the progress bar.

    Returns:
        Whether there was anything to do: False for a finished folder.

    Raises:
        ValueError: the folder holds another run; teacher and data do not fit; a
            batch cannot be shared by the processes.
        FloatingPointError: a loss or a weight became infinite or no number. The last good state
            is kept.
        OSError: a file cannot be written, or another run writes to the folder; what is there stays
            as it is.
    """
    device = device or torch.device("cpu")
    check_count("save_every", save_every, 1)
    _check_fit(run)
    main = processes.rank() == 0
    if main:
        make_folder(out)
    with locked(out) if main else nullcontext():
        if main:
            remove_leftovers(out)
        if (out / FILE).exists():
            _check_same(run, load_model(out / FILE).about, out)
            if main:
                (out / STATE).unlink(missing_ok=True)  # of a run killed between its last two acts
            return False
        job = Job(run.data.to(device), run.teacher, run.settings, run.seed, device)
        Loop(run, job, out, save_every, main).go(disable)
    return True


class Loop:
    """The iterations of a task, with its log and its states in a folder."""

    def __init__(self, run: Run, job: Job, out: Path, save_every: int, main: bool) -> None:
        self.run, self.job, self.task = run, job, run.method.make(job)
        self.out, self.save_every, self.main = out, save_every, main
        self.names: tuple[str, ...] = ()
        self.rows: list[str] = []
        self.saved = 0

    def go(self, disable: bool | None) -> None:
        """Every iteration that is left, and the finished model."""
        self.saved = start = _load_state(self.run, self.task, self.out)
        if self.main:
            self._begin(start)
        for optimiser in self.task.optimisers.values():
            optimiser.register_step_pre_hook(_average_gradients)
        bar = tqdm(
            total=self.task.iterations,
            initial=start,
            desc=self.run.method.name,
            unit="it",
            disable=True if not self.main else disable,
        )
        with bar, torch.random.fork_rng(devices=[]):
            for i in range(start, self.task.iterations):
                losses = self._step(i)
                bar.set_postfix_str(_said(losses), refresh=False)
                bar.update()
                done = i + 1
                if done % self.save_every == 0 and done < self.task.iterations:
                    self._check_weights(done)
                    self._save(done)
        self._check_weights(self.task.iterations)
        self._finish()

    def _step(self, i: int) -> dict[str, float]:
        self._seed_layers(i)
        found = self.task.step(i, Draws(self.job.data, self.job.seed, i, self.job.device))
        together = torch.stack([value.detach() for value in found.values()])
        processes.average([together])
        losses = dict(zip(found, together.tolist()))
        self._note(i, losses)
        for name, value in losses.items():
            if not math.isfinite(value):
                self._write_log()
                raise FloatingPointError(f"{name} is {value} at iteration {i}; {self._advice()}")
        return losses

    def _seed_layers(self, i: int) -> None:
        """Seed the global stream, for layers that draw for themselves, such as dropout.

        Not by torch.manual_seed: without a GPU that keeps a traceback of every call.
        """
        words = np.random.SeedSequence((self.run.seed, i, processes.rank())).generate_state(1)
        torch.default_generator.manual_seed(int(words[0]))
        if self.job.device.type == "cuda":
            torch.cuda.manual_seed(int(words[0]))

    def _check_weights(self, done: int) -> None:
        for name, module in self.task.modules.items():
            for key, value in module.state_dict().items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    self._write_log()
                    raise FloatingPointError(
                        f"{key} of {name} is not finite after iteration {done - 1}; "
                        f"{self._advice()}"
                    )

    def _advice(self) -> str:
        kept = f"the state after {self.saved} iterations is kept in {self.out}. " * bool(self.saved)
        return f"{kept}Train anew into another folder with a lower rate".strip()

    def _begin(self, start: int) -> None:
        """Write the settings, and cut the log to the iterations that the state has."""
        about = {"method": self.run.method.name, "seed": self.run.seed}
        about |= {"data": self.run.data.source, "teacher": self.run.teacher_name}
        write_atomically(self.out / SETTINGS, to_toml(about | as_dict(self.run.settings)).encode())
        log = self.out / LOG
        lines = log.read_text("utf-8").splitlines()[: start + 1] if start and log.exists() else []
        if lines:
            self.names = tuple(lines[0].split(",")[1:])
        write_atomically(log, "".join(f"{line}\n" for line in lines).encode())

    def _note(self, i: int, losses: Mapping[str, float]) -> None:
        if not self.names:
            self.names = tuple(losses)
            self.rows.append(",".join(("iteration", *self.names)))
        if set(losses) - set(self.names):
            raise ValueError(
                f"{self.run.method.name} has a loss at iteration {i} that it had not at first: "
                f"{', '.join(sorted(set(losses) - set(self.names)))}"
            )
        values = (repr(losses[name]) if name in losses else "" for name in self.names)
        self.rows.append(",".join((str(i), *values)))

    def _write_log(self) -> None:
        """Append what was noted since the last time, whole lines at once."""
        content = "".join(f"{row}\n" for row in self.rows)
        self.rows.clear()
        if not self.main:
            return
        log = self.out / LOG
        try:
            with open(log, "a", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise type(error)(
                f"{log} could not be written ({error.strerror or error}); the same command goes on "
                f"from iteration {self.saved}"
            ) from error

    def _save(self, done: int) -> None:
        """Write the log, then the state: a kill in between leaves a log that is too long."""
        self._write_log()
        if self.main:
            write_atomically(self.out / STATE, _state(self.run, self.task, done))
        self.saved = done

    def _finish(self) -> None:
        self._write_log()
        if not self.main:
            return
        network, part = self.task.result()
        about = self.run.about | part
        about |= {"network": network.config, "iterations": self.task.iterations}
        save_model(self.out / FILE, network, about)
        (self.out / STATE).unlink(missing_ok=True)


def _check_fit(run: Run) -> None:
    teacher = run.teacher
    if run.method.teacher and teacher is None:
        raise ValueError(f"{run.method.name} needs a teacher: --teacher FILE, or digits:teacher")
    if teacher and (teacher.shape, teacher.classes) != (run.data.shape, run.data.classes):
        raise ValueError(
            f"the teacher makes images {list(teacher.shape)} of {teacher.classes} classes, and the "
            f"data are {list(run.data.shape)} of {run.data.classes}; they must be alike"
        )


def _check_same(run: Run, theirs: Mapping[str, Any], out: Path) -> None:
    """ValueError, with what differs, where the folder's run is another one."""
    ours, theirs = _decisive(run.about), _decisive(theirs)
    different = [
        f"{name} {theirs.get(name)!r} and not {ours.get(name)!r}"
        for name in (*ours, *(theirs.keys() - ours.keys()))
        if theirs.get(name) != ours.get(name)
    ]
    if different:
        raise ValueError(
            f"{out} holds a run with {', '.join(different)}; give the same settings to go on with "
            "it, or another folder"
        )


def _decisive(about: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the outcome of a run."""
    return {
        "method": about.get("method"),
        "seed": about.get("seed"),
        "data": (about.get("data") or {}).get("digest"),
        "teacher": (about.get("teacher") or {}).get("digest"),
        **(about.get("settings") or {}),
    }


def _state(run: Run, task: Task, done: int) -> bytes:
    """Everything that step `done` starts from, as a safetensors file."""
    tensors = {}
    for name, module in task.modules.items():
        for key, value in module.state_dict().items():
            tensors[f"module/{name}/{key}"] = value
    numbers: dict[str, Any] = {}
    for name, optimiser in task.optimisers.items():
        for index, values in optimiser.state_dict()["state"].items():
            for key, value in values.items():
                place = tensors if isinstance(value, Tensor) else numbers
                place[f"optimiser/{name}/{index}/{key}"] = value
    about = {"iteration": done, "run": run.about, "numbers": numbers}
    # Each a copy of its own: modules may share tensors, which a safetensors file cannot.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    return to_bytes(copies, {KEY: json.dumps(about)})


def _load_state(run: Run, task: Task, out: Path) -> int:
    """Put the folder's state, if there is one, into the task; return where it stands."""
    path = out / STATE
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[KEY])
            _check_same(run, about["run"], out)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to start anew") from error
    for name, module in task.modules.items():
        module.load_state_dict(_under(tensors, f"module/{name}/"))
    for name, optimiser in task.optimisers.items():
        whole = optimiser.state_dict()
        whole["state"] = {}
        for place, value in _under(tensors | about["numbers"], f"optimiser/{name}/").items():
            index, key = place.split("/", 1)
            whole["state"].setdefault(int(index), {})[key] = value
        optimiser.load_state_dict(whole)
    return int(about["iteration"])


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _average_gradients(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    parameters: Iterable[Tensor] = (p for g in optimiser.param_groups for p in g["params"])
    processes.average(p.grad for p in parameters if p.grad is not None)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def _said(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
