"""The installed command, in a process of its own that has no network: nothing is asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="needs diffusers (extra: diffusers)")
pytest.importorskip("peft", reason="needs peft (extra: diffusers)")
tiny = pytest.importorskip("tiny_pipelines", reason="needs diffusers and transformers")

import single_files  # noqa: E402
import test_loras  # noqa: E402

COMMAND = Path(sys.executable).with_name("kdpp")
BEFORE = """
import sys
sys.path.insert(0, {tests!r})
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print("asked the network:", event, arguments, file=sys.stderr)
        raise SystemExit(3)
sys.addaudithook(refuse)
from single_files import TINY
from kdpp.checkpoints.configs import CONFIGS
CONFIGS.update(TINY)
"""
"""Run first: it stops whoever opens a connection or looks up a name, and knows tiny SD and SDXL."""


def without_network():
    """A prefix that gives a command a network namespace of its own, where the system has them."""
    prefix = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else []


@pytest.fixture
def generate(tmp_path):
    """Runs the command with no network and a home of its own."""
    if not COMMAND.exists():
        pytest.skip("needs the installed command kdpp")
    (tmp_path / "before.py").write_text(BEFORE.format(tests=str(Path(__file__).parent)))

    def run(*words):
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return subprocess.run(
            [*without_network(), COMMAND, "generate", "--import", tmp_path / "before.py", *words],
            capture_output=True, text=True, timeout=300,
            env={**kept, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip

    return run


SETTINGS = ("--prompt", "a red boat", "--steps", "2", "--width", "16", "--height", "16")


def drawn(run, folder):
    assert run.returncode == 0, run.stderr[-2000:]
    with Image.open(folder / "00000.png") as image:
        return image.tobytes()


def test_a_single_file_a_folder_and_a_lora_ask_for_nothing(generate, tmp_path):
    """SDXL from a single file with a folder as its teacher; SD with a LoRA; and once more."""
    (made := tmp_path / "tokenizers").mkdir()
    tokenizers = single_files.tokenizers(made)
    pipe = single_files.pipeline("SDXL", tokenizers)
    save_file(single_files.single_file(pipe), tmp_path / "sdxl.safetensors")
    tiny.tiny(pipe.unet, seed=7)
    pipe.save_pretrained(tmp_path / "teacher")
    words = ["--student", tmp_path / "sdxl.safetensors", "--teacher", tmp_path / "teacher"]
    once = drawn(generate(*words, *SETTINGS, "--out", tmp_path / "a"), tmp_path / "a")
    alone = drawn(generate(*words[:2], *SETTINGS, "--out", tmp_path / "b"), tmp_path / "b")
    assert once != alone
    like = generate("--like", tmp_path / "a" / "00000.png", "--out", tmp_path / "c")
    assert drawn(like, tmp_path / "c") == once

    tiny.sd().save_pretrained(tmp_path / "sd")
    lora = test_loras.lora(tmp_path / "speed.safetensors", 0)
    words = ["--student", tmp_path / "sd", "--student-lora", lora]
    drawn(generate(*words, *SETTINGS, "--out", tmp_path / "d"), tmp_path / "d")


def test_a_hub_name_is_not_looked_up(generate, tmp_path):
    """It is a folder that is not there."""
    run = generate("--student", "stabilityai/sd-turbo", *SETTINGS, "--out", tmp_path / "a")
    assert run.returncode == 1
    said = (
        "there is no file or folder stabilityai/sd-turbo; kdpp fetches nothing: download it first"
    )
    assert said in run.stderr


def test_the_guard_sees_a_question(generate, tmp_path):
    """Otherwise the tests above would show nothing."""
    asks = "\nimport socket\nsocket.create_connection(('example.com', 80))\n"
    with open(tmp_path / "before.py", "a") as file:
        file.write(asks)
    run = generate("--student", "x", *SETTINGS, "--out", tmp_path / "a")
    assert run.returncode == 3 and "asked the network: socket.getaddrinfo" in run.stderr
