"""k-diffusion, reached when something of it is used: ``kdpp.kdiffusion.external.CompVisDenoiser``.

One that a host has loaded already is the one used, else one that is installed. Where there is none,
or it does not import, kdpp's own denoisers and schedules take its place (`kdpp.standin`), and
what only k-diffusion has, such as its samplers, raises ImportError. ``kdpp.kdiffusion.external``,
printed, says which it is.

Importing k-diffusion takes seconds and much else (clip, torchvision, scikit-image), so
``import kdpp`` does not.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from typing import Any

import kdpp.standin as standin

PARTS = {
    "external": (
        "CompVisDenoiser",
        "CompVisVDenoiser",
        "DiscreteEpsDDPMDenoiser",
        "DiscreteSchedule",
        "DiscreteVDDPMDenoiser",
        "OpenAIDenoiser",
        "VDenoiser",
    ),
    "layers": ("Denoiser",),
    "sampling": (
        "append_zero",
        "get_sigmas_exponential",
        "get_sigmas_karras",
        "get_sigmas_polyexponential",
        "get_sigmas_vp",
    ),
    "utils": ("append_dims",),
}
"""The parts of k-diffusion, and what kdpp has of each."""


class StandIn:
    """kdpp's own in place of a part of k-diffusion; what it has not raises ImportError."""

    def __init__(self, part: str, reason: str) -> None:
        self._part, self._reason = part, reason
        vars(self).update({name: getattr(standin, name) for name in PARTS[part]})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself asks an object for
            raise AttributeError(name)
        raise ImportError(
            f"{name} needs k-diffusion itself; kdpp.kdiffusion.{self._part} has only "
            f"{', '.join(PARTS[self._part])} without it: pip install 'k-diffusion==0.1.1.post1' "
            "'setuptools<81', which on Python 3.13 and later needs a C compiler "
            f"(importing it failed: {self._reason})"
        )

    def __repr__(self) -> str:
        return f"<kdpp's own in place of k_diffusion.{self._part}: {self._reason}>"


@functools.cache
def say_once(message: str) -> None:
    """A warning, whatever the warnings' filters and registries forget."""
    warnings.warn(message, stacklevel=3)


def __getattr__(name: str) -> Any:
    if name not in PARTS:
        raise AttributeError(f"kdpp.kdiffusion has {', '.join(PARTS)}; not {name!r}")
    before = set(sys.modules)
    try:
        with warnings.catch_warnings():
            # clip-anytorch's, about the very module that the pin on setuptools keeps in place.
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")
            return importlib.import_module(f"k_diffusion.{name}")
    except Exception as error:  # a broken dependency of it raises anything
        # Half of it would be taken for the whole by whoever asks next.
        for module in sys.modules.keys() - before:
            if module.partition(".")[0] == "k_diffusion":
                del sys.modules[module]
        reason = f"{type(error).__name__}: {error}"
        missing = getattr(error, "name", None) or ""  # of a module that is not found
        if missing.partition(".")[0] != "k_diffusion":
            say_once(
                f"k-diffusion does not import ({reason}); kdpp's own denoisers and schedules take "
                "its place"
            )
        return StandIn(name, reason)
