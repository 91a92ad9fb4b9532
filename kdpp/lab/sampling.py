"""Images from seeds: an image depends on its seed alone, whoever computes it.

Every image's initial noise, solver noise and renoise noise come from its own seed, each from a
stream of its own. Images are computed in batches that are fixed by their place in the list of
seeds. So any number of processes computes the same batches, and on the CPU the same bits.
"""

from __future__ import annotations

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
from torch import Tensor, nn
from tqdm.auto import tqdm

import kdpp
import kdpp.solvers  # enters kdpp's own by their names
from kdpp.checks import check_count, check_number, check_sigmas
from kdpp.driver import Callback
from kdpp.editing import noised
from kdpp.kinds import is_flow
from kdpp.lab import processes
from kdpp.lab.files import digest, make_folder, write_atomically
from kdpp.lab.models import GenerativeModel
from kdpp.noise import SeededNoise, read_seeds
from kdpp.solver import Solver, solver_of, unknown

__all__ = [
    "GUIDANCE",
    "Batches",
    "Images",
    "Recipe",
    "attempt",
    "counted",
    "draw",
    "fingerprint",
    "image_seeds",
    "most_memory",
    "sample_seeds",
    "solver_for",
]

GUIDANCE = (
    "teacher_scale", "teacher_steps", "teacher_cfg_scale", "renoise", "renoise_eta", "extrapolate",
)  # fmt: skip
"""The keywords of `kdpp.TeacherGuidedDenoiser` that a recipe's ``guidance`` may hold."""

INITIAL, SOLVER, RENOISE = range(3)
"""The streams of a seed."""
IMAGES, SEEDS = 10**6, 10**12
"""How many images a seed may have, and how many seeds there are: every image has its own."""
CHUNK = 500
"""Images in a batch."""
PATIENCE = 0.5
"""Seconds of finished work that are held back, so that writing costs next to nothing."""


@dataclass(frozen=True)
class Recipe:
    """How images are made: everything that changes them but the seeds and labels.

    Args:
        student: what samples; a teacher alone is a student here.
        teacher: what guides it, or None.
        sampler: one of `kdpp.SOLVERS`, by its name, that takes any levels.
        levels: the sigmas, from the highest to 0 as a rule.
        cond_scale: the student's CFG scale; also for one that takes its guidance as an input.
        guidance: keywords of `kdpp.TeacherGuidedDenoiser`, see `GUIDANCE`.
        options: the sampler's own, such as eta.

    Raises:
        ValueError: an unknown sampler or keyword (the nearest known one is said), levels that
            increase, guidance without a teacher or outside its range, a CFG scale that the student
            was not trained for, churn (its noise cannot come from the seeds), a student and a
            teacher of different shapes or classes.
    """

    student: GenerativeModel
    teacher: GenerativeModel | None
    sampler: str | Solver
    levels: tuple[float, ...]
    cond_scale: float = 1.0
    guidance: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
    def solver(self) -> Solver:
        return solver_for(self.sampler)

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def guided(self, noise: Any = None) -> kdpp.TeacherGuidedDenoiser:
        """Student and teacher, ready to sample with; ``noise`` is the renoise noise sampler."""
        student = self.student.denoiser_for(self.steps)
        if self.teacher is None:
            return kdpp.TeacherGuidedDenoiser(student, student, teacher_steps=0)
        teacher = self.teacher.denoiser_for(self.steps)
        return kdpp.TeacherGuidedDenoiser(
            student, teacher, renoise_noise_sampler=noise, **self.guidance
        )

    def _check_pair(self, teacher: GenerativeModel) -> None:
        ours, theirs = [(list(m.shape), m.classes) for m in (self.student, teacher)]
        if ours != theirs:
            raise ValueError(
                f"the student's images have shape {ours[0]} and {ours[1]} classes, the teacher's "
                f"{theirs[0]} and {theirs[1]}; they must be alike"
            )

    def _check_options(self) -> None:
        settings = self.solver.settings(self.options)
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


def solver_for(name: str | Solver) -> Solver:
    """The solver of this name, see `kdpp.solver.solver_of`: one that takes any levels.

    Raises ValueError for an unknown name (the nearest known one is said), and for a solver that
    makes its own levels.
    """
    solver, _ = solver_of(name)
    if solver.own_levels is not None:
        raise ValueError(f"{solver.name} makes its own levels; take a solver of given levels")
    return solver


@dataclass(frozen=True)
class Images:
    """Images and what they cost.

    Attributes:
        x: ``(N, *shape)`` on the CPU, as they were sampled, not clamped.
        labels: int64 ``(N,)``.
        evaluations: of the student's and the teacher's network for one image; both halves of CFG
            count. A student that teaches itself counts as the student.
        compute: parameters × evaluations for one image, over both networks.
        seconds: of sampling, summed over batches.
        memory: bytes. On CUDA the most that was allocated; else by how much the process's highest
            resident size rose, which is 0 where earlier work took more. Of the largest process.
    """

    x: Tensor
    labels: Tensor
    evaluations: tuple[float, float]
    compute: float
    seconds: float
    memory: int


def image_seeds(seed: int, count: int) -> range:
    """The images' own seeds under a seed, ``seed·10^6 + i``: no two seeds share one.

    Raises ValueError for a seed outside [0, 10^12), or a count outside [1, 10^6].
    """
    if check_count("seed", seed, 0) >= SEEDS:
        raise ValueError(f"seed is {seed}; it must be below {SEEDS:,}")
    if check_count("images", count, 1) > IMAGES:
        raise ValueError(f"images is {count}; it must be {IMAGES:,} at most, take more seeds")
    return range(seed * IMAGES, seed * IMAGES + count)


def draw(
    recipe: Recipe,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    chunk: int = CHUNK,
    progress: bool = False,
) -> Images:
    """The images of these seeds.

    On the CPU it works on one thread, since torch's bits depend on how many there are. Torch's
    random streams are left as they were.

    Args:
        seeds: whole numbers in [0, 2^63), one for each image.
        labels: int64 ``(N,)``; by default seed s asks for class s mod classes.
        chunk: images in a batch. Another size may change an image's last bits, as may its place in
            the last, smaller batch. ``renoise="random"`` draws its level once for each batch, from
            the seed of the batch's first image.
        progress: show a bar.

    Raises TypeError and ValueError for other seeds, labels or chunks, and for what the sampler
    refuses.
    """
    batches = Batches(recipe, seeds, labels, chunk)
    batches.make(range(len(batches)), progress)
    return batches.images()


def attempt(recipe: Recipe, name: object) -> Images:
    """Draw one image; ValueError says of ``name`` what it cannot."""
    try:
        return draw(recipe, [0])
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{name}: {error}") from error


class Batch(NamedTuple):
    """Finished images, ``(n, *shape)``, and what they cost; see `Images`.

    ``student`` and ``teacher`` count the images that the networks evaluated.
    """

    x: Tensor
    student: int
    teacher: int
    seconds: float
    memory: int


class Batches:
    """The images of some seeds, batch by batch: what `draw` does, in pieces.

    With a ``folder`` finished batches are kept there, whole or not at all, and those that are there
    are taken. The folder must belong to these images alone, so name it by all that they depend on.
    At most half a second of finished work is held back, until `flush`.
    """

    def __init__(
        self,
        recipe: Recipe,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        chunk: int = CHUNK,
        folder: Path | None = None,
    ) -> None:
        check_count("chunk", chunk, 1)
        self.recipe, self.folder = recipe, folder
        self.seeds, self.labels = _read(recipe, seeds, labels)
        self.rows = torch.split(torch.arange(len(self.seeds)), chunk)
        self.done: dict[int, Batch] = {}
        self.waiting: dict[int, Batch] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, wanted: Collection[int], progress: bool = False) -> None:
        """Have these batches, by their numbers: those that are not there are sampled."""
        self._take(wanted)
        device = self.recipe.student.device
        threads = processes.single_thread() if device.type == "cpu" else nullcontext()
        bar = tqdm(
            wanted, desc="sampling", unit="batch", leave=False, delay=1, disable=not progress
        )
        both = (self.recipe.student, self.recipe.teacher)
        networks = [model.network for model in both if model is not None]
        with threads, counted(networks) as counts:
            peak = _peak_memory(device)
            for i in bar:
                if i in self.done:
                    continue
                counts[:] = 0, 0
                start, rows = time.perf_counter(), self.rows[i]
                x = _sample(self.recipe, self.seeds[rows], self.labels[rows], device)
                batch = Batch(x, counts[0], counts[1], time.perf_counter() - start, peak())
                self.done[i] = self.waiting[i] = batch
                if sum(batch.seconds for batch in self.waiting.values()) >= PATIENCE:
                    self.flush()

    def flush(self) -> None:
        """Write what is held back: one file of all that waits."""
        if self.folder is not None and self.waiting:
            make_folder(self.folder)
            tensors = {str(i): batch.x for i, batch in self.waiting.items()}
            costs = json.dumps({i: batch[1:] for i, batch in self.waiting.items()})
            content = to_bytes(tensors, {"costs": costs})
            write_atomically(self.folder / f"{min(self.waiting):06}.safetensors", content)
        self.waiting.clear()

    def complete(self) -> bool:
        """Whether all batches are there, with those that others have put into the folder."""
        self._take(set(range(len(self))) - self.done.keys())
        return len(self.done) == len(self)

    def _take(self, wanted: Collection[int]) -> None:
        """Those of the wanted batches that the folder has; a damaged file is passed over."""
        broken = (SafetensorError, OSError, ValueError, KeyError, TypeError)
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder and wanted else ():
            with suppress(*broken), safe_open(path, "pt") as file:
                for i, costs in json.loads(file.metadata()["costs"]).items():
                    if int(i) in wanted:
                        self.done[int(i)] = Batch(file.get_tensor(i), *costs)

    def images(self) -> Images:
        """All images; every batch must be there."""
        batches = [self.done[i] for i in range(len(self))]
        x, *counts, seconds, memory = zip(*batches)
        student, teacher = (sum(count) / len(self.seeds) for count in counts)
        recipe = self.recipe
        compute = recipe.student.parameters * student
        if recipe.teacher is not None:
            compute += recipe.teacher.parameters * teacher
        return Images(
            torch.cat(x), self.labels, (student, teacher), compute, sum(seconds), max(memory)
        )


def _read(recipe: Recipe, seeds: Sequence[int], labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The seeds and the labels as int64 tensors (N,)."""
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
    extra_args = {**recipe.student.conditions(labels), "cond_scale": recipe.cond_scale}
    return sample_seeds(
        recipe.guided, like, seeds, recipe.levels, extra_args, recipe.solver, recipe.options
    ).cpu()


def sample_seeds(
    guided: Callable[[SeededNoise], kdpp.TeacherGuidedDenoiser],
    like: Tensor,
    seeds: Tensor,
    levels: Sequence[float],
    extra_args: dict[str, Any],
    solver: Solver,
    options: Mapping[str, Any],
    callback: Callback | None = None,
    start: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The latents of some seeds in one run, each from streams of its own.

    The initial noise is the same for all ways to start: it is the start itself, what a picture is
    noised with, and what a known region is seen with.

    Args:
        guided: makes the model from the noise sampler that renoising takes.
        like: of the latents' shape, (batch, …), dtype and device; its numbers are not used.
        seeds: int64 (batch,).
        levels, extra_args, solver, options, callback: as in `kdpp.sample`.
        start: latents, (1, …), that are noised as in `kdpp.image_to_image`; None: noise alone.
        known: latents, (1, …), and their mask, as in `kdpp.inpaint`; None: nothing is known.
    """
    model = guided(SeededNoise(like, seeds, RENOISE))
    noise = None if solver.noise == "none" else SeededNoise(like, seeds, SOLVER)
    initial = SeededNoise(like, seeds, INITIAL)()
    sigmas = torch.tensor(levels, device=like.device)
    if known is not None:
        image, mask = known
        model = kdpp.inpaint(model, image.to(like).expand_as(like), mask, initial)
    if start is None:
        x = initial * levels[0]
    else:
        flow = is_flow(model.student)
        x = noised(start.to(like).expand_as(like), levels[0], initial, flow)
    with _seeded(int(seeds[0]), like.device):  # for what has no seeds: random renoise levels
        return kdpp.sample(solver, model, x, sigmas, extra_args, callback, True, noise, **options)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random streams at this seed, and afterwards where they were."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


@contextmanager
def counted(networks: Sequence[nn.Module]) -> Iterator[list[int]]:
    """[images evaluated by the student's network, by the teacher's], counted up inside.

    One network in both roles counts as the student's.
    """
    counts = [0, 0]

    def count(place: int, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        counts[place] += len(inputs[0])

    different = dict.fromkeys(networks)
    hooks = [one.register_forward_pre_hook(partial(count, i)) for i, one in enumerate(different)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _peak_memory(device: torch.device) -> Callable[[], int]:
    """A function that says how many bytes were needed since, see `Images`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = 0 if device.type == "cuda" else most_memory(device)
    return lambda: most_memory(device) - before


def most_memory(device: torch.device) -> int:
    """The most bytes that were needed: allocated on CUDA, else the process's resident size."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else _highest_resident_size()
    )


def _highest_resident_size() -> int:
    """Of this process so far, in bytes; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ModuleNotFoundError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def fingerprint(recipe: Recipe) -> str:
    """A digest of all that a recipe's images depend on but their seeds and labels.

    That is the networks' weights, what the solver's plan does on these levels, the settings, the
    size of a batch, and kdpp's and torch's versions. Raises ValueError for settings that are not
    JSON-able.
    """
    guidance = dict(recipe.guidance)
    try:
        json.dumps(guidance)
    except TypeError as error:
        raise ValueError(
            f"images can be kept only where their settings are numbers, texts or lists: {error}"
        ) from error
    solver = recipe.solver
    return digest([
        kdpp.__version__, torch.__version__, CHUNK,
        *(model and model.digest() for model in (recipe.student, recipe.teacher)),
        recipe.levels, solver.plan(recipe.levels, **recipe.options), solver.cfg_pp, solver.noise,
        recipe.cond_scale,
        sorted(guidance.items()),  # not as JSON, which would take a NoiseRange for a list of steps
    ])  # fmt: skip
