"""What importing kdpp costs, what works without k-diffusion, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kdpp
from kdpp.cli import COMMANDS
from kdpp.lab.settings import read_toml

PACKAGE = Path(kdpp.__file__).parent

SAMPLE = """
import torch, kdpp
model = kdpp.TeacherGuidedDenoiser(lambda x, sigma: x / 2, lambda x, sigma: x / 3,
                                   teacher_cfg_scale=1)
for solver in kdpp.SOLVERS.values():
    if not (solver.cfg_pp or solver.own_levels):
        x = solver.sample(model, torch.randn(2, 1, 4, 4), torch.tensor([2.0, 1.0, 0.0]))
        assert x.isfinite().all()
"""


def python(code, *flags, **environment):
    """Run code in a fresh interpreter; what it prints, or its error."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *flags, "-c", code],
        capture_output=True, text=True, env={"PATH": "", **environment}, timeout=120,
    )  # fmt: skip


ABSENT = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name == "k_diffusion":
            raise ModuleNotFoundError("No module named 'k_diffusion'", name=name)
sys.meta_path.insert(0, Absent)
"""
BROKEN = "raise AttributeError('torchvision::nms')"


@pytest.fixture(params=["absent", "broken"])
def state(request):
    """How k-diffusion is missed: there is none, or it does not import."""
    return request.param


@pytest.fixture
def without_k_diffusion(state, tmp_path):
    """Runs code in a fresh interpreter that misses k-diffusion."""
    if state == "broken":
        (tmp_path / "k_diffusion").mkdir()
        (tmp_path / "k_diffusion" / "__init__.py").write_text("from . import sampling, clip\n")
        (tmp_path / "k_diffusion" / "sampling.py").write_text("BrownianTreeNoiseSampler = None\n")
        (tmp_path / "k_diffusion" / "clip.py").write_text(BROKEN)
        return lambda code, *flags: python(code, *flags, PYTHONPATH=str(tmp_path))
    return lambda code, *flags: python(ABSENT + code, *flags)


def test_import_is_light():
    """What `kdpp` makes public loads torch and tqdm and nothing else that is heavy."""
    heavy = ("k_diffusion", "clip", "torchvision", "skimage", "scipy", "sklearn", "matplotlib",
             "safetensors", "kdpp.digits")  # fmt: skip
    run = python(
        f"import sys, kdpp; kdpp.sample; print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize(
    "given",
    [
        ["--version"],
        ["--help"],
        *([command, "--help"] for command in COMMANDS),
    ],
)
def test_the_command_answers_before_torch_is_loaded(given):
    """Torch alone takes more than a second to import."""
    run = python(
        "import sys\nfrom kdpp.cli import main\n"
        f"try: main({given})\n"
        "finally: print([m for m in ('torch', 'numpy') if m in sys.modules], file=sys.stderr)\n"
    )
    assert (run.returncode, run.stderr.strip()) == (0, "[]")
    assert "kdpp" in run.stdout


@pytest.mark.parametrize(
    "first", ["kdpp", "kdpp.solver", "kdpp.noise", "kdpp.capturing", "kdpp.lab.settings"]
)
def test_public_names_are_the_same_whichever_file_is_imported_first(first):
    """Of the package at its first use, star import included; another name is an AttributeError."""
    run = python(
        f"import {first}, kdpp\n"
        "assert not hasattr(kdpp, 'nothing') and not hasattr(kdpp, '__nothing__')\n"
        "assert callable(kdpp.solver) and callable(kdpp.capture) and kdpp.SOLVERS['euler']\n"
        "from kdpp import *\n"
        "assert len(kdpp.__all__) == len(set(kdpp.__all__)) and '__version__' in kdpp.__all__\n"
        "assert all(globals()[name] is getattr(kdpp, name) for name in kdpp.__all__)\n"
        "assert set(kdpp.__all__) <= set(dir(kdpp))\n"
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_every_sampler_works_without_k_diffusion(without_k_diffusion):
    run = without_k_diffusion(SAMPLE)
    assert run.returncode == 0, run.stderr


def test_kdpps_own_stands_in_for_k_diffusion(without_k_diffusion, state):
    """Printed, it says that it does and why; a name that it has not is told what to install.

    A broken k-diffusion is named once, and none of it is left: the half that does import would be
    taken for the whole the next time, with other noise from run to run.
    """
    run = without_k_diffusion(
        "import sys, kdpp\n"
        "for part in 2 * ['external', 'layers', 'sampling', 'utils']:\n"
        "    own = getattr(kdpp.kdiffusion, part)\n"
        "    assert repr(own).startswith(f\"<kdpp's own in place of k_diffusion.{part}: \"), own\n"
        "    for name in kdpp.kdiffusion.PARTS[part]:\n"
        "        assert getattr(own, name).__module__ == 'kdpp.standin'\n"
        "    assert not hasattr(own, '__path__')\n"
        "assert not [name for name in sys.modules if name.startswith('k_diffusion.')]\n"
        "try: kdpp.kdiffusion.sampling.sample_euler\n"
        "except ImportError as error: print(error)\n",
        "-W", "always",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("sample_euler needs k-diffusion itself")
    assert "pip install 'k-diffusion==0.1.1.post1' 'setuptools<81'" in run.stdout
    assert run.stdout.count("\n") == 1
    message = "UserWarning: k-diffusion does not import (AttributeError: torchvision::nms)"
    assert run.stderr.count("UserWarning") == run.stderr.count(message) == (state == "broken")


def test_the_demo_samples_without_k_diffusion():
    """The images of all ways but the longest, as they are with it (where it is installed)."""
    code = (
        "from kdpp.digits.demo import *\nfrom kdpp.digits.ways import build_ways\n"
        "torch.set_num_threads(1)\n"
        "*ways, _ = build_ways(Counted(load_student()), Counted(load_teacher())).values()\n"
        "for way in ways:\n"
        "    print(way.name, way.run(0, 3)[0].double().sum().item().hex())\n"
    )
    runs = [python(first + code) for first in ("", ABSENT)]
    assert runs[0].stdout.count("\n") == 10, runs[0].stderr
    assert runs[1].stdout == runs[0].stdout, runs[1].stderr


def test_sde_samplers_without_the_tree_take_brownian_noise_and_say_so_once(without_k_diffusion):
    """The noise is that of BrownianNoise over the same levels; one warning for all the runs."""
    run = without_k_diffusion(
        "import torch, kdpp\n"
        "model = kdpp.TeacherGuidedDenoiser(lambda x, s: x / 2, lambda x, s: x, teacher_steps=0)\n"
        "x, sigmas = torch.ones(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.5, 0.0])\n"
        "for sample in (kdpp.sample_dpmpp_sde_tg, kdpp.sample_dpmpp_3m_sde_tg):\n"
        "    torch.manual_seed(0)\n"
        "    found, state = sample(model, x, sigmas), torch.get_rng_state()\n"
        "    torch.manual_seed(0)\n"
        "    noise = kdpp.BrownianNoise(x, sigmas[-2], sigmas[0])\n"
        "    assert torch.equal(found, sample(model, x, sigmas, noise_sampler=noise))\n"
        "    assert torch.equal(state, torch.get_rng_state())\n",
        "-W", "always::UserWarning",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("k-diffusion's Brownian tree is not there") == 1


def test_a_loaded_k_diffusion_is_the_one_used(monkeypatch):
    """A host's own k_diffusion, already in sys.modules, is what kdpp.kdiffusion hands out."""
    theirs = object()
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", theirs)
    assert kdpp.kdiffusion.sampling is theirs


@pytest.mark.parametrize(
    ("python_version", "asked"), [("3.10", True), ("3.12", True), ("3.13", False), ("3.14", False)]
)
def test_k_diffusion_is_asked_for_where_numpy_below_2_has_wheels(python_version, asked):
    """With the bounds that its dependencies need; from 3.13 on without it and without them."""
    project = read_toml(PACKAGE.parent / "pyproject.toml")["project"]
    wanted = map(Requirement, project["dependencies"])
    environment = {"python_version": python_version}
    found = {one.name: one.specifier for one in wanted
             if one.marker is None or one.marker.evaluate(environment)}  # fmt: skip
    assert found["numpy"].contains("2.0.0") == (not asked)
    its = {"k-diffusion", "setuptools", "tifffile"}
    assert its & found.keys() == (its if asked else set())


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
            names |= {f"kdpp.{alias.name}" for alias in node.names if node.module == "kdpp"}
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
        ("steps", {"checks", "plan"}),
        ("asking", {"denoisers", "kinds", "stacking", "update"}),
        ("algebra", {"asking", "checks", "kinds", "plan", "steps"}),
        ("reflection", {"algebra", "asking", "checks", "kinds", "plan", "steps", "update"}),
        (
            "guidance",
            {
                "algebra",
                "asking",
                "checks",
                "kinds",
                "noise",
                "plan",
                "reflection",
                "steps",
            },
        ),
        ("update", {"plan"}),
        ("stacking", {"denoisers", "kinds", "memory"}),
        (
            "guided_step",
            {
                "algebra",
                "asking",
                "checks",
                "denoisers",
                "guidance",
                "plan",
                "steps",
                "update",
            },
        ),
        (
            "driver",
            {
                "algebra",
                "asking",
                "checks",
                "denoisers",
                "guidance",
                "guided_step",
                "kinds",
                "memory",
                "noise",
                "plan",
                "reflection",
                "solver",
                "update",
            },
        ),
        ("capturing", {"denoisers", "driver", "memory", "solver"}),
        ("solvers/euler", {"driver", "noise", "plan", "solver"}),
        ("solvers/singlestep", {"driver", "noise", "plan", "solver", "solvers.multistep"}),
        ("solvers/multistep", {"driver", "noise", "plan", "solver"}),
        (
            "solvers/sde",
            {"driver", "noise", "plan", "solver", "solvers.multistep", "solvers.singlestep"},
        ),
        ("models", {"checks", "kinds"}),
        ("memory", {"kinds"}),
        (
            "editing",
            {"algebra", "checks", "denoisers", "guidance", "kinds", "noise", "plan", "solver"},
        ),
        (
            "rollouts",
            {
                "algebra",
                "asking",
                "checks",
                "denoisers",
                "driver",
                "guidance",
                "kinds",
                "noise",
                "plan",
                "update",
            },
        ),
        ("checkpoints/networks", {"checks", "denoisers", "kinds", "models", "standin"}),
        (
            "checkpoints/pipelines",
            {
                "checkpoints.networks",
                "checkpoints.presets",
                "checkpoints.prompts",
                "checks",
                "denoisers",
                "memory",
            },
        ),
        ("checkpoints/prompts", set()),
        ("kdiffusion", {"standin"}),
        ("standin", set()),
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


def oldest_torch(requirements):
    """The lowest version of torch that requirements allow."""
    (torch,) = (one for one in map(Requirement, requirements) if one.name == "torch")
    return str(torch.specifier)


def test_the_core_needs_nothing_that_torch_has_got_since_its_oldest():
    """Guided runs where the names are gone that kdpp has used and torch 2.1 has not.

    Hosts pin torch 2.1. The core's whole tests were run on it (docs/hosts.md); this one, on
    whatever torch there is, keeps what failed there from coming back.
    """
    project = read_toml(PACKAGE.parent / "pyproject.toml")["project"]
    assert oldest_torch(project["dependencies"]) == ">=2.1"
    run = python(
        "import torch\n"
        "for place, name in ((torch.compiler, 'is_compiling'), (torch, 'get_device_module')):\n"
        "    vars(place).pop(name, None)\n"
        + SAMPLE
        + "torch.__version__ = type(torch.__version__)('2.1.2')\n"
        "try: kdpp.capture('euler', model, x, torch.tensor([2.0, 1.0]))\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "kdpp.capture needs torch 2.4 or later; this is 2.1.2\n"
