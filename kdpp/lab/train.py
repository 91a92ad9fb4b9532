"""``kdpp train METHOD --out DIR``: the command."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdpp.lab.arithmetic import Arithmetic
from kdpp.lab.console import say
from kdpp.lab.settings import fill, read_toml, read_value, setting, to_flag
from kdpp.solver import unknown

__all__ = ["add_arguments", "run"]

LARGEST = 16 * 16
"""Numbers in an image up to which the residual MLP does."""


@dataclasses.dataclass(frozen=True)
class Common:
    """What every run is told, beside its method's settings."""

    seed: int = setting(0, "of everything random", low=0, high=2**32 - 1)
    data: str = setting(
        "digits", "digits, a folder of images, idx:FOLDER, or a .npy or .safetensors file"
    )
    teacher: str = setting("digits:teacher", "a checkpoint, a run's folder, or a shipped model")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; the settings of the METHOD come after it."""
    parser.description = (
        "Train a teacher or a student. `kdpp train --list` names the methods, "
        "`kdpp train METHOD --help` the settings of one."
    )
    _add_common(parser)
    parser.add_argument("--list", action="store_true", help="name the methods, and no more")
    parser.add_argument("method", nargs="?", metavar="METHOD")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="--NAME VALUE", help="the method's settings"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train, or list the methods.

    Raises:
        ImportError: a package that the method or the data need is missing.
        OSError: a file cannot be read or written.
        ValueError: an unknown method, setting or value; data or teacher that do not fit; a folder
            with another run.
        FloatingPointError: a loss or a weight is not finite.
        KeyboardInterrupt: it was stopped; the message says from where it will go on.
    """
    from kdpp.lab.methods import load_methods

    _import_files(arguments)
    methods = load_methods()
    if arguments.list:
        say(listing(methods))
        return
    if arguments.method is None:
        raise ValueError("which METHOD? `kdpp train --list` names them")
    if arguments.method not in methods:
        raise ValueError(unknown("method", arguments.method, methods))
    chosen = methods[arguments.method]
    parser = _method_parser(chosen)
    found, others = parser.parse_known_args(arguments.rest, arguments)
    if others:
        names = (
            *_names(Common),
            *_names(Arithmetic),
            "out",
            "config",
            "save_every",
            "device",
            *_names(chosen.Settings),
        )
        flags = [f"--{name.replace('_', '-')}" for name in names]
        raise ValueError(unknown("argument", others[0], flags))
    if found.out is None:
        raise ValueError("train into which folder? --out DIR")
    _train(chosen, found)


def _import_files(arguments: argparse.Namespace) -> None:
    """Import the files that ``--import`` names among the method's settings."""
    from kdpp.lab.plugins import import_file

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="files", action="append", default=[], metavar="FILE.py")
    found, arguments.rest = parser.parse_known_args(arguments.rest)
    for path in found.files:
        import_file(path)


def listing(methods: Mapping[str, Any]) -> str:
    """The methods as text: name, summary, source."""
    width = max(map(len, methods))
    return "\n".join(
        f"{m.name:<{width}}  {m.summary}\n{'':<{width}}  {m.source}" for m in methods.values()
    )


def _train(chosen: Any, arguments: argparse.Namespace) -> None:
    from kdpp.lab import processes
    from kdpp.lab.data import load_data
    from kdpp.lab.methods import Training
    from kdpp.lab.models import FILE, load_model
    from kdpp.lab.trainer import train

    common, arithmetic, settings = _settings(chosen, arguments)
    device = processes.device(arguments.device)
    with processes.single_thread(), processes.joined(device):
        name = common.teacher if chosen.needs_teacher else None
        teacher = load_model(name, device) if name else None
        data = load_data(common.data).to(device)
        if processes.rank() == 0 and (hint := _hint(settings, data.shape, name)):
            print(f"kdpp: {hint}", file=sys.stderr)
        training = Training(chosen, settings, data, teacher, name, common.seed, arithmetic)
        trained = train(training, arguments.out, save_every=arguments.save_every)
        if processes.rank() == 0:
            say(f"{'wrote' if trained else 'finished before:'} {arguments.out / FILE}")


def _hint(settings: Any, shape: tuple[int, ...], teacher: str | None) -> str:
    """What to take for images that the residual MLP is too simple for; empty where it does."""
    from kdpp.lab.networks import UNET

    network = getattr(settings, "network", None) or {"kind": "unet"}
    if network.get("kind", "resmlp") != "resmlp" or math.prod(shape) <= LARGEST or len(shape) != 3:
        return ""
    size = " x ".join(map(str, shape))
    instead = "none" if teacher else f"'{to_flag(UNET)}'"
    which = "the teacher's network, from its weights" if teacher else "a U-Net (kdpp[diffusers])"
    return (
        f"the network is a residual MLP, made for 8 x 8 digits; of images {size} it will give "
        f"little but noise. Take {which}: --network {instead}"
    )


def _settings(chosen: Any, arguments: argparse.Namespace) -> tuple[Common, Arithmetic, Any]:
    """What the file says, and what the flags say, whose word is the last."""
    given: dict[str, Any] = {}
    if arguments.config is not None:
        given = read_toml(arguments.config)
        if given.pop("method", chosen.name) != chosen.name:
            raise ValueError(f"{arguments.config} is for another method than {chosen.name}")
    for kind in (Common, Arithmetic, chosen.Settings):
        for name in _names(kind):
            text = getattr(arguments, name, None)
            if text is not None:
                given[name] = read_value(kind, name, text)
    common, arithmetic = (
        {name: given.pop(name) for name in _names(kind) if name in given}
        for kind in (Common, Arithmetic)
    )
    if "teacher" in common and not chosen.needs_teacher:
        raise ValueError(f"{chosen.name} has no teacher; leave --teacher out")
    own = fill(chosen.Settings, given, f"of {chosen.name}")
    return fill(Common, common), fill(Arithmetic, arithmetic), own


def _method_parser(chosen: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"kdpp train {chosen.name}",
        description=f"{chosen.summary} ({chosen.source})",
        allow_abbrev=False,
    )
    _add_common(parser)
    _add_settings(parser.add_argument_group("settings of the method"), chosen.Settings)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder of the run; a killed one goes on there")
    parser.add_argument("--config", type=Path, help="TOML file of settings; flags override it")
    _add_settings(parser, Common)
    _add_settings(parser, Arithmetic)
    parser.add_argument(
        "--save-every", type=int, default=200, help="iterations between saved states (default: 200)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def _add_settings(group: Any, kind: type) -> None:
    for field in dataclasses.fields(kind):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        about = f"{field.metadata['help']} (default: {to_flag(default)})".replace("%", "%%")
        flags = {f"--{field.name.replace('_', '-')}", f"--{field.name}"}
        group.add_argument(*sorted(flags), dest=field.name, metavar="VALUE", help=about)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]
