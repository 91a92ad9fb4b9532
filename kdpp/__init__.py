"""kdpp: few-step diffusion models, made better while they sample.

`TeacherGuidedDenoiser` joins a student with the teacher that it was distilled from;
``sample_*_tg`` are k-diffusion's samplers with the teacher's help (Distillation++, Park et al.,
ICCV 2025). `SOLVERS` lists them.

`kdpp.api` names all that is public. It is read at the first use of a name, so that ``kdpp --help``
need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdpp._version import __version__ as __version__

# Now, since a file has the decorator's name: the first import of it would hide the decorator.
from kdpp.solver import solver as solver

if TYPE_CHECKING:
    from kdpp.api import *
    from kdpp.solvers import *


def __getattr__(name: str) -> Any:
    if name == "__all__" or not name.startswith("__"):
        api = import_module("kdpp.api")
        public = {one: getattr(api, one) for one in api.__all__}
        globals().update(public, __all__=["__version__", *api.__all__])
        if name in globals():  # public, or a file that the others have imported
            return globals()[name]
    raise AttributeError(f"module 'kdpp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
