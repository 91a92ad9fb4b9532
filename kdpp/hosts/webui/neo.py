"""Forge Neo's convention, as read in and run with 2.26."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from backend.args import dynamic_args
from backend.loader import forge_loader
from modules_forge import forge_alter_samplers

from kdpp.hosts.webui.forge import Forge, conditions_with_clip_skip
from kdpp.hosts.webui.settings import Settings
from kdpp.kinds import Denoiser

__all__ = ["Neo"]


class Neo(Forge):
    """As Forge; what its text encoders and its loader leave behind lies elsewhere."""

    title = "Forge Neo"
    cannot = (
        "ControlNet and others that patch the network act on the student alone.",
        "Without a guided form: DDIM and PLMS (timesteps), Restart, UniPC (another formula than "
        "kdpp's), Kohaku LoNyu Yog, DPM++ 2s a RF; for flow models all but Euler.",
    )
    other_formulas: ClassVar[Mapping[str, str]] = {
        "sample_unipc": "",
        "sample_dpmpp_2m_cfg_pp": "dpmpp_2m_cfg_pp_mixed",
    }

    def over_tau(self, name: str, predictor: Any) -> tuple[str, Mapping[str, Any]] | None:
        return ("euler", {}) if name == "sample_euler" else None

    def stock(self) -> set[str]:
        keys = {key for one in forge_alter_samplers.samplers_data_alter for key in one.aliases}
        alter = {f"sample_{key}" for key in keys}
        return super().stock() | (alter - self.other_formulas.keys())

    def teacher(self, p: Any, settings: Settings) -> Callable[[Any], Denoiser]:
        if dynamic_args.nunchaku:
            raise ValueError(
                "kdpp: a Nunchaku model has its LoRAs in the network itself, so that the teacher "
                "would have them, too; switch the teacher off"
            )
        return super().teacher(p, settings)

    def conditions(self, p: Any, engine: Any, negative: str) -> tuple[Any, Any]:
        with kept("last_extra_generation_params"):
            dynamic_args.last_extra_generation_params = {}
            return conditions_with_clip_skip(p, engine, negative)

    def engine_of(self, filename: str, modules: list[str]) -> Any:
        # The loader notes what it has loaded, as if it were the active one.
        with kept(*OF_THE_ACTIVE):
            dynamic_args.loading_refiner = True  # leaves what the run has prepared
            return forge_loader(filename, additional_state_dicts=modules)


OF_THE_ACTIVE = ("kontext", "edit", "nunchaku", "klein", "wan", "pid", "krea2", "ops",
                 "loading_refiner")  # fmt: skip
"""What the host keeps of the model that it loaded last."""


@contextmanager
def kept(*names: str) -> Iterator[None]:
    """Put these back afterwards."""
    values = {name: getattr(dynamic_args, name) for name in names}
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(dynamic_args, name, value)
