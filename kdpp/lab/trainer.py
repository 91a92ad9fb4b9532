"""The training loop: seeded, resumable bit for bit, stopped by the first loss that is no number."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
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
from kdpp.lab.arithmetic import clip, compiled, products_in
from kdpp.lab.files import locked, make_folder, remove_leftovers, write_atomically
from kdpp.lab.methods import Draws, Method, Training
from kdpp.lab.models import (
    FILE,
    DataOrigin,
    ModelCard,
    TeacherOrigin,
    read_checkpoint,
    save_model,
)
from kdpp.lab.networks import Network
from kdpp.lab.settings import from_json, to_toml

__all__ = ["train"]

STATE, LOG, SETTINGS = "state.safetensors", "log.csv", "settings.toml"
MOST_IMAGES = 65_536
"""In a batch: more would fill the memory before anything can be said."""
KEY = "kdpp.lab.state"


def train(
    training: Training, out: Path, *, save_every: int = 200, disable: bool | None = None
) -> bool:
    """Train into the folder ``out``, from where the same training stood if it was killed there.

    The same is one of equal method, settings, seed, data and teacher; it ends in equal files.

    It holds ``settings.toml`` (which ``kdpp train --config`` reads), ``log.csv`` (the losses of
    every iteration), ``state.safetensors`` (where to resume, until the end) and, at the end,
    ``model.safetensors``. Every file but the log is there whole or not at all, and the log is put
    right by the run that resumes. Under several processes (`kdpp.lab.processes.joined`) only the
    main one writes, and every one must see the folder.

    On Ctrl-C (SIGINT) the step that is under way is finished and the state saved; a second Ctrl-C
    stops at once, and the training goes on from the state before.

    Args:
        save_every: iterations from one state to the next; it does not change the outcome.
        disable: True hides the progress bar.

    Returns:
        Whether there was anything to do: False for a finished folder.

    Raises:
        ValueError: the folder holds another training; teacher and data do not fit; a batch cannot
            be shared by the processes, or a step does not fit into memory.
        FloatingPointError: a loss or a weight became infinite or no number. The last good state
            is kept.
        OSError: a file cannot be written, or another run writes to the folder; what is there stays
            as it is.
        KeyboardInterrupt: it was stopped; the message says from where it will go on.
    """
    check_count("save_every", save_every, 1)
    _check_fit(training)
    main = processes.rank() == 0
    if main:
        make_folder(out)
    with locked(out) if main else nullcontext():
        if main:
            remove_leftovers(out)
        if (out / FILE).exists():
            _check_same(training, _identity(read_checkpoint(out / FILE)[1]), out)
            if main:
                (out / STATE).unlink(missing_ok=True)  # of a run killed between its last two acts
            return False
        Loop(training, out, save_every, main).go(disable)
    return True


@dataclass(frozen=True)
class Progress:
    """What a state says beside its tensors: whose it is, how far, and an optimiser's numbers."""

    training: dict[str, Any]
    iteration: int
    evaluations: int
    numbers: dict[str, Any]


class Loop:
    """The iterations of a training, with its log and its states in a folder."""

    def __init__(self, training: Training, out: Path, save_every: int, main: bool) -> None:
        with _memory("the network"):
            self.method = training.method(training)
        self.training = training
        self.out, self.save_every, self.main = out, save_every, main
        self.names: tuple[str, ...] = ()
        self.rows: list[str] = []
        self.saved = 0
        self.evaluated = self.before = 0  # images, by the networks of this process; at the start

    def go(self, disable: bool | None) -> None:
        """Every iteration that is left, and the finished model."""
        self.saved = start = self._load_state()
        total = self.method.iterations
        if self.main:
            self._begin(start)
        self._hook_optimisers()
        bar = tqdm(
            total=total,
            initial=start,
            desc=self.training.method.name,
            unit="it",
            disable=True if not self.main else disable,
        )
        compiling = compiled(self._networks() if self.training.arithmetic.compile else ())
        with (
            bar,
            torch.random.fork_rng(devices=[]),
            self._counting(),
            compiling,
            _interrupts() as asked,
        ):
            for i in range(start, total):
                losses, stop = self._step(i, asked)
                bar.set_postfix_str(f"{_said(losses)}, {self._speed(bar)}", refresh=False)
                bar.update()
                done = i + 1
                if (done % self.save_every == 0 or stop) and done < total:
                    self._check_weights(done)
                    self._save(done)
                    if stop:
                        raise KeyboardInterrupt(self._farewell())
        self._check_weights(total)
        self._finish()

    def _step(self, i: int, asked: Sequence[int]) -> tuple[dict[str, float], bool]:
        """The losses of iteration i, and whether by its end any process was asked to stop."""
        self._seed_layers(i)
        precision = self.training.arithmetic.precision
        with _memory(f"iteration {i}"), products_in(precision, self.training.device):
            found = self.method.step(i, Draws(self.training.data, self.training.seed, i))
        if not found:
            raise ValueError(f"{self.training.method.name} has no loss at iteration {i}")
        values = [value.detach() for value in found.values()]
        together = torch.stack([*values, values[0].new_full((), len(asked))])
        processes.average([together])
        *means, stop = together.tolist()
        losses = dict(zip(found, means))
        self._note(i, losses)
        for name, value in losses.items():
            if not math.isfinite(value):
                self._write_log()
                raise FloatingPointError(f"{name} is {value} at iteration {i}; {self._advice()}")
        return losses, stop > 0

    def _seed_layers(self, i: int) -> None:
        """Seed the global stream, for layers that draw for themselves, such as dropout.

        Not by torch.manual_seed: without a GPU that keeps a traceback of every call.
        """
        words = np.random.SeedSequence((self.training.seed, i, processes.rank())).generate_state(1)
        torch.default_generator.manual_seed(int(words[0]))
        if self.training.device.type == "cuda":
            torch.cuda.manual_seed(int(words[0]))

    def _hook_optimisers(self) -> None:
        """What is done to gradients before an optimiser's step: averaged, then clipped."""
        norm = self.training.arithmetic.clip
        for optimiser in self.method.optimisers.values():
            optimiser.register_step_pre_hook(_average_gradients)
            if norm is not None:
                optimiser.register_step_pre_hook(lambda o, *_: clip(o, norm))

    def _networks(self) -> set[Network]:
        """The method's networks and its teacher's."""
        found = {part for module in self.method.modules.values() for part in module.modules()}
        networks = {part for part in found if isinstance(part, Network)}
        if self.training.teacher is not None:
            networks.add(self.training.teacher.network)
        return networks

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Count the images that the method's networks and its teacher evaluate."""

        def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.evaluated += len(args[0] if args else kwargs["x"])

        hooks = [
            network.register_forward_pre_hook(count, with_kwargs=True)
            for network in self._networks()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _evaluations(self) -> int:
        """Of all processes, from the first iteration on."""
        mean = torch.tensor([self.evaluated], dtype=torch.float64, device=self.training.device)
        processes.average([mean])
        return round(mean.item() * processes.size())

    def _speed(self, bar: tqdm[Any]) -> str:
        """How many images the networks of this process evaluated in a second."""
        seconds = bar.format_dict["elapsed"]
        return f"{(self.evaluated - self.before) / max(seconds, 1e-3):,.0f} images/s"

    def _check_weights(self, done: int) -> None:
        for name, module in self.method.modules.items():
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

    def _farewell(self) -> str:
        return (
            f"stopped after {self.saved} of {self.method.iterations} iterations, which are saved "
            f"in {self.out}; give the same command again to go on"
        )

    def _begin(self, start: int) -> None:
        """Write the settings, and cut the log to the iterations that the state has."""
        training = self.training
        about = {"method": training.method.name, "seed": training.seed}
        about |= {"data": training.data.source, "teacher": training.teacher_name}
        every = {k: "none" if v is None else v for k, v in training.all_settings.items()}
        write_atomically(self.out / SETTINGS, to_toml(about | every).encode())
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
                f"{self.training.method.name} has a loss at iteration {i} that it had not at "
                f"first: {', '.join(sorted(set(losses) - set(self.names)))}"
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
        evaluations = self._evaluations()
        if self.main:
            state = _state(self.training, self.method, done, evaluations)
            write_atomically(self.out / STATE, state)
        self.saved = done

    def _load_state(self) -> int:
        """Take up the folder's state, if there is one; return where it stands."""
        path = self.out / STATE
        if not path.exists():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                progress = from_json(Progress, json.loads((file.metadata() or {})[KEY]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, or of an earlier kdpp ({error}); remove it to start anew"
            ) from error
        _check_same(self.training, progress.training, self.out)
        _restore(self.method, tensors, progress.numbers)
        self.evaluated = self.before = progress.evaluations if self.main else 0
        return progress.iteration

    def _finish(self) -> None:
        self._write_log()
        evaluations = self._evaluations()
        if not self.main:
            return
        network, usage = self.method.result()
        training, data = self.training, self.training.data
        digest = training.teacher_digest
        card = ModelCard(
            **vars(usage),
            network=network.config,
            data=DataOrigin(
                source=data.source,
                shape=data.shape,
                classes=data.classes,
                bounded=data.bounded,
                digest=training.data_digest,
            ),
            method=training.method.name,
            settings=training.all_settings,
            seed=training.seed,
            teacher=TeacherOrigin(name=training.teacher_name, digest=digest) if digest else None,
            evaluations=evaluations,
            iterations=self.method.iterations,
            kdpp=_version.__version__,
        )
        save_model(self.out / FILE, network, card)
        (self.out / STATE).unlink(missing_ok=True)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C during the block is put into the list; a second one is a KeyboardInterrupt."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last state")
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _memory(what: str) -> Iterator[None]:
    """Say in a sentence what does not fit into memory, in numpy's way, CUDA's or torch's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        said = str(error).splitlines()[0]
        raise ValueError(
            f"{what} needs more memory than there is ({said}); take a smaller batch or network"
        ) from error


def _check_fit(training: Training) -> None:
    teacher, data = training.teacher, training.data
    batch = getattr(training.settings, "batch", 1)
    if batch > MOST_IMAGES:
        raise ValueError(f"batch is {batch}; it must be at most {MOST_IMAGES}")
    if training.method.needs_teacher and teacher is None:
        name = training.method.name
        raise ValueError(f"{name} needs a teacher: --teacher FILE, or digits:teacher")
    if teacher and (teacher.shape, teacher.classes) != (data.shape, data.classes):
        raise ValueError(
            f"the teacher makes images {list(teacher.shape)} of {teacher.classes} classes, and the "
            f"data are {list(data.shape)} of {data.classes}; they must be alike"
        )


def _check_same(training: Training, theirs: Mapping[str, Any], out: Path) -> None:
    """ValueError, with what differs, where the folder's training is another one."""
    ours = training.identity
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


def _identity(card: ModelCard) -> dict[str, Any]:
    """`Training.identity` of the one that made a model."""
    return {
        "method": card.method,
        "seed": card.seed,
        "data": card.data.digest,
        "teacher": card.teacher.digest if card.teacher else None,
        **card.settings,
    }


def _state(training: Training, method: Method, done: int, evaluations: int) -> bytes:
    """Everything that step `done` starts from, as a safetensors file."""
    tensors = {}
    for name, module in method.modules.items():
        for key, value in module.state_dict().items():
            tensors[f"module/{name}/{key}"] = value
    numbers: dict[str, Any] = {}
    for name, optimiser in method.optimisers.items():
        for index, values in optimiser.state_dict()["state"].items():
            for key, value in values.items():
                place = tensors if isinstance(value, Tensor) else numbers
                place[f"optimiser/{name}/{index}/{key}"] = value
    about = asdict(Progress(training.identity, done, evaluations, numbers))
    # Each a copy of its own: modules may share tensors, which a safetensors file cannot.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    return to_bytes(copies, {KEY: json.dumps(about)})


def _restore(method: Method, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put what `_state` saved into the method."""
    for name, module in method.modules.items():
        module.load_state_dict(_under(tensors, f"module/{name}/"))
    for name, optimiser in method.optimisers.items():
        whole = optimiser.state_dict()
        whole["state"] = {}
        for place, value in _under({**tensors, **numbers}, f"optimiser/{name}/").items():
            index, key = place.split("/", 1)
            whole["state"].setdefault(int(index), {})[key] = value
        optimiser.load_state_dict(whole)


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _average_gradients(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    parameters: Iterable[Tensor] = (p for g in optimiser.param_groups for p in g["params"])
    processes.average(p.grad for p in parameters if p.grad is not None)


def _said(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
