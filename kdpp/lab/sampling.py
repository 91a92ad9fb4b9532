"""Images from seeds: image i depends on its seed alone, whoever computes it.

Every image's initial noise, solver noise and renoise noise come from its own seed, each from a
stream of its own. Images are computed in batches that are fixed by their place in the list of
seeds, so that any number of processes computes the same batches, and on the CPU the same bits.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

import kdpp
from kdpp.checks import check_count, check_number, check_sigmas
from kdpp.lab import processes
from kdpp.lab.files import make_folder, write_atomically
from kdpp.lab.models import Model
from kdpp.lab.networks import CFG_MINUS_ONE
from kdpp.lab.schedules import schedule
from kdpp.lab.settings import unknown
from kdpp.noise import SeededNoise, read_seeds

__all__ = [
    "GUIDANCE",
    "SAMPLERS",
    "Images",
    "Recipe",
    "denoiser_for",
    "draw",
    "fingerprint",
    "image_seeds",
    "levels_for",
]

SAMPLERS = {name: solver for name, solver in kdpp.SOLVERS.items() if solver.own_levels is None}
"""The solvers that take a schedule."""
GUIDANCE = (
    "teacher_scale", "teacher_steps", "teacher_cfg_scale", "renoise", "renoise_eta", "extrapolate",
)  # fmt: skip
"""The keywords of `kdpp.TeacherGuidedDenoiser` that a recipe's ``guidance`` may hold."""

INITIAL, SOLVER, RENOISE = range(3)
"""The streams of a seed."""
RUN = 10**6
"""Seeds that one run of images may take."""
PATIENCE = 0.5
"""Seconds of finished work that are held back, so that writing costs next to nothing."""


@dataclass(frozen=True)
class Recipe:
    """How images are made: everything that changes them but the seeds and labels.

    Args:
        student: what samples; a teacher alone is a student here.
        teacher: what guides it, or None.
        sampler: one of `SAMPLERS`, "euler" for ``kdpp.sample_euler_tg``.
        levels: the sigmas, from the highest to 0 as a rule.
        cond_scale: the student's CFG scale; one that takes its guidance as an input gets w =
            cond_scale - 1.
        guidance: keywords of `kdpp.TeacherGuidedDenoiser`, see `GUIDANCE`.
        options: keywords of the sampler, such as eta.

    Raises:
        ValueError: an unknown sampler or keyword (the nearest known one is said), levels that
            increase, guidance without a teacher or outside its range, a w that the student was not
            trained for, churn (its noise cannot come from the seeds), a student and teacher of
            other shapes or classes.
    """

    student: Model
    teacher: Model | None
    sampler: str
    levels: tuple[float, ...]
    cond_scale: float = 1.0
    guidance: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(unknown("sampler", self.sampler, SAMPLERS))
        if len(check_sigmas(self.levels)[0]) < 2:
            raise ValueError(f"levels is {self.levels!r}; give two or more")
        self._check_options()
        for name in self.guidance:
            if name not in GUIDANCE:
                raise ValueError(unknown("guidance", name, GUIDANCE))
        check_number("cond_scale", self.cond_scale)
        self._check_w()
        if self.teacher is None:
            if self.guidance:
                raise ValueError(f"guidance {sorted(self.guidance)} needs a teacher; name one")
        else:
            self._check_pair(self.teacher)
        self.guided()

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def guided(self, noise: Any = None) -> kdpp.TeacherGuidedDenoiser:
        """Student and teacher, ready to sample with; ``noise`` is the renoise noise sampler."""
        student = denoiser_for(self.student, self.steps)
        if self.teacher is None:
            return kdpp.TeacherGuidedDenoiser(student, student, teacher_steps=0)
        teacher = denoiser_for(self.teacher, self.steps)
        return kdpp.TeacherGuidedDenoiser(
            student, teacher, renoise_noise_sampler=noise, **self.guidance
        )

    def _check_pair(self, teacher: Model) -> None:
        ours, theirs = [(list(m.shape), m.classes) for m in (self.student, teacher)]
        if ours != theirs:
            raise ValueError(
                f"the student's images have shape {ours[0]} and {ours[1]} classes, the teacher's "
                f"{theirs[0]} and {theirs[1]}; they must be alike"
            )

    def _check_options(self) -> None:
        settings = SAMPLERS[self.sampler].settings(self.options)
        if settings.get("s_churn", 0.0) != 0.0:
            raise ValueError(
                "s_churn adds noise that cannot come from the images' seeds; leave it 0, or take "
                "an ancestral sampler"
            )

    def _check_w(self) -> None:
        if self.student.guidance_range:
            low, high = self.student.guidance_range
            if not low <= self.cond_scale <= high:
                raise ValueError(
                    f"cond_scale is {self.cond_scale!r}; the student was trained for CFG scales in "
                    f"[{low:g}, {high:g}]"
                )


@dataclass(frozen=True)
class Images:
    """Images and what they cost.

    Attributes:
        x: ``(N, *shape)`` on the CPU, as they were sampled, not clamped.
        labels: int64 ``(N,)``.
        evaluations: of the student's and the teacher's network for one image; both halves of CFG
            count. A student that teaches itself counts as the student.
        compute: parameters × evaluations for one image, over both networks.
        seconds: of sampling, summed over batches and processes.
        memory: bytes. On CUDA the most that was allocated; else by how much the process's highest
            resident size rose, which is 0 where earlier work took more. Of the largest process.
    """

    x: Tensor
    labels: Tensor
    evaluations: tuple[float, float]
    compute: float
    seconds: float
    memory: int


class _StepConditioned(nn.Module):
    """A denoiser that is told how many steps there are."""

    def __init__(self, denoiser: nn.Module, steps: int) -> None:
        super().__init__()
        self.inner_model = denoiser
        self.steps = float(steps)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        steps = x.new_full(x.shape[:1], self.steps)
        denoised: Tensor = self.inner_model(x, sigma, steps=steps, **extra_args)
        return denoised


def denoiser_for(model: Model, steps: int) -> nn.Module:
    """The model's denoiser for a run of so many steps.

    A network that takes their number gets it, one that takes w gets the CFG scale minus 1
    (`kdpp.GuidanceConditioned`). Raises ValueError where it takes something else.
    """
    conditions, denoiser = set(model.card.conditions), model.denoiser
    if conditions - {CFG_MINUS_ONE, "steps"}:
        raise ValueError(
            f"the network of method {model.card.method!r} takes {sorted(conditions)}; samplers "
            "know w and steps only"
        )
    if "steps" in conditions:
        denoiser = _StepConditioned(denoiser, steps)
    return kdpp.GuidanceConditioned(denoiser) if model.guidance_range else denoiser


def levels_for(model: Model, steps: int | None = None) -> tuple[float, ...]:
    """The levels that the model was trained on where they make so many steps, else the schedule's.

    Without ``steps``: its own, or for a model of any levels 4 steps, 50 for a teacher. The
    schedule is `kdpp.lab.schedules.schedule`.
    """
    own = model.levels
    if own is not None and steps in (None, len(own) - 1):
        return own
    if steps is None:
        steps = 50 if model.card.method == "teacher" else 4
    return schedule(check_count("steps", steps, 1))


def image_seeds(run: int, count: int) -> range:
    """The seeds of a run's images, ``run·10^6 + i``: no two runs share one.

    Raises ValueError for a negative run, or a count outside [1, 10^6].
    """
    check_count("run", run, 0)
    if check_count("images", count, 1) > RUN:
        raise ValueError(f"images is {count}; a run has {RUN} at most, take more seeds")
    return range(run * RUN, run * RUN + count)


def draw(
    recipe: Recipe,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    chunk: int = 500,
    folder: Path | None = None,
    progress: bool = False,
) -> Images:
    """The images of these seeds; all processes that were started together share the work.

    Process r of N (`accelerate launch`, `torchrun`) takes the batches r, r + N, …, and every one
    returns all images. On the CPU each works on one thread, since torch's bits depend on how many
    there are. Torch's random streams are left as they were.

    Args:
        seeds: whole numbers in [0, 2^63), one for each image.
        labels: int64 ``(N,)``; by default seed s asks for class s mod classes.
        chunk: images in a batch. Another size may change an image's last bits, as may its place in
            the last, smaller batch. ``renoise="random"`` draws its level once for each batch, from
            the seed of the batch's first image.
        folder: where finished batches are kept, whole or not at all; a later call with the same
            recipe and seeds takes them from there, however many processes either has. At most half
            a second of finished work is held back. The recipe's settings must be JSON-able then.
        progress: show a bar.

    Raises:
        TypeError, ValueError: for other seeds, labels or chunks, and what the sampler refuses.
        OSError: the folder cannot be written.
    """
    numbers, labels = _check(recipe, seeds, labels, chunk)
    device = next(recipe.student.network.parameters()).device
    parts = torch.split(torch.arange(len(numbers)), chunk)
    shelf = None if folder is None else Shelf(folder, _key(recipe, numbers, labels, chunk))
    threads = processes.single_thread() if device.type == "cpu" else nullcontext()
    processes.join(device)
    with threads, _counted(recipe) as counts:
        peak = _peak_memory(device)
        mine = range(processes.rank(), len(parts), processes.size())
        done = {} if shelf is None else shelf.read(mine)
        quiet = not progress or processes.rank() > 0
        for i in tqdm(mine, desc="sampling", unit="batch", leave=False, disable=quiet):
            if i in done:
                continue
            counts[:] = 0, 0
            start = time.perf_counter()
            x = _sample(recipe, numbers[parts[i]], labels[parts[i]], device)
            done[i] = Batch(x, Cost(counts[0], counts[1], time.perf_counter() - start))
            if shelf is not None:
                shelf.add(i, done[i])
        if shelf is not None and processes.size() > 1:  # others may be lost while this one waits
            shelf.write()
        x, cost, memory = _gathered(done, parts, recipe.student.shape, peak(), device)
    student, teacher = cost.student / len(x), cost.teacher / len(x)
    compute = recipe.student.parameters * student
    if recipe.teacher is not None:
        compute += recipe.teacher.parameters * teacher
    return Images(x, labels, (student, teacher), compute, cost.seconds, memory)


def _check(
    recipe: Recipe, seeds: Sequence[int], labels: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """The seeds and the labels as int64 tensors (N,)."""
    check_count("chunk", chunk, 1)
    if not len(seeds):
        raise ValueError("seeds is empty; give one for each image")
    numbers, classes = read_seeds(seeds, len(seeds)), recipe.student.classes
    if labels is None:
        return numbers, numbers % classes
    if labels.dtype != torch.int64 or labels.shape != numbers.shape:
        raise ValueError(
            f"labels is {labels.dtype} of shape {list(labels.shape)}; give int64, one for each of "
            f"the {len(numbers)} seeds"
        )
    if labels.min() < 0 or labels.max() > classes:
        raise ValueError(f"labels must lie in 0 … {classes} ({classes}: none)")
    return numbers, labels.cpu()


def _sample(recipe: Recipe, seeds: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """The images of one batch."""
    like = torch.empty(len(seeds), *recipe.student.shape, device=device)
    model = recipe.guided(SeededNoise(like, seeds, RENOISE))
    solver = SAMPLERS[recipe.sampler]
    noise = None if solver.noise == "none" else SeededNoise(like, seeds, SOLVER)
    x = SeededNoise(like, seeds, INITIAL)() * recipe.levels[0]
    cond = labels.to(device)
    uncond = torch.full_like(cond, recipe.student.classes)
    extra_args = {"cond": cond, "uncond": uncond, "cond_scale": recipe.cond_scale}
    sigmas = torch.tensor(recipe.levels, device=device)
    with _seeded(int(seeds[0]), device):  # for what has no seeds of its own: random renoise levels
        return kdpp.sample(
            solver, model, x, sigmas, extra_args, None, True, noise, **recipe.options
        ).cpu()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random streams at this seed, and afterwards where they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


class Cost(NamedTuple):
    """How many images the student's and the teacher's network evaluated, and in which time."""

    student: float
    teacher: float
    seconds: float


class Batch(NamedTuple):
    """A finished batch: its images (n, *shape) and what they cost."""

    x: Tensor
    cost: Cost


@contextmanager
def _counted(recipe: Recipe) -> Iterator[list[int]]:
    """[images evaluated by the student's network, by the teacher's], counted up inside."""
    counts = [0, 0]
    networks = [recipe.student.network]
    if recipe.teacher is not None and recipe.teacher.network is not recipe.student.network:
        networks.append(recipe.teacher.network)

    def count(place: int, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        counts[place] += len(inputs[0])

    hooks = [n.register_forward_pre_hook(partial(count, i)) for i, n in enumerate(networks)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _peak_memory(device: torch.device) -> Callable[[], int]:
    """A function that says how many bytes were needed since, see `Images`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    before = _highest_resident_size()
    return lambda: _highest_resident_size() - before


def _highest_resident_size() -> int:
    """Of this process so far, in bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _gathered(
    done: Mapping[int, Batch],
    parts: Sequence[Tensor],
    shape: tuple[int, ...],
    memory: int,
    device: torch.device,
) -> tuple[Tensor, Cost, int]:
    """All processes' images in order, the sum of their costs, and the largest one's memory."""
    costs = torch.tensor([batch.cost for batch in done.values()], dtype=torch.float64)
    total = costs.reshape(-1, 3).sum(0)
    size = processes.size()
    if size == 1:
        return torch.cat([done[i].x for i in range(len(parts))]), Cost(*total.tolist()), memory
    own = torch.zeros(-(-len(parts) // size), len(parts[0]), *shape)
    for place, i in enumerate(sorted(done)):
        own[place, : len(parts[i])] = done[i].x
    own, total = own.to(device), total.to(device)
    everyone = [torch.empty_like(own) for _ in range(size)]
    distributed.all_gather(everyone, own)
    distributed.all_reduce(total)
    most = torch.tensor([memory], device=device)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    x = [everyone[i % size][i // size, : len(part)] for i, part in enumerate(parts)]
    return torch.cat(x).cpu(), Cost(*total.tolist()), int(most)


class Shelf:
    """Finished batches in a folder; a file holds some of them, whole or not at all.

    Files of another ``key``, and damaged ones, are as good as none.
    """

    def __init__(self, folder: Path, key: str) -> None:
        make_folder(folder)
        self.folder, self.key = folder, key
        self.waiting: dict[int, Batch] = {}

    def read(self, wanted: Collection[int]) -> dict[int, Batch]:
        """Those of the wanted batches that are there."""
        found: dict[int, Batch] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(SafetensorError, ValueError, KeyError), safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("key") == self.key:
                    for i, cost in json.loads(about["costs"]).items():
                        if int(i) in wanted:
                            found[int(i)] = Batch(file.get_tensor(i), Cost(*cost))
        return found

    def add(self, i: int, batch: Batch) -> None:
        """Keep a batch; write what waits once it is worth `PATIENCE` seconds."""
        self.waiting[i] = batch
        if sum(batch.cost.seconds for batch in self.waiting.values()) >= PATIENCE:
            self.write()

    def write(self) -> None:
        if self.waiting:
            tensors = {str(i): batch.x for i, batch in self.waiting.items()}
            costs = json.dumps({i: batch.cost for i, batch in self.waiting.items()})
            content = to_bytes(tensors, {"key": self.key, "costs": costs})
            write_atomically(self.folder / f"{min(self.waiting):06}.safetensors", content)
            self.waiting.clear()


def _key(recipe: Recipe, seeds: Tensor, labels: Tensor, chunk: int) -> str:
    """A digest of all that the images depend on."""
    digest = hashlib.blake2b(fingerprint(recipe).encode(), digest_size=16)
    for numbers in (seeds, labels, torch.tensor([chunk])):
        digest.update(numbers.numpy().tobytes())
    return digest.hexdigest()


def fingerprint(recipe: Recipe) -> str:
    """A digest of a recipe, its networks' weights included, and of kdpp's and torch's versions.

    Raises ValueError for settings that are not JSON-able.
    """
    settings: list[Any] = [kdpp.__version__, torch.__version__]
    for model in (recipe.student, recipe.teacher):
        settings.append(None if model is None else _weights(model))
    settings += [recipe.sampler, recipe.levels, recipe.cond_scale]
    for table in (recipe.guidance, recipe.options):
        try:
            json.dumps(dict(table))
        except TypeError as error:
            raise ValueError(
                f"images can be kept only where their settings are numbers, texts or lists: {error}"
            ) from error
        settings.append(sorted(table.items()))
    # Not JSON, which would take a NoiseRange for a list of steps.
    return hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()


def _weights(model: Model) -> str:
    about = json.dumps(model.card.to_json(), sort_keys=True)
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for name, tensor in model.network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{digest.hexdigest()} on {next(model.network.parameters()).device.type}"
