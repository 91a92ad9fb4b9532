"""The pictures of a request: drawn in batches, written one by one, kept when the run is stopped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

import kdpp
from kdpp.checkpoints.forecast import forecast
from kdpp.checkpoints.load import is_pipeline
from kdpp.checkpoints.media import FIRST, files_of, frame_path, shown_frames
from kdpp.checkpoints.pairs import LabPair, PipelinePair, check_places, check_texts, open_pair
from kdpp.checkpoints.requests import (
    GUIDES,
    Guide,
    Offload,
    Picture,
    Request,
    read_texts,
    texts_of,
)
from kdpp.checkpoints.sheets import Tile, sheet
from kdpp.driver import Callback
from kdpp.lab import processes
from kdpp.lab.console import say
from kdpp.lab.files import make_folder, write_atomically
from kdpp.lab.sampling import counted, most_memory, sample_seeds
from kdpp.solver import solver_of

__all__ = ["Drawn", "Job", "draw", "draw_all", "draw_folder", "tiles"]


class Job(NamedTuple):
    """A picture to be drawn, by whose help, and its file, or the first frame's of a video."""

    picture: Picture
    guide: Guide
    path: Path


class Drawn(NamedTuple):
    """Pixels (height, width, 1 or 3), of a video (frames, height, width, 3), and their cost.

    ``student`` and ``teacher`` are evaluations of the networks, both halves of CFG counted.
    ``estimates`` are the pixels of what each step took the picture to be, if they were asked for.
    """

    pixels: Tensor
    student: float
    teacher: float
    seconds: float
    estimates: list[Tensor]


def draw_folder(
    request: Request,
    pictures: Sequence[Picture],
    guides: Sequence[Guide],
    out: Path,
    device: str,
    batch: int,
    preview: bool = False,
    offload: Offload = "teacher",
) -> None:
    """The pictures by each guide, as files of a folder; of several guides a sheet, too.

    Processes share the pictures out. Errors as `kdpp.checkpoints.generate.run`.
    """
    rank, size = processes.share()
    where = processes.device(device)
    pipeline = is_pipeline(request.student)
    # Pictures are the same, however many processes share them: a launcher gives each one thread.
    wanted = processes.cores() if pipeline else 1
    with processes.threads(wanted) if where.type == "cpu" else nullcontext():
        check_places(request)
        check_texts(request, [picture.prompt for picture in pictures])
        if rank == 0 and pipeline:
            print(f"kdpp: {forecast(request, where, offload)}", file=sys.stderr)
        pair = open_pair(request, where, offload)
        for remark in pair.remarks if rank == 0 else ():
            print(f"kdpp: {remark}", file=sys.stderr)
        make_folder(out)
        frames, several = pair.request.frames or 1, len(guides) > 1
        ending = f"{FIRST}.png" if frames > 1 else ".png"
        jobs = [
            Job(picture, guide, out / f"{name_of(picture, guide if several else None)}{ending}")
            for picture in pictures
            for guide in guides
        ]
        mine = [job for i, job in enumerate(jobs) if i // len(guides) % size == rank]
        draw_all(pair, mine, batch, out / f"costs-{rank}.json", preview, progress=rank == 0)
    if rank == 0:
        while not all(job.path.exists() for job in jobs):
            time.sleep(0.1)
        if several:
            write_atomically(out / "sheet.png", sheet(tiles(jobs, out, frames), len(guides)))
        kind = "video" if frames > 1 else "picture"
        say(f"wrote {len(jobs)} {kind}{'s' * (len(jobs) > 1)} to {out}")


def draw_all(
    pair: LabPair | PipelinePair,
    jobs: Sequence[Job],
    batch: int,
    costs: Path,
    preview: bool = False,
    progress: bool = False,
) -> None:
    """Draw and write what is not there yet; keep in ``costs`` what each file has cost."""
    known: dict[str, Any] = json.loads(costs.read_bytes()) if costs.exists() else {}
    left = [job for job in jobs if not is_there(pair.request, job, preview)]
    by_guide = [[job for job in left if job.guide == guide] for guide in GUIDES]
    batches = [own[i : i + batch] for own in by_guide for i in range(0, len(own), batch)]
    pair.expect([job.picture for job in some] for some in batches)
    with Progress(pair, len(jobs), len(left), progress) as bar:
        for some in batches:
            drawn = draw(pair, [job.picture for job in some], some[0].guide, preview, bar.step)
            for job, one in zip(some, drawn):
                texts = texts_of(requested(pair.request, job), job.picture.seed, job.guide)
                if preview:
                    write_atomically(steps_path(job.path), strip(one.estimates))
                for path, content in files_of(job.path, one.pixels, texts, pair.request.fps):
                    write_atomically(path, content)
                known[job.path.name] = (one.student, one.teacher, one.seconds)
            write_atomically(costs, json.dumps(known).encode())


class Progress:
    """A bar of steps: which pictures, whether the step was guided, and the peak of memory."""

    def __init__(self, pair: LabPair | PipelinePair, pictures: int, left: int, show: bool) -> None:
        self.steps = len(pair.levels) - 1
        self.device = pair.device
        total, done = pictures * self.steps, (pictures - left) * self.steps
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not show)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def step(self, info: Mapping[str, Any]) -> None:
        """A step of a run is done, of all pictures of its batch."""
        guided = "guided" if "denoised_teacher" in info else "alone"
        memory = f"{most_memory(self.device) / 2**30:.1f} GiB"
        said = f"step {info['i'] + 1} of {self.steps}, {guided}, {memory}"
        self.bar.set_postfix_str(said, refresh=False)
        self.bar.update(len(info["x"]))


def requested(request: Request, job: Job) -> Request:
    """The request of one picture: with its own prompt and label."""
    return replace(request, prompt=job.picture.prompt, label=job.picture.label)


def is_there(request: Request, job: Job, preview: bool) -> bool:
    """Whether the picture's file, and its estimates' if wanted, was drawn by this very request."""
    if not job.path.exists():
        return False
    if read_texts(job.path) != texts_of(requested(request, job), job.picture.seed, job.guide):
        raise ValueError(f"{job.path} is a picture of other settings; name another folder")
    return not preview or steps_path(job.path).exists()


def draw(
    pair: LabPair | PipelinePair,
    pictures: Sequence[Picture],
    guide: Guide,
    preview: bool = False,
    listener: Callback | None = None,
) -> list[Drawn]:
    """The pictures of a batch; ``listener`` is called at each step, as a sampler's callback is."""
    request = pair.request
    assert request.sampler is not None
    like = torch.empty(len(pictures), *pair.shape, device=pair.device)
    seeds = torch.tensor([picture.seed for picture in pictures])
    teacher: Any = pair.teacher if guide == "teacher" else pair.student
    guidance = {"teacher_steps": 0} if guide == "none" else request.guidance
    if guide == "self":
        guidance = {**guidance, "teacher_cfg_scale": request.cond_scale}
    extra_args = pair.extra_args(pictures)
    if guide == "teacher" and (own := pair.teacher_args(pictures)):
        teacher, guidance = told(teacher, guidance, own)

    def guided(noise: Any) -> kdpp.TeacherGuidedDenoiser:
        return kdpp.TeacherGuidedDenoiser(
            pair.student, teacher, renoise_noise_sampler=noise, **guidance
        )

    solver, _ = solver_of(request.sampler)
    estimates: list[Tensor] = []

    def listen(info: dict[str, Any]) -> None:
        if preview:
            estimates.append(info["denoised"].clone())
        if listener is not None:
            listener(info)

    with torch.no_grad(), counted(pair.networks) as counts:
        start = time.perf_counter()
        latents = sample_seeds(
            guided, like, seeds, pair.levels, extra_args, solver, request.options, listen,
            *((pair.edit.start, pair.edit.known) if pair.edit else ()),
        )  # fmt: skip
        pixels = pair.pixels(latents)
        seconds = (time.perf_counter() - start) / len(pictures)
        seen = [pair.pixels(estimate) for estimate in estimates]
    student, asked = (count / len(pictures) for count in counts)
    return [
        Drawn(one, student, asked, seconds, [step[row] for step in seen])
        for row, one in enumerate(pixels)
    ]


def told(
    teacher: Any, guidance: Mapping[str, Any], extra_args: Mapping[str, Any]
) -> tuple[kdpp.Teacher, dict[str, Any]]:
    """The teacher with these settings of guidance and conditions of its own; what is left of the
    settings."""
    own = {name.removeprefix("teacher_"): value for name, value in guidance.items()}
    left = {"extrapolate": own.pop("extrapolate")}
    return kdpp.Teacher(teacher, extra_args=extra_args, **own), left


def strip(estimates: Sequence[Tensor]) -> bytes:
    """The estimates of a run, step by step, as one PNG file; of a video some frames."""
    shown = [one[shown_frames(len(one))] if one.ndim == 4 else one[None] for one in estimates]
    numbered = enumerate(shown, 1)
    return sheet([Tile(list(some), f"step {i}", "") for i, some in numbered], len(estimates))


def steps_path(path: Path) -> Path:
    """The file of a picture's estimates, or of a video's, by its first frame's."""
    return path.with_name(f"{path.stem.removesuffix(FIRST)}-steps.png")


def tiles(jobs: Sequence[Job], out: Path, frames: int) -> list[Tile]:
    """The pictures of a sheet, with what each has cost; of videos some frames."""
    costs: dict[str, Any] = {}
    for path in out.glob("costs-*.json"):
        costs |= json.loads(path.read_bytes())
    made = []
    for job in jobs:
        student, teacher, seconds = costs.get(job.path.name, (0, 0, 0.0))
        evaluations = f"{student:g} + {teacher:g}" if teacher else f"{student:g}"
        title = f"seed {job.picture.seed}, {GUIDES[job.guide]}"
        some = [frame_path(job.path, i) for i in shown_frames(frames)]
        files = some if frames > 1 else [job.path]
        made.append(Tile(files, title, f"{evaluations} evaluations, {seconds:.2g} s"))
    return made


def name_of(picture: Picture, guide: Guide | None) -> str:
    """A picture's name: the line of its prompt, its seed, its guide."""
    line = "" if picture.line is None else f"{picture.line:05}-"
    return f"{line}{picture.seed:05}{f'-{guide}' if guide else ''}"
