"""Train the classifier, the teacher and the student: `python -m kdpp.digits.training --out DIR`.

The teacher is an ordinary diffusion model with label dropout, for classifier-free guidance (Ho
and Salimans 2022, arXiv 2207.12598).  The student is distilled from it as a latent consistency
model (Luo et al. 2023, arXiv 2310.04378), see `train_student`; it is small and stopped early on
purpose, so that it leaves a gap that a teacher can help to close at sampling time.

Both generators see all 1,797 images: the figures say how well they render this data and nothing
about other handwriting.  The classifier sees the training split only.

One seed gives the same weights, bit for bit, on one machine (the command runs on one thread, so
the number of cores does not matter), and torch's global random stream stays where it was.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from kdpp.digits import checkpoints, metrics
from kdpp.digits.data import CLASSES, IMAGE_SHAPE, NULL_CLASS, load_data
from kdpp.digits.networks import Classifier, digits_mlp
from kdpp.lab.diffusion import cfg, noised, v_target
from kdpp.lab.methods import seeded, update_average
from kdpp.lab.methods.consistency import consistency_target
from kdpp.lab.networks import ResMLP, VEDenoiser
from kdpp.lab.schedules import SCHEDULE, TIMESTEPS, schedule

BATCH = 512
PIXEL_NOISE = 0.2  # on the images of the classifier, against overfitting 1,352 of them
LABEL_SMOOTHING = 0.05  # keeps its features and its certainty in bounds
LABEL_DROPOUT = 0.12
GUIDANCE = 2.0  # the scale that suits this data: at 1 digits blur, from 4 on they overshoot
REPORTED = 2000  # images that the final figures are measured on
LCM_SKIP = 20  # timesteps between the two ends of a distillation step


class Batches:
    """The random side of a training run: batches, timesteps, noise, from one seeded generator."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return images [B, 1, 8, 8] and their labels [B]."""
        rows = torch.randint(len(self.labels), (BATCH,), generator=self.generator)
        return self.images[rows], self.labels[rows]

    def dropped(self, labels: Tensor) -> Tensor:
        """Return the labels, a share of LABEL_DROPOUT of them replaced by the null label."""
        drop = torch.rand(len(labels), generator=self.generator) < LABEL_DROPOUT
        return labels.masked_fill(drop, NULL_CLASS)

    def timesteps(self) -> Tensor:
        """Return fractional timesteps [B], uniform over the schedule."""
        return torch.rand(BATCH, generator=self.generator) * (TIMESTEPS - 1)

    def noise(self, like: Tensor) -> Tensor:
        """Return Gaussian noise shaped as `like`."""
        return torch.randn(like.shape, generator=self.generator)


def train_classifier(
    seed: int = 0, iterations: int = 800, progress: bool = False
) -> tuple[Classifier, list[float]]:
    """Return the digit classifier and its losses: cross-entropy on the noised training split.

    Raises FloatingPointError where the loss is not finite.
    """
    draws = Batches(*load_data("train"), seed)
    with seeded(seed):
        network = Classifier(channels=16, features=64)

    def loss() -> Tensor:
        images, labels = draws.batch()
        noised = images + PIXEL_NOISE * draws.noise(images)
        return F.cross_entropy(network(noised), labels, label_smoothing=LABEL_SMOOTHING)

    losses = _fit("classifier", network, loss, iterations, 2e-3, progress)
    return network.eval().requires_grad_(False), losses


def train_teacher(
    seed: int = 0, iterations: int = 3000, progress: bool = False
) -> tuple[ResMLP, list[float]]:
    """Return the teacher, an average over training (EMA), and its losses.

    The loss is |v_theta - v|^2, v = (n - sigma x0) / sqrt(1 + sigma^2), at timesteps uniform over
    the schedule.  Raises FloatingPointError where the loss is not finite.
    """
    draws = Batches(*load_data(), seed)
    with seeded(seed):
        network = digits_mlp(width=192, hidden=384, blocks=3)
    average = copy.deepcopy(network)

    def loss() -> Tensor:
        images, labels = draws.batch()
        t, noise = draws.timesteps(), draws.noise(images)
        x_vp, v = v_target(images, noise, network.sigma(t))
        return F.mse_loss(network(x_vp, t, draws.dropped(labels)), v)

    losses = _fit("teacher", network, loss, iterations, 2e-3, progress, (average, 0.998))
    return average.eval().requires_grad_(False), losses


def train_student(
    teacher: ResMLP, seed: int = 0, iterations: int = 800, progress: bool = False
) -> tuple[ResMLP, list[float]]:
    """Return the consistency-distilled student (its EMA) and its losses.

    Latent consistency distillation (Luo et al. 2023, Algorithm 1): at x_t = x0 + sigma_t n the
    teacher, under guidance, takes one DDIM step to x_s, s = t - 20, and the student learns

        D_theta(x_t, t) = D_ema(x_s, s),      D_theta(x, 0) = x.

    Simplified: a fixed guidance scale instead of a drawn one that conditions the student, squared
    error instead of Huber's, timesteps off any grid, pixels instead of latents, and a student
    that starts from random weights since it is smaller than its teacher.  Where s < 0 the DDIM
    step ends at sigma = 0, and the teacher's estimate itself is the target.

    Raises FloatingPointError where the loss is not finite.
    """
    draws = Batches(*load_data(), seed)
    with seeded(seed):
        network = digits_mlp(width=64, hidden=128, blocks=1)
    average = copy.deepcopy(network)

    def loss() -> Tensor:
        images, labels = draws.batch()
        labels, t, noise = draws.dropped(labels), draws.timesteps(), draws.noise(images)
        x = noised(images, network.sigma(t), noise)
        with torch.no_grad():
            target = consistency_target(teacher, average, x, t, labels, GUIDANCE, LCM_SKIP)
        return F.mse_loss(network.denoise(x, t, labels), target)

    losses = _fit("student", network, loss, iterations, 2e-3, progress, (average, 0.95))
    return average.eval().requires_grad_(False), losses


def sample(
    network: ResMLP,
    labels: Tensor,
    sigmas: Sequence[float],
    *,
    guidance: float = 1.0,
    renew: bool = False,
    seed: int = 0,
) -> Tensor:
    """Return one image [N, 1, 8, 8] for each label: Euler (DDIM), or multistep for the student.

    Euler goes `D + (x - D) sigma' / sigma`; `renew` draws the noise anew, `D + sigma' n`, which
    is how a consistency model is sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(labels), *IMAGE_SHAPE)
    noise = torch.randn(shape, generator=generator)
    denoised = torch.zeros(shape)
    levels = torch.tensor(sigmas)
    guided = cfg(network.denoise, labels, network.classes, guidance, as_written=True)
    timesteps = VEDenoiser(network).sigma_to_t(levels[:-1])
    for sigma, t in zip(levels[:-1], timesteps, strict=True):
        x = denoised + sigma * noise
        with torch.no_grad():
            denoised = guided(x, t.expand(len(labels)))
        noise = torch.randn(shape, generator=generator) if renew else (x - denoised) / sigma
    return denoised


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all three networks, write them to --out and print times and figures."""
    parser = argparse.ArgumentParser(prog="python -m kdpp.digits.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # one order of summation, whatever the machine; and no slower
    start = time.perf_counter()
    classifier, _ = train_classifier(options.seed, progress=True)
    teacher, _ = train_teacher(options.seed, progress=True)
    student, _ = train_student(teacher, options.seed, progress=True)
    checkpoints.save(options.out / "classifier.safetensors", classifier)
    checkpoints.save(options.out / "teacher.safetensors", teacher)
    checkpoints.save(options.out / "student.safetensors", student)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    _report(classifier, teacher, student, options.seed)


def _report(classifier: Classifier, teacher: ResMLP, student: ResMLP, seed: int) -> None:
    """Print the classifier's held-out accuracy and the samplers' figures."""
    images, labels = load_data("held_out")
    correct = (classifier(images).argmax(1) == labels).double().mean()
    print(f"classifier, held out: accuracy {correct:.2%} of {len(labels)}")
    reference = metrics.features_of(load_data()[0], classifier)
    asked = torch.arange(REPORTED) % CLASSES
    rows = {
        "student, 4 steps": sample(student, asked, SCHEDULE, renew=True, seed=seed),
        "teacher, 4 steps": sample(teacher, asked, SCHEDULE, guidance=GUIDANCE, seed=seed),
        "teacher, 50 steps": sample(teacher, asked, schedule(50), guidance=GUIDANCE, seed=seed),
    }
    for name, made in rows.items():
        scores = metrics.measure(made, asked, classifier, reference)
        print(
            f"{name}: Frechet distance {scores.frechet_distance:.3f}, inception score "
            f"{scores.inception_score:.2f}, accuracy {scores.accuracy:.1%}"
        )


def _fit(
    name: str,
    network: nn.Module,
    loss: Callable[[], Tensor],
    iterations: int,
    rate: float,
    progress: bool,
    averaging: tuple[nn.Module, float] | None = None,
) -> list[float]:
    """Minimise `loss()` by Adam, its rate falling from `rate` to 0 as a cosine; return the losses.

    `averaging` holds a copy of the network and the decay of the running average kept in it.
    Raises FloatingPointError at the first loss that is not finite.
    """
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    losses = []
    for step in tqdm(range(iterations), desc=name, unit="it", disable=not progress):
        value = loss()
        losses.append(value.item())
        if not value.isfinite():
            raise FloatingPointError(f"{name}: the loss of iteration {step} is {losses[-1]}")
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        cosine.step()
        if averaging:
            average, decay = averaging
            update_average(average, network, decay)
    return losses


if __name__ == "__main__":
    main()
