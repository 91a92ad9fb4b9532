"""One thread a worker, a reproducible hypothesis profile, what a page or a file enters."""

import os
import re
from pathlib import Path

import torch
from hypothesis import settings

from kdpp.lab.plugins import import_file

torch.set_num_threads(1)
settings.register_profile("kdpp", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("kdpp")

# docs/adding_a_method.md: what the file enters is tested with the rest.
if path := os.environ.get("KDPP_IMPORT"):
    import_file(path)

# docs/adding_a_solver.md: its code enters a solver, and the property tests then run over it.
if page := os.environ.get("KDPP_SOLVER_PAGE"):
    (code,) = re.findall(r"```python\n(.*?)```", Path(page).read_text(encoding="utf-8"), re.S)
    exec(compile(code, page, "exec"), {"__name__": "page"})
