"""``kdpp install`` and ``kdpp uninstall``: kdpp as an extension in a host's own folder.

A copy of the package goes there, so that no package of the host changes. Needs no torch: any Python
can install from a checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from kdpp._version import __version__
from kdpp.lab.console import say

__all__ = ["HOSTS", "add_arguments", "install", "run", "uninstall"]

PACKAGE = Path(__file__).parents[1]
FOLDER = "kdpp"
RECORD = "installed.json"
"""In the extension's folder: the digest of every file that was put there."""


class Host(NamedTuple):
    """A program that kdpp can be an extension of."""

    title: str
    extensions: str
    """The folder in which it looks for extensions."""
    signs: tuple[tuple[str, ...], ...]
    """What else lies in its folder: all of one of these."""
    pack: Path
    """What goes into the extension's folder beside the package."""
    then: str
    """What the user does next."""

    def is_at(self, path: Path) -> bool:
        """Whether it lies in this folder."""
        found = (all((path / one).exists() for one in sign) for sign in self.signs)
        return (path / self.extensions).is_dir() and any(found)

    def wanted(self) -> str:
        """What its folder holds, in words."""
        signs = " or ".join(" and ".join(sign) for sign in self.signs)
        return f"the folder {self.extensions}, with {signs} beside it"


HOSTS = {
    "comfyui": Host(
        title="ComfyUI",
        extensions="custom_nodes",
        # Its checkout; or the folder of its models and outputs, where that is another one.
        signs=(("comfy/samplers.py",), ("models", "user")),
        pack=PACKAGE / "hosts" / "comfyui" / "pack",
        then="start ComfyUI again; example workflows are under Browse Templates, kdpp",
    ),
    "webui": Host(
        title="web UI (A1111, Forge, Forge Neo)",
        extensions="extensions",
        # Its checkout; or the folder of its models and settings (--data-dir).
        signs=(("webui.py", "modules/sd_samplers.py"), ("models/Stable-diffusion", "config.json")),
        pack=PACKAGE / "hosts" / "webui" / "pack",
        then="start it again; the panel is Teacher (kdpp), below the settings of a picture",
    ),
}


def install(name: str, path: Path) -> Path:
    """Put kdpp into the host at ``path``, in the place of an older one; the folder it is in.

    Raises FileNotFoundError where there is no such host, FileExistsError where the folder is there
    and holds what kdpp did not write. After any error the host is as it was.
    """
    folder = folder_of(name, path)
    with scratch_beside(folder) as scratch:
        new, old = scratch / "new", scratch / "old"
        write(new, HOSTS[name].pack)
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    return folder


def uninstall(name: str, path: Path) -> Path:
    """Take kdpp out of the host at ``path``; the folder that it was in. Raises as `install`."""
    folder = folder_of(name, path)
    if not folder.exists():
        raise FileNotFoundError(f"kdpp is not installed there: there is no {folder}")
    with scratch_beside(folder) as scratch:
        folder.rename(scratch / "old")
    return folder


def folder_of(name: str, path: Path) -> Path:
    """The extension's folder in the host at ``path``: not there, or as `install` wrote it."""
    host = HOSTS[name]
    if not host.is_at(path):
        inside = sorted(one for one in path.glob("*") if host.is_at(one))
        hint = f"; {inside[0]} is one" if inside else ""
        raise FileNotFoundError(f"{path} is not a {host.title}: looked for {host.wanted()}{hint}")
    folder = path / host.extensions / FOLDER
    if folder.is_symlink() or (folder.exists() and not (folder / RECORD).is_file()):
        raise FileExistsError(
            f"{folder} was not written by kdpp install; move it away, and give the command again"
        )
    changed = not_as_written(folder) if folder.exists() else []
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise FileExistsError(
            f"{folder} holds files that are new or changed since kdpp was installed: "
            f"{', '.join(changed[:3])}{more}; move them away, and give the command again"
        )
    return folder


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder on the same disk, removed afterwards, whose name keeps the host from loading it."""
    where = folder.parent
    with TemporaryDirectory(prefix="kdpp-", suffix=".disabled", dir=where) as scratch:
        yield Path(scratch)


def write(folder: Path, pack: Path) -> None:
    """The extension: the pack's files, a copy of the package, and the record of both."""
    no_bytecode = shutil.ignore_patterns("__pycache__")
    shutil.copytree(pack, folder, ignore=no_bytecode)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=no_bytecode)
    for metadata in folder.glob("pyproject.toml"):
        text = metadata.read_text(encoding="utf-8")
        text = re.sub('version = "0".*', f'version = "{__version__}"', text)
        metadata.write_text(text, encoding="utf-8")
    record = {"version": __version__, "files": digests(folder)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def digests(folder: Path) -> dict[str, str]:
    """Of each file but the record and Python's bytecode, by its path in the folder."""
    return {
        one.relative_to(folder).as_posix(): digest(one)
        for one in sorted(folder.rglob("*"))
        if (one.is_file() or one.is_symlink())
        and one != folder / RECORD
        and one.parent.name != "__pycache__"
    }


def digest(file: Path) -> str:
    """Of a file's bytes; a link is never as it was written, since none is."""
    return "link" if file.is_symlink() else hashlib.sha256(file.read_bytes()).hexdigest()


def not_as_written(folder: Path) -> list[str]:
    """The files that are new or changed since."""
    written = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    return [name for name, found in digests(folder).items() if written.get(name) != found]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both commands."""
    known = ", ".join(f"{name} ({host.title})" for name, host in HOSTS.items())
    parser.add_argument("host", choices=HOSTS, metavar="HOST", help=known)
    parser.add_argument("path", type=Path, metavar="PATH", help="the host's own folder")


def run(settings: argparse.Namespace) -> None:
    """``kdpp install`` or ``kdpp uninstall``."""
    host = HOSTS[settings.host]
    if settings.command == "install":
        say(f"kdpp {__version__} is in {install(settings.host, settings.path)}; {host.then}")
    else:
        say(f"{uninstall(settings.host, settings.path)} is gone; start {host.title} again")
