"""``kdpp generate``, as tests run it, and the picture files that they give to it and read."""

import torch
from PIL import Image

from kdpp.cli import main


def run(out, *words):
    """The command's exit status."""
    return main(["generate", *map(str, words), "--out", str(out)])


def numbers(image):
    """uint8 (height, width, channels) of an image of Pillow."""
    values = torch.tensor(list(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, -1)


def pixels(path):
    """uint8 (height, width, channels) of a file."""
    with Image.open(path) as image:
        return numbers(image)


def write(path, width, height, seed=0, channels=3):
    """A picture of random pixels, and its file."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 256, (height, width, channels), generator=generator).to(torch.uint8)
    Image.fromarray(made.squeeze(-1).numpy()).save(path)
    return made


def right_half(path, width, height, grey=0):
    """A mask: white on the right, black on the left; in between a column of this grey."""
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[:, width // 2 :] = 255
    mask[:, width // 2] = grey
    Image.fromarray(mask.numpy()).save(path)
