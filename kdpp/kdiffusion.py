"""k-diffusion, reached when something of it is used: ``kdpp.kdiffusion.external.CompVisDenoiser``.

One that a host has loaded already is the one used, else one that is installed, and before both the
package that a host has named (`use`). Where there is none, or it does not import, kdpp's own
denoisers and schedules take its place (`kdpp.standin`), and what only k-diffusion has, such as its
samplers, raises ImportError. ``kdpp.kdiffusion.external``, printed, says which it is.

A folder called k_diffusion without an ``__init__.py`` is a part of some host's, which Python finds
because a folder above it is on ``sys.path`` (inside ComfyUI). It is not imported.

Importing k-diffusion takes seconds and much else (clip, torchvision, scikit-image), so
``import kdpp`` does not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
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


K_DIFFUSION = "k_diffusion"
_named: list[str | None] = [K_DIFFUSION]


def use(package: str | None = K_DIFFUSION) -> None:
    """Name the package in which this host has its k-diffusion.

    kdpp takes its default noise, looked up whenever a sampler runs, from ``PACKAGE.sampling``, and
    ``kdpp.kdiffusion.sampling`` and the other parts are that package's::

        kdpp.kdiffusion.use("k_diff.k_diffusion")  # the one that reForge hands per-image seeds to

    Args:
        package: its full name, which is imported here. None: none, so kdpp's own in its place,
            with `kdpp.BrownianNoise` for SDE samplers. Left out: k_diffusion, as it was.

    Raises:
        ImportError: there is no such package, or it does not import.
        ValueError: its ``sampling`` has no ``default_noise_sampler``.
    """
    if package not in (None, K_DIFFUSION):
        sampling = importlib.import_module(f"{package}.sampling")
        if not hasattr(sampling, "default_noise_sampler"):
            raise ValueError(
                f"{package}.sampling has no default_noise_sampler, as k-diffusion's has; name the "
                "package in which the host has its k-diffusion, or None"
            )
    _named[0] = package


def package() -> str | None:
    """The name of the package that is used."""
    return _named[0]


def loaded(part: str) -> Any:
    """A part of k-diffusion if the host has loaded it, else None."""
    return None if package() is None else sys.modules.get(f"{package()}.{part}")


def __getattr__(name: str) -> Any:
    if name not in PARTS:
        raise AttributeError(f"kdpp.kdiffusion has {', '.join(PARTS)}; not {name!r}")
    chosen = package()
    if chosen is None:
        return StandIn(name, "kdpp.kdiffusion.use(None)")
    before = set(sys.modules)
    try:
        if chosen == K_DIFFUSION and loaded(name) is None:
            _refuse_namespace(chosen)
        with warnings.catch_warnings():
            # clip-anytorch's, about the very module that the pin on setuptools keeps in place.
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")
            return importlib.import_module(f"{chosen}.{name}")
    except Exception as error:  # a broken dependency of it raises anything
        # Half of it would be taken for the whole by whoever asks next.
        for module in sys.modules.keys() - before:
            if module == chosen or module.startswith(f"{chosen}."):
                del sys.modules[module]
        reason = f"{type(error).__name__}: {error}"
        missing = getattr(error, "name", None) or ""  # of a module that is not found
        if missing != chosen and not missing.startswith(f"{chosen}."):
            say_once(
                f"k-diffusion does not import ({reason}); kdpp's own denoisers and schedules take "
                "its place"
            )
        return StandIn(name, reason)


def _refuse_namespace(package: str) -> None:
    """ModuleNotFoundError where Python finds a folder of that name without an ``__init__.py``."""
    found = importlib.util.find_spec(package)
    if found is not None and found.origin is None:
        raise ModuleNotFoundError(
            f"the {package} on sys.path is a part of another package", name=package
        )
