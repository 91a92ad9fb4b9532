"""Pictures and masks that are given, videos that are made: between files and numbers.

`read_source` opens what a request names, before any model is loaded. Brought to a model's size it
is an `Edit`, from which sampling starts. `files_of` says which files a finished picture or video
becomes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdpp.checkpoints.requests import Request, png
from kdpp.editing import truncate

__all__ = [
    "FIRST",
    "Edit",
    "Source",
    "check_webp",
    "files_of",
    "frame_path",
    "read_source",
    "shown_frames",
]

ANEW = 128
"""A place of the latent is drawn anew if the mask is at least as bright as this anywhere in it."""
FIRST = "-000"
"""What the name of a video's first frame ends with. It is written last: with it all is there."""
QUALITY = 90
"""Of an animation's frames, WebP's; the PNG frames beside it lose nothing."""


# What is given ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The picture that a request starts from and its mask, as Pillow's images.

    Attributes:
        picture: RGB, turned as its EXIF says, on white where it was transparent.
        mask: L, of the picture's size: white is drawn anew, black is kept. None: all is drawn.
        strength: in (0, 1].
    """

    picture: Any
    mask: Any
    strength: float

    def size(self, width: int | None, height: int | None, unit: int) -> tuple[int, int]:
        """(height, width): what is asked, else the picture's own or in its proportions, rounded
        down to multiples of ``unit``."""
        own_width, own_height = self.picture.size
        scale = height / own_height if height else width / own_width if width else 1.0
        wide, high = (
            max(round(side * scale) // unit, 1) * unit for side in (own_width, own_height)
        )
        return height or high, width or wide

    def fitted(self, height: int, width: int, unit: int) -> Source:
        """Both in this size: resized and centre-cropped.

        A picture that is larger by less than ``unit`` keeps its pixels and is only cropped.
        """
        from PIL.Image import Resampling

        size = width, height
        mask = self.mask and _fitted(self.mask, size, unit, Resampling.BILINEAR)
        if mask:
            _check_mask(mask)
        picture = _fitted(self.picture, size, unit, Resampling.LANCZOS)
        return Source(picture, mask, self.strength)

    def pixels(self, channels: int = 3) -> Tensor:
        """uint8 (height, width, channels)."""
        return _numbers(self.picture if channels == 3 else self.picture.convert("L"))


def read_source(request: Request) -> Source | None:
    """The picture and the mask that the request names; None where it names none.

    Raises OSError for a file that cannot be read, ValueError for one that is not a picture of 8
    bits, a mask of other proportions or without a white place, settings of a picture without one.
    """
    if request.image is None:
        for name in ("mask", "strength"):
            if getattr(request, name) is not None:
                raise ValueError(f"--{name} goes with a picture: --image FILE")
        return None
    strength = request.strength
    if strength is None:
        strength = 0.75 if request.mask is None else 1.0
    truncate(torch.tensor([1.0, 0.0]), strength)  # refuses what no strength can be
    picture = _opened(request.image, "image")
    if request.mask is None:
        return Source(picture, None, strength)
    mask = _opened(request.mask, "mask").convert("L")
    _check_mask(mask)
    if mask.size != picture.size:
        (wide, high), (width, height) = mask.size, picture.size
        if abs(wide * height - width * high) > max(width, height):  # more than a pixel's worth
            raise ValueError(
                f"the mask has {wide} x {high} pixels and the picture {width} x {height}; they "
                "must have the same proportions"
            )
        mask = mask.resize(picture.size, _pillow().Resampling.BILINEAR)
    return Source(picture, mask, strength)


def _opened(path: str, role: str) -> Any:
    """A picture, RGB, turned as its EXIF says, on white where it is transparent."""
    pillow = _pillow()
    from PIL import ImageOps

    try:
        with pillow.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":
                raise ValueError(f"more than 8 bits a channel, {image.mode}; save it with 8")
            if not {"A", "a"} & set(image.getbands()) and "transparency" not in image.info:
                return image.convert("RGB")
            image = image.convert("RGBA")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path}; --{role} FILE names it") from error
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that kdpp can read: {error}") from error
    white = pillow.new("RGBA", image.size, "white")
    return pillow.alpha_composite(white, image).convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "kdpp[lab]"') from error
    return Image


def _check_mask(mask: Any) -> None:
    if mask.getextrema()[1] < ANEW:
        raise ValueError("the mask is black all over: make white what is to be drawn anew")


def _fitted(image: Any, size: tuple[int, int], unit: int, resample: Any) -> Any:
    from PIL import ImageOps

    wider, higher = image.width - size[0], image.height - size[1]
    if 0 <= wider < unit and 0 <= higher < unit:
        left, top = wider // 2, higher // 2
        return image.crop((left, top, left + size[0], top + size[1]))
    return ImageOps.fit(image, size, resample)


def _numbers(image: Any) -> Tensor:
    """uint8 (height, width, channels) of an image of Pillow."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1)


# What sampling starts from ------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A source as a model has it.

    Attributes:
        pixels: uint8 (height, width, channels).
        latents: its own, (1, channels, rows, columns).
        mask: uint8 (height, width, 1), 0 where the pixels are kept; None: nothing is kept.
        strength: in (0, 1], see `levels`.
    """

    pixels: Tensor
    latents: Tensor
    mask: Tensor | None
    strength: float

    @classmethod
    def of(cls, source: Source, pixels: Tensor, latents: Tensor) -> Edit:
        """Of a fitted source, with its pixels and latents."""
        mask = None if source.mask is None else _numbers(source.mask)
        return cls(pixels, latents, mask, source.strength)

    def levels(self, levels: Sequence[float]) -> tuple[float, ...]:
        """The last ``max(1, round(strength·steps))`` steps of the levels (`kdpp.truncate`)."""
        return tuple(levels[-len(truncate(torch.tensor(levels), self.strength)) :])

    @property
    def start(self) -> Tensor | None:
        """The latents that sampling starts from, with noise; None: from noise alone.

        So it is with a mask at strength 1, as in diffusers: what is drawn anew owes nothing to what
        was there.
        """
        return None if self.mask is not None and self.strength == 1.0 else self.latents

    @property
    def known(self) -> tuple[Tensor, Tensor] | None:
        """Latents and mask for `kdpp.inpaint`: a place is drawn anew if the mask touches it."""
        if self.mask is None:
            return None
        rows, columns = self.latents.shape[-2:]
        places = (self.mask >= ANEW).view(rows, len(self.mask) // rows, columns, -1)
        return self.latents, places.any(3).any(1).to(self.latents.device)

    def pasted(self, drawn: Tensor) -> Tensor:
        """Drawn pixels, (…, height, width, channels), with the picture's own where they are kept.

        Black keeps them to the bit, grey mixes.
        """
        if self.mask is None:
            return drawn
        share = self.mask.int()
        mixed = share * drawn.int() + (255 - share) * self.pixels.int()
        return ((mixed + 127) // 255).to(torch.uint8)


# What is written ----------------------------------------------------------------------------------


def check_webp() -> None:
    """ImportError where this Pillow writes no WebP."""
    _pillow()
    from PIL import features

    if not features.check("webp"):
        raise ImportError("videos need a Pillow with WebP: pip install --upgrade pillow")


def files_of(
    path: Path, pixels: Tensor, texts: Mapping[str, str], fps: float | None
) -> Iterator[tuple[Path, bytes]]:
    """The files of a picture, or of a video: names and contents; ``path`` comes last.

    Args:
        path: of the picture, or of the video's first frame, see `frame_path`.
        pixels: uint8 (height, width, 1 or 3), of a video (frames, height, width, 3).
        texts: what each PNG says.
        fps: of a video, frames a second of its animation, which is a WebP file beside the frames.
    """
    if pixels.ndim == 3:
        yield path, png(pixels.squeeze(-1), texts)
        return
    assert fps is not None
    stem = path.name.rpartition("-")[0]
    yield path.with_name(f"{stem}.webp"), animation(pixels, fps)
    for i in reversed(range(len(pixels))):
        yield frame_path(path, i), png(pixels[i], texts)


def frame_path(path: Path, frame: int) -> Path:
    """The file of a video's frame, ``NAME-007.png``, from that of any other."""
    return path.with_name(f"{path.name.rpartition('-')[0]}-{frame:03}.png")


def shown_frames(frames: int) -> list[int]:
    """Those that stand for a video: the first, the middle and the last."""
    return sorted({0, (frames - 1) // 2, frames - 1})


def animation(pixels: Tensor, fps: float) -> bytes:
    """An animated WebP file that repeats for ever, of uint8 (frames, height, width, 3)."""
    images = [_pillow().fromarray(frame.numpy()) for frame in pixels]
    ends = [round(1000 * i / fps) for i in range(len(images) + 1)]  # whole milliseconds
    file = io.BytesIO()
    images[0].save(
        file, "webp", save_all=True, append_images=images[1:], loop=0, quality=QUALITY,
        duration=[end - start for start, end in pairwise(ends)],
    )  # fmt: skip
    return file.getvalue()
