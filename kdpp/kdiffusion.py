"""k-diffusion, reached when something of it is used: ``kdpp.kdiffusion.external.CompVisDenoiser``.

Importing it takes seconds and much else (clip, torchvision, scikit-image), so ``import kdpp`` does
not. One that a host has loaded already is the one used.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_PARTS = ("external", "layers", "sampling", "utils")


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"kdpp.kdiffusion has {', '.join(_PARTS)}; not {name!r}")
    try:
        with warnings.catch_warnings():
            # clip-anytorch's, about the very module that the pin on setuptools keeps in place.
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")
            return importlib.import_module(f"k_diffusion.{name}")
    except Exception as error:  # a broken dependency of it raises anything
        raise ImportError(
            "this needs a working k-diffusion: pip install 'k-diffusion==0.1.1.post1' "
            f"'setuptools<81' (importing it failed: {type(error).__name__}: {error})"
        ) from error
