"""Sources of standard normal noise, ``(sigma, sigma_next) -> noise`` like k-diffusion's."""

from __future__ import annotations

import hashlib
import math
import numbers
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdpp.kdiffusion as kdiffusion
from kdpp.checks import check_count, check_latent, check_number

__all__ = [
    "BrownianNoise",
    "NoiseSampler",
    "SeededNoise",
    "brownian_noise",
    "checked",
    "host_noise",
    "private_generator",
    "private_seed",
    "row_seeds",
]

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def host_noise(x: Tensor) -> NoiseSampler:
    """k-diffusion's default noise sampler if k-diffusion is loaded, else ``torch.randn_like``.

    It is looked up at every call, because web UIs put their per-image seeds there; a host whose
    module has another name says so (`kdpp.kdiffusion.use`). Both draw from torch's stream.
    """
    sampling = kdiffusion.loaded("sampling")
    if sampling is not None:
        sampler: NoiseSampler = sampling.default_noise_sampler(x)
        return sampler
    return lambda sigma, sigma_next: torch.randn_like(x)


def brownian_noise(x: Tensor, sigmas: Tensor) -> NoiseSampler:
    """k-diffusion's Brownian tree over the schedule: increments of one path, normalised.

    Without k-diffusion it is `BrownianNoise`, and a warning says so once, unless that was asked for
    (``kdpp.kdiffusion.use(None)``). Either takes one integer from torch's stream for its seed.
    """
    low, high = sigmas[sigmas > 0].min(), sigmas.max()
    if kdiffusion.package() is None:
        return BrownianNoise(x, low, high)
    try:
        tree = kdiffusion.sampling.BrownianTreeNoiseSampler
    except (ImportError, AttributeError):  # AttributeError: a host's k-diffusion from before it
        kdiffusion.say_once(
            "k-diffusion's Brownian tree is not there: the default noise of SDE samplers is "
            "kdpp.BrownianNoise, of the same law but not the same numbers, so a seed gives other "
            "images than with k-diffusion (give noise_sampler to choose it yourself)"
        )
        return BrownianNoise(x, low, high)
    sampler: NoiseSampler = tree(x, low, high)
    return sampler


def private_seed(x: Tensor) -> int:
    """A seed made from the states of torch's random streams, without drawing from them.

    It is reproducible under ``torch.manual_seed``, and another one as soon as anything is drawn, as
    a host draws a latent for every batch.
    """
    states = [torch.get_rng_state()]
    if x.device.type != "cpu":
        module = getattr(torch, x.device.type)
        indexed = x.device.type in ("cuda", "xpu")
        states.append(module.get_rng_state(x.device) if indexed else module.get_rng_state())
    digest = hashlib.blake2b(b"kdpp renoise", digest_size=8)
    for state in states:
        digest.update(state.numpy().tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1  # generators take 63 bits


def private_generator(x: Tensor) -> torch.Generator:
    """A generator on x's device that leaves the host's random streams where they are."""
    return torch.Generator(x.device).manual_seed(private_seed(x))


def checked(noise: Tensor, name: str, x: Tensor) -> Tensor:
    """``noise`` in the latent's dtype and on its device; ValueError for another shape."""
    if not isinstance(noise, Tensor):
        raise TypeError(f"{name} returned {type(noise).__name__}; it must return a tensor of noise")
    if noise.shape != x.shape:
        raise ValueError(
            f"{name} returned noise of shape {tuple(noise.shape)}; "
            f"the latent has shape {tuple(x.shape)}"
        )
    return noise.to(x)


WORD = 2**32 - 1
PATH = int.from_bytes(b"brownian", "big")  # the stream of `BrownianNoise`


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words of 32 bits for every counter of four, in int64 tensors.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
    """
    c0, c1, c2, c3 = (word.clone(memory_format=torch.contiguous_format) for word in counter)
    k0, k1 = key
    for _ in range(10):
        # Products wrap at 64 bits; only their bits are used, so their sign does not matter.
        c0.mul_(0xD2511F53)
        c2.mul_(0xCD9E8D57)
        c1.bitwise_xor_(c2 >> 32).bitwise_xor_(k0).bitwise_and_(WORD)
        c3.bitwise_xor_(c0 >> 32).bitwise_xor_(k1).bitwise_and_(WORD)
        # What was written over is what is next: high ^ word ^ key in c1 and c3, low in c2 and c0.
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def box_muller(words: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, as many as words, stacked last; |n| ≤ 6.8.

    ``sqrt(-2 ln u) (cos 2πv, sin 2πv)`` for words in pairs: u = (word + 1/2)/2^32, which is never
    0, and v = next word/2^32.
    """
    radius, angle = (torch.stack(tuple(words[i::2]), -1).to(dtype) for i in (0, 1))
    radius.mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    angle.mul_(2.0 * math.pi * 2.0**-32)
    # Complex numbers, because torch interleaves their parts faster than it stacks tensors last.
    pairs = torch.complex(angle.cos().mul_(radius), angle.sin().mul_(radius))
    return torch.view_as_real(pairs).flatten(-2)


class SeededNoise:
    """Noise from a seed for each sample: a noise sampler, ``(sigma, sigma_next) -> noise``.

    Number p of sample j in call k is a function of (seeds[j], stream, k, p) alone: the same in any
    batch, in any order, and on any device to the rounding of log, cos and sin. It comes from a
    counter-based generator, Philox4x32-10, and Box-Muller; no torch random stream is read or moved.
    The calls are counted from 0, so make a new source for every run.

    Args:
        x: the latent, ``(batch, *shape)``; noise has its shape, dtype and device. Noise of 16 bits
            is that of float32, rounded.
        seeds: whole numbers in [0, 2^63), one for each sample.
        stream: a whole number in [0, 2^63); other streams of the same seed are independent.

    Raises:
        TypeError: x is not a floating-point tensor, or seeds are not whole numbers.
        ValueError: seeds are not one in [0, 2^63) for each sample, or stream is not in [0, 2^63).
    """

    def __init__(self, x: Tensor, seeds: Sequence[int] | Tensor, stream: int = 0) -> None:
        check_latent(x)
        stream = check_below("stream", stream, 2**63)
        words = read_seeds(seeds, len(x)).to(x.device)[:, None]
        self.shape, self.dtype = x.shape, x.dtype
        self.size = x[:1].numel()
        self.calls = 0
        self.key = stream & WORD, stream >> 32
        self.blocks = torch.arange(-(-self.size // 4), device=x.device)
        self.seeds = words & WORD, words >> 32
        # Ten rounds are a hundred kernels, which take as long for many small latents as for one.
        ahead = (2**14 if x.device.type == "cpu" else 2**20) // max(1, x.numel())
        self.ahead = min(max(1, ahead), 16)
        self.group, self.noise = -1, torch.empty(0)

    def __call__(self, sigma: object = None, sigma_next: object = None) -> Tensor:
        """The noise of the next call; the levels make no difference to it."""
        self.calls += 1
        return self.draw(self.calls - 1)

    def draw(self, call: int) -> Tensor:
        """The noise of call number ``call``, a whole number in [0, 2^32), whatever was called."""
        group, place = divmod(check_below("call", call, 2**32), self.ahead)
        if group != self.group:
            self.noise, self.group = self.make(group * self.ahead), group
        return self.noise[place].clone(memory_format=torch.contiguous_format)

    def make(self, call: int) -> Tensor:
        """The noise of `ahead` calls from ``call`` on, stacked first."""
        calls = torch.arange(call, call + self.ahead, device=self.blocks.device)
        grid = (self.ahead, self.shape[0], len(self.blocks))
        counter = (self.blocks, calls[:, None, None], *self.seeds)
        words = philox([word.expand(grid) for word in counter], self.key)
        accurate = torch.float64 if self.dtype == torch.float64 else torch.float32
        normals = box_muller(words, accurate).flatten(2)[..., : self.size]
        return normals.reshape(self.ahead, *self.shape).to(self.dtype)


def row_seeds(seed: int, *shown: Tensor) -> list[int]:
    """A seed for each sample, from the run's seed and what a host shows of the sample.

    For a host that has one seed for a batch, so that image i is the same in any batch::

        seeds = kdpp.row_seeds(seed, noise)
        solver_noise, renoise = kdpp.SeededNoise(x, seeds), kdpp.SeededNoise(x, seeds, stream=1)

    The seed of sample i is the BLAKE2b hash of ``seed`` and of row i's numbers in each tensor. So
    it is the same at any place in any batch, on any device, and in any dtype that holds the
    numbers exactly. Rows of the same numbers have the same seed, as they are the same picture.
    Give what is equal to the last bit from batch to batch: the noise that the run starts from, and
    where that is zeros (a second pass) the latent. The tensors are copied to the CPU.

    Args:
        seed: the run's, a whole number.
        shown: floating-point tensors ``(batch, *shape)``, one at least, all of one batch.

    Returns:
        Whole numbers in [0, 2^63), as `SeededNoise` and `BrownianNoise` take them.

    Raises:
        TypeError: a tensor is not a floating-point one.
        ValueError: seed is not a whole number; there is no tensor, or they differ in their batch.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}; it must be a whole number")
    for one in shown:
        check_latent(one, "a tensor of rows")
    if len({len(one) for one in shown}) != 1:
        raise ValueError(
            f"row_seeds was given tensors of {[len(one) for one in shown]} rows; give one tensor "
            "or more, with a row for each sample"
        )
    made = []
    # Zero is added, for -0.0 and 0.0 are one number in two ways.
    for rows in zip(*(one.detach().cpu().double() + 0.0 for one in shown)):
        digest = hashlib.blake2b(f"kdpp rows {int(seed)}".encode(), digest_size=8)
        for row in rows:
            digest.update(f" {tuple(row.shape)} ".encode())
            digest.update(row.contiguous().numpy().tobytes())
        made.append(int.from_bytes(digest.digest(), "big") >> 1)  # seeds take 63 bits
    return made


class BrownianNoise:
    """Increments of one Brownian path, normalised: a noise sampler at the price of plain noise.

    ``(sigma, sigma_next) -> (W(t') - W(t))/sqrt|t' - t|``, t = transform(sigma), t' =
    transform(sigma_next). It has the joint law of k-diffusion's ``BrownianTreeNoiseSampler``,
    whatever is asked in which order, and other numbers. The path is known at the times asked so
    far. A new time t between two of them, a and b, follows the Brownian bridge: with
    ``λ = (t - a)/(b - a)`` and a new n, the normalised increment z over [a, b] becomes
    ``sqrt(λ) z + sqrt(1 - λ) n`` over [a, t] and ``sqrt(1 - λ) z - sqrt(λ) n`` over [t, b]. A new
    time outside them ends an independent increment. So a query draws once for a new time, twice at
    most, and not at all for known times; one latent is kept for every time that was asked.

    The same query gives the same noise (to rounding, once a time between was asked), the reverse
    query its negative, and a query over no time zeros. The path depends on the order of the
    queries.

    Args:
        x: the latent, ``(batch, *shape)``; noise has its shape, dtype and device.
        sigma_min, sigma_max: the lowest and highest level of the run, as k-diffusion takes them.
            They are only checked; the path goes on outside them.
        seed: None takes one integer from torch's stream, as k-diffusion does; a whole number in
            [0, 2^63); or one for each sample, whose path is then the same in any batch
            (`SeededNoise`).
        transform: monotonic function from a level, a float64 tensor of no dimensions on the CPU, to
            its time; None takes the level itself.

    Raises:
        TypeError: x is not a floating-point tensor, or seeds are not whole numbers.
        ValueError: a seed is not in [0, 2^63), or there is not one for each sample; sigma_min and
            sigma_max, or levels that are asked, are not finite numbers ≥ 0, are out of order, or
            have a time that is not finite.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: int | Sequence[int] | Tensor | None = None,
        transform: Callable[[Tensor], Tensor | float] | None = None,
    ) -> None:
        check_latent(x)
        low, high = read_level("sigma_min", sigma_min), read_level("sigma_max", sigma_max)
        if low > high:
            raise ValueError(f"sigma_min is {low!r}, above sigma_max, {high!r}")
        self.transform = transform
        for level in (low, high):
            self.time(level)
        self.zeros = partial(torch.zeros, x.shape, dtype=x.dtype, device=x.device)
        self.draw = path_source(x, seed)
        self.times: list[float] = []
        self.steps: list[Tensor] = []  # the normalised increments between neighbours of times

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """The noise from one level to another; tensors are read."""
        return self.between(read_level("sigma", sigma), read_level("sigma_next", sigma_next))

    def between(self, sigma: float, sigma_next: float) -> Tensor:
        """The noise from one level to another, both numbers: nothing is read from a device."""
        start, end = self.time(sigma), self.time(sigma_next)
        self.learn(start)
        self.learn(end)
        low, high = sorted((start, end))
        first, last = bisect_left(self.times, low), bisect_left(self.times, high)
        noise = self.zeros()
        for i in range(first, last):
            share = math.sqrt((self.times[i + 1] - self.times[i]) / (high - low))
            noise.add_(self.steps[i], alpha=share if start < end else -share)
        return noise

    def time(self, sigma: float) -> float:
        """The path's time at a level; ValueError where it is not finite."""
        sigma = check_number("sigma", sigma, 0.0)
        if self.transform is None:
            return sigma
        time = float(self.transform(torch.tensor(sigma, dtype=torch.float64)))
        if not math.isfinite(time):
            raise ValueError(f"transform({sigma!r}) is {time!r}; a level's time must be finite")
        return time

    def learn(self, time: float) -> None:
        """Make the path known at one more time."""
        i = bisect_left(self.times, time)
        if time in self.times[i : i + 1]:
            return
        if 0 < i < len(self.times):
            start, end = self.times[i - 1 : i + 1]
            before = math.sqrt((time - start) / (end - start))
            after = math.sqrt((end - time) / (end - start))
            step, noise = self.steps[i - 1], self.draw()
            self.steps[i - 1 : i] = [
                (step * before).add_(noise, alpha=after),
                (step * after).sub_(noise, alpha=before),
            ]
        elif self.times:
            self.steps.insert(i, self.draw())
        self.times.insert(i, time)


def path_source(x: Tensor, seed: Any) -> Callable[[], Tensor]:
    """A source of standard normal draws shaped like x; from several seeds, `SeededNoise`'s."""
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, []).item())
    if not isinstance(seed, numbers.Integral):
        return SeededNoise(x, seed, stream=PATH)
    generator = torch.Generator(x.device).manual_seed(check_below("seed", seed, 2**63))
    return partial(torch.randn, x.shape, generator=generator, dtype=x.dtype, device=x.device)


def read_level(name: str, value: float | Tensor) -> float:
    """A level as a number; ValueError unless it is one, finite and ≥ 0."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be one level")
        value = value.item()
    return check_number(name, value, 0.0)


def check_below(name: str, value: Any, limit: int) -> int:
    """``value`` as an int; ValueError unless it is a whole number in [0, limit)."""
    if check_count(name, value, 0) >= limit:
        raise ValueError(f"{name} is {value!r}; it must be below {limit}")
    return int(value)


def read_seeds(seeds: Sequence[int] | Tensor, batch: int) -> Tensor:
    """The seeds as int64; TypeError or ValueError unless each sample has one in [0, 2^63)."""
    allowed = f"give one whole number in [0, 2^63) for each of the {batch} samples"
    try:
        words = torch.as_tensor(seeds)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"seeds is {seeds!r}; {allowed}") from error
    if words.is_floating_point() or words.is_complex() or words.dtype == torch.bool:
        raise TypeError(f"seeds are {words.dtype}; {allowed}")
    if words.shape != (batch,):
        raise ValueError(f"seeds has shape {tuple(words.shape)}; {allowed}")
    words = words.to(torch.int64)
    if batch and int(words.min()) < 0:
        raise ValueError(f"seeds holds {int(words.min())}; {allowed}")
    return words
