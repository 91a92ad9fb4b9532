"""kdpp's panel for web UIs, from the copy of kdpp in this extension's folder.

A process can hold one kdpp. It is this copy, also where pip has installed another; or the one that
another extension has imported before, if that is of the same version.
"""

import runpy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

OWN = Path(__file__).parents[1] / "kdpp"
VERSION = runpy.run_path(str(OWN / "_version.py"))["__version__"]


def load_own() -> None:
    """Import the copy as ``kdpp``, with no change of ``sys.path``."""
    spec = spec_from_file_location("kdpp", OWN / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["kdpp"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["kdpp"])


if "kdpp" not in sys.modules:
    load_own()
elif sys.modules["kdpp"].__version__ != VERSION:
    other = sys.modules["kdpp"]
    raise ImportError(
        f"another extension has imported kdpp {other.__version__} from {other.__file__}, and this "
        f"panel needs kdpp {VERSION}; bring both to one version, or start the web UI again after "
        "an update"
    )

from kdpp.hosts.webui import panel  # noqa: E402

panel.begin()


class Script(panel.TeacherScript):
    """What the host finds here."""
