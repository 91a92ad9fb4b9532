"""What differs between the web UIs, and which of them this is.

They share the panel, the hooks and ``p.sampler.func``. How a second checkpoint is loaded and let
go, how a loaded network is asked without ``CFGDenoiser``, and where a sampler's noise comes from,
each has in its own way: a `Convention`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from torch import Tensor

import kdpp
from kdpp.hosts.webui.settings import Settings
from kdpp.kinds import Denoiser

__all__ = ["Convention", "here"]


class Convention(ABC):
    """One host's ways. There is one object of it in a process; it holds the loaded teacher."""

    title: ClassVar[str]
    cannot: ClassVar[tuple[str, ...]] = ()
    """What this host, or kdpp in it, cannot do: sentences that the panel shows."""
    k_diffusion: ClassVar[str] = "k_diffusion"
    """The package whose ``sampling`` the host gives its per-image noise to."""

    # The panel ------------------------------------------------------------------------------------

    @abstractmethod
    def checkpoints(self) -> list[str]:
        """Names of the checkpoints that a teacher can be, each once."""

    @abstractmethod
    def refresh(self) -> None:
        """Look for checkpoints anew."""

    # Samplers -------------------------------------------------------------------------------------

    @abstractmethod
    def is_guidable(self, sampler: Any) -> bool:
        """Whether this sampler object calls ``func(model, x, sigmas, …)`` as k-diffusion's are."""

    def solver(self, p: Any) -> tuple[kdpp.Solver, Mapping[str, Any]] | None:
        """kdpp's solver of the host's sampler ``p.sampler``, and the options that make it compute
        the same; None where there is none."""
        name = getattr(p.sampler.func, "__name__", "")
        found = kdpp.SOLVERS.get(name.removeprefix("sample_"))
        if found is None or not name.startswith("sample_") or not self.is_guidable(p.sampler):
            return None
        return found, {}

    @abstractmethod
    def stock(self) -> set[str]:
        """Names of the functions behind the host's own samplers, such as ``sample_euler``."""

    @abstractmethod
    def register(self, samplers: Mapping[str, Callable[..., Tensor]]) -> None:
        """Add samplers, by their name in the host; those of these names before are replaced.

        A function has ``solver``, its `kdpp.Solver`.
        """

    @abstractmethod
    def unregister(self) -> None:
        """Take them out again."""

    @abstractmethod
    def knows(self, name: str) -> bool:
        """Whether the host finds a sampler by this name, as a request for a picture would."""

    # A run ----------------------------------------------------------------------------------------

    @abstractmethod
    def student(self, model: Any, needs_uncond: bool) -> kdpp.HostModel:
        """What the host hands to a sampler (its CFGDenoiser), as kdpp's student.

        With ``needs_uncond`` (CFG++) it also gives the unconditional estimate of x0, inside the
        mask; ValueError where the host would not compute it.
        """

    @abstractmethod
    def teacher(self, p: Any, settings: Settings) -> Callable[[Any], Denoiser]:
        """Load what is not loaded, work out the teacher's conditions for this pass, and return
        ``model -> teacher``, which gets the host's CFGDenoiser and returns kdpp's teacher.

        The teacher does its own CFG (a `kdpp.HostModel`, in `kdpp.swapped` where weights are
        shared), is asked without CFGDenoiser, stays inside the mask, and is interrupted as the
        student is. It has the LoRAs of ``settings.teacher_lora`` and none of the prompt's.

        Raises ValueError, before anything is loaded where that can be told, for a teacher that
        does not fit the student. After any error the host is as it was, and nothing is held.
        """

    @abstractmethod
    def release(self) -> None:
        """Let go of the teacher and its memory; nothing where none is held."""

    def seeds(self, model: Any) -> list[int]:
        """The seed of each picture in the batch."""
        return [int(seed) % 2**63 for seed in model.p.seeds]


FOUND: list[Convention] = []


def here() -> Convention:
    """The convention of the host that this process is; always the same object."""
    if not FOUND:
        module, name = CONVENTIONS[which()]
        FOUND.append(getattr(import_module(f"kdpp.hosts.webui.{module}"), name)())
        kdpp.kdiffusion.use(FOUND[0].k_diffusion)
    return FOUND[0]


CONVENTIONS = {
    "A1111": ("a1111", "A1111"),
    "Forge": ("forge", "Forge"),
    "Forge Neo": ("neo", "Neo"),
}
"""Of each host the module and the class."""


def which() -> str:
    """The host's name; ImportError for one that kdpp does not know."""
    if find_spec("modules_forge") is None:
        return "A1111"
    if find_spec("backend") is not None:
        version = import_module("modules_forge.forge_version").version
        return "Forge Neo" if version == "neo" else "Forge"
    raise ImportError(
        f"kdpp's panel does not know this web UI; it runs in {', '.join(CONVENTIONS)}"
    )
