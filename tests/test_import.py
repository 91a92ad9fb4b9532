"""What importing kdpp costs, what works without k-diffusion, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kdpp

PACKAGE = Path(kdpp.__file__).parent

SAMPLE = """
import torch, kdpp
model = kdpp.TeacherGuidedDenoiser(lambda x, sigma: x / 2, lambda x, sigma: x / 3,
                                   teacher_cfg_scale=1)
for solver in kdpp.SOLVERS.values():
    if not (solver.cfg_pp or solver.noise == 'brownian' or solver.own_levels):
        x = solver.sample(model, torch.randn(2, 1, 4, 4), torch.tensor([2.0, 1.0, 0.0]))
        assert x.isfinite().all()
"""


def python(code, **environment):
    """Run code in a fresh interpreter; what it prints, or its error."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, env={"PATH": "", **environment}, timeout=120,
    )  # fmt: skip


def test_import_is_light():
    """`import kdpp` loads torch and tqdm and nothing else that is heavy."""
    heavy = ("k_diffusion", "clip", "torchvision", "skimage", "scipy", "sklearn", "matplotlib",
             "safetensors", "kdpp.digits")  # fmt: skip
    run = python(f"import sys, kdpp; print([m for m in {heavy!r} if m in sys.modules])")
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("body", ["raise AttributeError('torchvision::nms')", None])
def test_everything_else_works_without_k_diffusion(tmp_path, body):
    """k-diffusion broken, or absent: the samplers run, and one sentence says what to install."""
    if body is None:
        block = "import sys; sys.modules['k_diffusion'] = None\n"
    else:
        (tmp_path / "k_diffusion").mkdir()
        (tmp_path / "k_diffusion" / "__init__.py").write_text(body)
        block = ""
    run = python(block + SAMPLE, PYTHONPATH=str(tmp_path))
    assert run.returncode == 0, run.stderr
    code = f"{block}import kdpp\ntry: kdpp.kdiffusion.external\nexcept ImportError as e: print(e)"
    message = python(code, PYTHONPATH=str(tmp_path)).stdout
    assert "pip install" in message and "k-diffusion" in message and "setuptools<81" in message
    assert message.count("\n") == 1


def test_the_demo_says_what_it_needs(tmp_path):
    """Without k-diffusion `kdpp demo` ends with the sentence and status 1, and no traceback."""
    code = (
        "import sys; sys.modules['k_diffusion'] = None\n"
        f"from kdpp.cli import main; sys.exit(main(['demo', '--out', {str(tmp_path / 'o')!r}]))"
    )
    run = python(code)
    assert run.returncode == 1
    assert run.stderr.startswith("kdpp: ") and "pip install" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "o").exists()


def test_a_loaded_k_diffusion_is_the_one_used(monkeypatch):
    """A host's own k_diffusion, already in sys.modules, is what kdpp.kdiffusion hands out."""
    theirs = object()
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", theirs)
    assert kdpp.kdiffusion.sampling is theirs


def test_unknown_part_of_k_diffusion():
    """Only k-diffusion's documented parts are there; anything else is an AttributeError."""
    with pytest.raises(AttributeError, match="external"):
        kdpp.kdiffusion.nothing  # noqa: B018


def imports(module):
    """The kdpp modules and top-level packages that a module imports."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    kdpp_modules = {name.removeprefix("kdpp.") for name in names if name.startswith("kdpp.")}
    return kdpp_modules, {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("plan", set()),
        ("solver", {"plan"}),
        ("checks", {"plan"}),
        ("noise", {"checks", "kdiffusion"}),
        ("kinds", set()),
        ("denoisers", {"checks", "kinds"}),
        ("guidance", {"checks", "denoisers", "kinds", "noise", "plan"}),
        ("update", {"plan"}),
        ("stacking", {"denoisers", "kinds", "memory"}),
        (
            "guided_step",
            {"checks", "denoisers", "guidance", "kinds", "memory", "plan", "stacking", "update"},
        ),
        (
            "driver",
            {"checks", "denoisers", "guidance", "guided_step", "noise", "plan", "solver", "update"},
        ),
        ("capture", {"denoisers", "driver", "memory", "solver"}),
        ("solvers/euler", {"driver", "noise", "plan", "solver"}),
        ("solvers/singlestep", {"driver", "noise", "plan", "solver"}),
        ("solvers/multistep", {"driver", "noise", "plan", "solver"}),
        (
            "solvers/sde",
            {"driver", "noise", "plan", "solver", "solvers.multistep", "solvers.singlestep"},
        ),
        ("models", {"checks", "kinds"}),
        ("memory", {"kinds"}),
        ("editing", {"checks", "denoisers", "guidance", "kinds", "noise", "plan", "solver"}),
        ("rollouts", {"checks", "denoisers", "driver", "guidance", "kinds", "noise", "plan"}),
        ("kdiffusion", set()),
    ],
)
def test_data_flows_one_way(module, allowed):
    """sigmas → rows → denoisers → guidance → step: no module looks back, none knows a host."""
    ours, packages = imports(module)
    assert ours <= allowed
    assert not packages & {"k_diffusion", "modules", "comfy", "diffusers"}
    assert module not in ("plan", "solver") or "torch" not in packages


def imported_files(path, names):
    """The files of kdpp that a file imports, at its head or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # a name of the package may be a file in it
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [node.module, *inside] if names.isdisjoint(inside) else inside
        found |= names.intersection(modules)
    return found


def test_no_files_import_each_other_in_a_circle():
    """Taken away file by file that imports none of the others, none is left."""
    paths = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p
             for p in PACKAGE.rglob("*.py")}  # fmt: skip
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    left = {name: imported_files(path, set(paths)) for name, path in paths.items()}
    while ends := {name for name, needed in left.items() if needed.isdisjoint(left)}:
        left = {name: needed for name, needed in left.items() if name not in ends}
    assert not left


def test_what_needs_k_diffusion_says_so():
    """Without it an SDE solver asks for it by name, and runs with a noise sampler instead."""
    code = (
        "import sys; sys.modules['k_diffusion'] = None\n"
        "import torch, kdpp\n"
        "model = kdpp.TeacherGuidedDenoiser(lambda x, s: x / 2, lambda x, s: x, teacher_steps=0)\n"
        "x, sigmas = torch.ones(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.0])\n"
        "try: kdpp.sample_dpmpp_sde_tg(model, x, sigmas)\n"
        "except ImportError as error: print(error)\n"
        "noise = lambda sigma, sigma_next: torch.randn_like(x)\n"
        "print(kdpp.sample_dpmpp_sde_tg(model, x, sigmas, noise_sampler=noise).isfinite().all())\n"
    )
    run = python(code)
    message, result = run.stdout.strip().splitlines()
    assert "pip install 'k-diffusion" in message
    assert result == "tensor(True)", run.stderr
