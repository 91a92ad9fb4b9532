"""``kdpp install`` into copies of a host's layout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kdpp
from kdpp.cli import main
from kdpp.hosts import install as installing
from kdpp.lab.settings import read_toml

TESTS = Path(__file__).parent
PACKAGE = Path(kdpp.__file__).parent
LAYOUTS = {
    "checkout": ["main.py", "comfy/samplers.py", "custom_nodes/websocket_image_save.py"],
    "folder of models": ["custom_nodes/other/__init__.py", "models/x", "user/default/y"],
}


@pytest.fixture(params=LAYOUTS)
def host(request, tmp_path):
    """ComfyUI's folder: a checkout of it, or the folder that holds its models."""
    for name in LAYOUTS[request.param]:
        (tmp_path / "ComfyUI" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "ComfyUI" / name).write_text(f"# {name}\n")
    return tmp_path / "ComfyUI"


def contents(folder):
    """Every file's bytes, and every folder."""
    return {
        one.relative_to(folder).as_posix(): one.read_bytes() if one.is_file() else None
        for one in folder.rglob("*")
        if "__pycache__" not in one.parts
    }


def command(capsys, *given):
    """Exit status and what was said."""
    status = main(list(map(str, given)))
    said = capsys.readouterr()
    return status, said.out + said.err


def test_installing_and_uninstalling_leave_no_trace(host, capsys):
    before = contents(host)
    status, said = command(capsys, "install", "comfyui", host)
    pack = host / "custom_nodes" / "kdpp"
    assert status == 0 and f"kdpp {kdpp.__version__} is in {pack}" in said
    added = contents(host).keys() - before.keys()
    assert all(f"{name}/".startswith("custom_nodes/kdpp/") for name in added)
    assert contents(pack / "kdpp") == contents(PACKAGE)
    # Python leaves its bytecode there.
    (pack / "__pycache__").mkdir()
    (pack / "__pycache__" / "__init__.cpython-313.pyc").write_bytes(b"")
    status, said = command(capsys, "uninstall", "comfyui", host)
    assert status == 0 and str(pack) in said
    assert contents(host) == before


def test_an_older_one_is_replaced(host):
    pack = installing.install("comfyui", host)
    first = contents(pack)
    (pack / "kdpp" / "left.py").write_text("")  # as the older one may have had
    record = json.loads((pack / installing.RECORD).read_text())
    record["files"] = installing.digests(pack)
    (pack / installing.RECORD).write_text(json.dumps(record))
    assert installing.install("comfyui", host) == pack
    assert contents(pack) == first
    assert [one.name for one in pack.parent.glob("kdpp*")] == ["kdpp"]


@pytest.mark.parametrize("failing", ["write", "rename"])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_whole_or_not_at_all(host, older, failing, error, monkeypatch):
    """Whatever stops it, the host is as it was."""
    if older:
        installing.install("comfyui", host)
    before = contents(host)
    if failing == "write":

        def digests(folder, of=installing.digests):
            if folder.name == "new":
                raise error
            return of(folder)

        monkeypatch.setattr(installing, "digests", digests)
    else:

        def rename(self, target, move=Path.rename):
            if self.name == "new":
                raise error
            return move(self, target)

        monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(error)):
        installing.install("comfyui", host)
    assert contents(host) == before


def place_folder(pack):
    (pack / "kept").mkdir(parents=True)
    (pack / "kept" / "mine.txt").write_text("mine")


def place_link(pack):
    elsewhere = pack.parents[2] / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / installing.RECORD).write_text('{"files": {}}')
    pack.symlink_to(elsewhere)


def place_file(pack):
    pack.write_text("mine")


def place_inside(pack):
    installing.install("comfyui", pack.parents[1])
    (pack / "example_workflows" / "mine.json").write_text("{}")


def place_change(pack):
    installing.install("comfyui", pack.parents[1])
    with (pack / "kdpp" / "plan.py").open("a") as file:
        file.write("# mine\n")


@pytest.mark.parametrize("what", ["install", "uninstall"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        (place_folder, "was not written by kdpp install"),
        (place_link, "was not written by kdpp install"),
        (place_file, "was not written by kdpp install"),
        (place_inside, "new or changed since kdpp was installed: example_workflows/mine.json;"),
        (place_change, "new or changed since kdpp was installed: kdpp/plan.py;"),
    ],
)
def test_what_kdpp_did_not_write_stays(host, place, message, what, capsys):
    """And the user hears where it is and what to do."""
    place(host / "custom_nodes" / "kdpp")
    before = contents(host)
    status, said = command(capsys, what, "comfyui", host)
    assert status == 1 and message in said and "move" in said
    assert contents(host) == before


@pytest.mark.parametrize("what", ["install", "uninstall"])
def test_a_folder_that_is_no_host_is_refused(what, host, tmp_path, capsys):
    """With what was looked for, and the host where it lies inside."""
    status, said = command(capsys, what, "comfyui", tmp_path)
    assert status == 1 and f"{tmp_path} is not a ComfyUI: looked for" in said
    assert "custom_nodes" in said and "comfy/samplers.py" in said and f"{host} is one" in said
    assert [one.name for one in tmp_path.iterdir()] == ["ComfyUI"]


def test_uninstalling_what_is_not_there(host, capsys):
    status, said = command(capsys, "uninstall", "comfyui", host)
    assert status == 1 and "kdpp is not installed there" in said


def python(code, *flags, path=()):
    """Run code in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *flags, "-c", code], capture_output=True, text=True,
        cwd=TESTS, env={"PATH": "", "PYTHONPATH": ":".join(map(str, path))}, timeout=120,
    )  # fmt: skip


def test_any_python_can_install(host):
    """One that has no packages: from a checkout, with all of both commands."""
    code = f"from kdpp.cli import main; main(['install', 'comfyui', {str(host)!r}])"
    run = python(f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}", "-I", "-S")
    assert run.returncode == 0 and "kdpp is in" in run.stdout.replace(kdpp.__version__ + " ", "")


def test_the_registrys_metadata(host):
    """Name and version; no package to install; the publisher's name is left open."""
    pack = installing.install("comfyui", host)
    told = read_toml(pack / "pyproject.toml")
    assert told["project"]["name"] == "kdpp" and told["project"]["dependencies"] == []
    assert told["project"]["version"] == kdpp.__version__
    assert told["tool"]["comfy"].keys() == {"PublisherId", "DisplayName"}
    assert told["tool"]["comfy"]["PublisherId"] == ""
    assert told["tool"]["comfy"]["DisplayName"] and "ComfyUI" not in told["project"]["name"]


# As ComfyUI imports a pack: by its path, which is its module's name, too. kdpp is not found
# otherwise, unless a folder of it comes first.
LOAD = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
class NoOther:
    def find_spec(name, path=None, target=None):
        if name == "kdpp" and not OTHER:
            raise AssertionError("kdpp was looked for")
sys.meta_path.insert(0, NoOther)
import comfy_double
sys.modules.update(comfy_double.modules(v3=True))
before = list(sys.path)
if IMPORTED:
    import kdpp
spec = spec_from_file_location(PACK, PACK + "/__init__.py")
module = sys.modules[PACK] = module_from_spec(spec)
spec.loader.exec_module(module)
assert sys.path == before
import asyncio, kdpp, kdpp.hosts.comfyui.nodes
nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
print(kdpp.__file__, kdpp.SOLVERS["euler"], [node.define_schema().node_id for node in nodes])
"""


def load(pack, tmp_path, other=None, imported=False):
    """The pack in a fresh interpreter, with another kdpp of this version, or of none."""
    path = [TESTS]
    if other is not None:
        folder = tmp_path / "site-packages" / "kdpp"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"__version__ = {other!r}\n")
        path.append(folder.parent)
    told = f"PACK, OTHER, IMPORTED = {str(pack)!r}, {other is not None}, {imported}\n"
    return python(told + LOAD, path=path)


@pytest.mark.parametrize("other", [None, "0.0.1"])
def test_the_pack_runs_on_its_own_copy(host, tmp_path, other):
    """Whether or not another kdpp lies in site-packages, with no change of ``sys.path``."""
    pack = installing.install("comfyui", host)
    run = load(pack, tmp_path, other)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(pack / "kdpp" / "__init__.py"))
    assert "euler" in run.stdout and "KDPPTeacherGuider" in run.stdout


def test_another_version_that_was_imported_before_is_named(host, tmp_path):
    """A process can hold one: the message says where both are."""
    pack = installing.install("comfyui", host)
    run = load(pack, tmp_path, "0.0.1", imported=True)
    assert run.returncode == 1
    said = run.stderr.splitlines()[-1]
    assert "ImportError: another extension has imported kdpp 0.0.1 from" in said
    assert "site-packages" in said and f"need kdpp {kdpp.__version__}" in said


def test_another_copy_of_this_version_that_was_imported_before_is_taken(host, tmp_path):
    pack = installing.install("comfyui", host)
    told = f"PACK, OTHER, IMPORTED = {str(pack)!r}, True, True\n"
    run = python(told + LOAD, path=[TESTS, PACKAGE.parent])
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(PACKAGE / "__init__.py"))


# The web UIs --------------------------------------------------------------------------------------

WEBUI = {
    "checkout": ["webui.py", "modules/sd_samplers.py", "extensions/put extensions here.txt"],
    "folder of models": ["config.json", "models/Stable-diffusion/x", "extensions/other/x.py"],
}


@pytest.fixture(params=WEBUI)
def webui(request, tmp_path):
    """A web UI's folder: a checkout of it, or the folder that holds its models and settings."""
    for name in WEBUI[request.param]:
        (tmp_path / "webui" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "webui" / name).write_text(f"# {name}\n")
    return tmp_path / "webui"


def test_a_web_ui_without_a_trace(webui, capsys):
    before = contents(webui)
    status, said = command(capsys, "install", "webui", webui)
    pack = webui / "extensions" / "kdpp"
    assert status == 0 and f"kdpp {kdpp.__version__} is in {pack}" in said
    assert (pack / "scripts" / "kdpp_teacher.py").is_file()
    assert contents(pack / "kdpp") == contents(PACKAGE)
    assert all(f"{one}/".startswith("extensions/kdpp/") for one in contents(webui).keys() - before)
    assert not (pack / "install.py").exists()  # which the host would run at its start
    status, said = command(capsys, "uninstall", "webui", webui)
    assert status == 0 and contents(webui) == before


def test_comfyui_is_no_web_ui(host, capsys):
    status, said = command(capsys, "install", "webui", host)
    assert status == 1 and f"{host} is not a web UI (A1111, Forge, Forge Neo)" in said
    assert "looked for the folder extensions" in said


# As a web UI loads a script: by its path.
LOAD_SCRIPT = """
import sys, pathlib
from importlib.util import module_from_spec, spec_from_file_location
class NoOther:
    def find_spec(name, path=None, target=None):
        if name == "kdpp" and not OTHER:
            raise AssertionError("kdpp was looked for")
sys.meta_path.insert(0, NoOther)
if IMPORTED:
    import kdpp
spec = spec_from_file_location("kdpp_teacher.py", PACK + "/scripts/kdpp_teacher.py")
module = module_from_spec(spec)
import webui_double
host = webui_double.A1111(pathlib.Path(PACK))
sys.modules.update(host.modules())
before = list(sys.path)
spec.loader.exec_module(module)
assert sys.path == before
import kdpp
print(kdpp.__file__, module.Script().title())
"""


@pytest.mark.parametrize("other", [None, "0.0.1"])
def test_the_panel_runs_on_its_own_copy(webui, tmp_path, other):
    """Whether or not another kdpp lies in site-packages, with no change of ``sys.path``."""
    run = load_script(installing.install("webui", webui), tmp_path, other)
    assert run.returncode == 0, run.stderr
    pack = webui / "extensions" / "kdpp"
    assert run.stdout.split() == [str(pack / "kdpp" / "__init__.py"), "kdpp"]


def test_another_version_that_an_extension_has_imported(webui, tmp_path):
    run = load_script(installing.install("webui", webui), tmp_path, "0.0.1", imported=True)
    assert run.returncode == 1
    said = run.stderr.splitlines()[-1]
    assert "ImportError: another extension has imported kdpp 0.0.1 from" in said
    assert "site-packages" in said and f"needs kdpp {kdpp.__version__}" in said


def load_script(pack, tmp_path, other=None, imported=False):
    """The extension's script in a fresh interpreter; arguments as `load`'s."""
    path = [TESTS]
    if other is not None:
        folder = tmp_path / "site-packages" / "kdpp"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"__version__ = {other!r}\n")
        path.append(folder.parent)
    told = f"PACK, OTHER, IMPORTED = {str(pack)!r}, {other is not None}, {imported}\n"
    return python(told + LOAD_SCRIPT, path=path)
