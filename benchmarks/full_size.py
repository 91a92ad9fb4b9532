"""`kdpp generate` at full size beside a plain script of diffusers: seconds, and peak memory.

    python benchmarks/full_size.py [--model "SD 1.x"] [--dtype float16] [--side 128] [--folder DIR]

Writes two single files and a LoRA of random weights, some gigabytes, and removes them at the end.
Every row is a process of its own, from its start to its last picture: `kdpp generate`, or this file
with ``--script``, which is what a user of diffusers writes. Both draw the same pictures with the
same number of evaluations. Seconds are the process's own of the CPU, over all of its threads, which
wait without computing: what else runs on the machine is left out; ``--wall`` takes those of the
clock. The peak is the resident set's, files that are mapped included. Of ``--pairs`` runs in turn
the middle one is shown. In each turn kdpp reads a file for its digest the first time; "once more"
knows it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from kdpp.checkpoints.configs import CONFIGS, Config, write_folder
from measure import about, heading

sys.path.append(str(Path(__file__).parents[1] / "tests"))
PROMPT = "a lighthouse at night"
GIB = 2**30


class Cost(NamedTuple):
    """A process's seconds (`run`), and its peak resident set in GiB."""

    seconds: float
    peak: float


def random_weights(made: Any, dtype: torch.dtype, seed: int) -> Any:
    """A network with random weights of 16 bits, made without any others first."""
    generator = torch.Generator().manual_seed(seed)
    network = made.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for name, weight in network.named_parameters():
            fan = weight[0].numel() if weight.ndim > 1 else 1
            weight.normal_(0.0, 0.5 / fan**0.5, generator=generator)
            if weight.ndim == 1 and name.endswith("weight"):
                weight.fill_(1.0)
    return network.eval()


def write_model(config: Config, path: Path, seed: int, dtype: torch.dtype = torch.float16) -> Any:
    """A single file of the architecture; its UNet on the meta device is given back."""
    import diffusers
    import transformers

    import single_files

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**config.unet)
        vae = diffusers.AutoencoderKL(**config.vae)
        texts = [
            getattr(transformers, text.kind)(transformers.CLIPTextConfig(**text.settings))
            for text in config.texts
        ]
    names = ("text_encoder", "text_encoder_2")
    parts = {"unet": unet, "vae": vae, **dict(zip(names, texts))}
    # The UNet alone has the seed: files of one family share their text encoders and VAE.
    made = {n: random_weights(p, dtype, seed if n == "unet" else 0) for n, p in parts.items()}
    save_file(single_files.single_file(SimpleNamespace(**made)), path)
    return unet.to("meta")


def write_lora(unet: Any, path: Path, rank: int = 8) -> None:
    """A LoRA for the UNet's attention, in diffusers' names."""
    tensors = {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            rows, columns = layer.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = 0.02 * torch.randn(rank, columns).half()
            tensors[f"unet.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, rank).half()
    save_file(tensors, path)


def script(arguments: argparse.Namespace) -> None:
    """What a user of diffusers writes."""
    import diffusers

    config = CONFIGS[arguments.model]
    with tempfile.TemporaryDirectory() as folder:
        parts = ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
        write_folder(config, Path(folder), parts)
        pipe = getattr(diffusers, config.pipeline).from_single_file(
            arguments.script, config=folder, torch_dtype=getattr(torch, arguments.dtype)
        )
    if arguments.lora:
        pipe.load_lora_weights(str(Path(arguments.lora).parent), weight_name="lora.safetensors")
    pipe.to(arguments.device)
    for seed in range(arguments.pictures):
        images = pipe(
            PROMPT, height=arguments.side, width=arguments.side, guidance_scale=1.0,
            num_inference_steps=arguments.steps, generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        images[0].save(Path(arguments.out) / f"{seed}.png")


def run(words: list[str], wall: bool) -> Cost:
    """Run a process of Python to its end; its seconds of the CPU, or those of the clock."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, *words], stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(said.read().decode())
    clock = time.perf_counter() - start
    seconds = clock if wall else usage.ru_utime + usage.ru_stime
    return Cost(seconds, usage.ru_maxrss * 1024 / GIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="SD 1.x")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=1, help="runs of each row")
    parser.add_argument("--wall", action="store_true", help="seconds of the clock")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    for name in ("script", "lora", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.script:
        script(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        base, teacher, lora = (folder / f"{n}.safetensors" for n in ("base", "teacher", "lora"))
        config = CONFIGS[arguments.model]
        unet = write_model(config, base, 0)
        write_model(config, teacher, 1)
        write_lora(unet, lora)
        gib = base.stat().st_size / GIB
        print(heading(about()))
        print(
            f"{arguments.model}, a file of {gib:.2f} GiB in float16, run in {arguments.dtype} on "
            f"{arguments.device}; {arguments.pictures} pictures of {arguments.side} pixels, "
            f"{arguments.steps} steps each\n"
        )
        compare(arguments, folder, base, teacher, lora)


def compare(
    arguments: argparse.Namespace, folder: Path, base: Path, teacher: Path, lora: Path
) -> None:
    """Print a row for every way, and the seconds of a step."""
    size = ["--side", str(arguments.side), "--steps", str(arguments.steps), "--pictures"]
    common = ["--dtype", arguments.dtype, "--device", arguments.device]
    plain = [__file__, "--model", arguments.model, *size, str(arguments.pictures), *common]
    kdpp = ["-m", "kdpp", "generate", "--student", str(base), "--prompt", PROMPT, *common,
            "--width", str(arguments.side), "--height", str(arguments.side),
            "--sampler", "euler", "--prediction", "epsilon"]  # fmt: skip
    steps, many = ["--steps", str(arguments.steps)], f"0-{arguments.pictures - 1}"
    more = [*steps, "--seed", many]
    rows = {
        "script of diffusers": [*plain, "--script", str(base)],
        "kdpp generate": [*kdpp, *more],
        "script, with a LoRA": [*plain, "--script", str(base), "--lora", str(lora)],
        "kdpp, LoRA and its base as teacher": [*kdpp, *more, "--student-lora", str(lora)],
        "kdpp, another file as teacher": [*kdpp, *more, "--teacher", str(teacher)],
        "kdpp, one step alone, one picture": [*kdpp, "--steps", "1", "--seed", "0"],
        "kdpp, five steps alone, one picture": [*kdpp, "--steps", "5", "--seed", "0"],
        "kdpp generate, once more": [*kdpp, *more],
    }
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    print(f"{'':38}{'seconds':>9}{'peak, GiB':>11}")
    costs: dict[str, list[Cost]] = {name: [] for name in rows}
    for turn in range(arguments.pairs):
        os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{turn}")
        for number, (name, words) in enumerate(rows.items()):
            out = folder / f"out-{turn}-{number}"
            out.mkdir()
            costs[name].append(run([*words, "--out", str(out)], arguments.wall))
    middle = {name: sorted(found)[len(found) // 2] for name, found in costs.items()}
    for name, cost in middle.items():
        print(f"{name:38}{cost.seconds:9.1f}{cost.peak:11.2f}")
    names = list(rows)
    for one, other in ((1, 0), (7, 0), (3, 2), (3, 1), (4, 1)):
        a, b = middle[names[one]], middle[names[other]]
        print(
            f"{names[one]} / {names[other]}: seconds {a.seconds / b.seconds:.2f}, "
            f"peak {a.peak / b.peak:.2f}"
        )
    print(f"a step: {(middle[names[6]].seconds - middle[names[5]].seconds) / 4:.2f} s")


if __name__ == "__main__":
    main()
