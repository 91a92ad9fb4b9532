"""What a teacher adds to a student's memory, and what saving it costs in time.

    python benchmarks/memory.py [--pairs 20] [--json FILE]

The networks have 105 million float32 weights, 420 MB; needs the extra `memory`. Memory is taken in
a fresh process for each row: on CUDA what torch has allocated; without it the resident set (Linux's
VmHWM and VmRSS; free memory is handed back to the system before it is read), what was there before
the networks taken off. "making" and "sampling" are peaks, "after" is what is there in the last of
four steps, the first of which was guided; 1 is the student's alone. Times are medians of paired
ratios; on a shared machine trust nothing finer than a tenth.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import kdpp
from kdpp.digits import NULL_CLASS, schedule
from kdpp.lab.networks import ResMLP
from kdpp.memory import Borrowed, without_adapters
from measure import about, heading, median_ratio, time_pairs, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LARGE = (2048, 4096, 3)  # width, hidden, blocks
MANY = (64, 64, 100)  # 300 small layers: next to no work in each, so that a switch shows
STEPS = 4
RANK = 8
Models = tuple[Any, Any]  # the student, and its teacher or None


def make() -> nn.Module:
    """A denoiser with random weights."""
    return denoiser(LARGE)


def denoiser(sizes: tuple[int, int, int]) -> nn.Module:
    names = ("width", "hidden", "blocks")
    network = ResMLP((1, 8, 8), NULL_CLASS, **dict(zip(names, sizes))).requires_grad_(False)
    return kdpp.kdiffusion.external.CompVisDenoiser(network).to(DEVICE)


def adapted(model: nn.Module) -> nn.Module:
    """The denoiser with LoRA adapters in every linear layer, in place."""
    import peft

    linear = [name for name, m in model.inner_model.named_modules() if isinstance(m, nn.Linear)]
    settings = peft.LoraConfig(r=RANK, target_modules=linear, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model.inner_model)
    return model


def in_8_bits(model: nn.Module) -> nn.Module:
    """As docs/memory.md says."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def in_4_bits(model: nn.Module) -> nn.Module:
    """As docs/memory.md says."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                sizes, dtype = (layer.in_features, layer.out_features), layer.weight.dtype
                small = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
                small.weight = Params4bit(layer.weight.data.cpu(), False, quant_type="nf4")
                small.bias = layer.bias
                setattr(parent, name, small.to(DEVICE))  # this quantises
    return model


def shared() -> Models:
    student = adapted(make())
    return student, without_adapters(student)


def loaded() -> Models:
    student = make()
    return student, Borrowed(make, like=student)


def quantised(how: Callable[[nn.Module], nn.Module]) -> Models:
    teacher = how(make())  # before the student is there, while there is room for it whole
    return make(), teacher


CASES: dict[str, Callable[[], Models]] = {
    "student alone": lambda: (make(), None),
    "two full models": lambda: (make(), make()),
    "LoRA student, its base as teacher": shared,
    "second model loaded for the step": loaded,
    "teacher in 8 bits": lambda: quantised(in_8_bits),
    "teacher in 4 bits": lambda: quantised(in_4_bits),
}
if DEVICE == "cuda":
    CASES["second model moved in for the step"] = lambda: (make(), Borrowed(make().cpu()))


def sampler(models: Models) -> Callable[..., object]:
    """A run of STEPS steps, the first guided, the teacher with CFG."""
    student, teacher = models
    guidance = {"teacher_steps": 1, "teacher_cfg_scale": 2.0}
    if teacher is None:
        teacher, guidance = student, {"teacher_steps": 0}
    model = kdpp.TeacherGuidedDenoiser(student, teacher, **guidance)
    levels = torch.tensor(schedule(STEPS))
    labels = torch.arange(8, device=DEVICE)
    extra_args = {"cond": labels, "uncond": torch.full_like(labels, NULL_CLASS)}
    x = torch.randn(8, 1, 8, 8, device=DEVICE) * levels[0]

    def run(callback: Callable[..., object] | None = None) -> object:
        return kdpp.sample_dpmpp_2m_tg(model, x, levels, extra_args, callback, disable=True)

    return run


def resident(what: str) -> int:
    """Bytes of this process' memory: VmRSS now, VmHWM at its peak."""
    kilobytes = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
    assert kilobytes is not None
    return 1024 * int(kilobytes[1])


def now() -> int:
    """Bytes in use, those that are free and not yet handed back taken off."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def peak() -> int:
    """The most bytes in use since the last call; a new count begins."""
    if DEVICE == "cuda":
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most
    most = resident("VmHWM")
    CLEAR.write_text("5", encoding="ascii")
    return most


def measure(name: str) -> dict[str, int]:
    """Peaks of making and of sampling, and what the last step has; in this process, a fresh one."""
    for library in ("bitsandbytes", "peft", "torchao.quantization"):
        importlib.import_module(library)  # what importing and a first run take is no model's
    sampler((denoiser((8, 8, 1)), None))()
    before = now()
    peak()
    after = 0

    def look(info: dict[str, Any]) -> None:
        nonlocal after
        if info["i"] == STEPS - 1:
            after = now() - before

    run = sampler(CASES[name]())
    now()
    making = peak() - before
    run(look)
    return {"making": making, "sampling": peak() - before, "after": after}


def measure_apart(name: str) -> dict[str, int]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", name], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def time_ratio(one: Models, other: Models, pairs: int) -> float:
    """The median time of the first over the second's."""
    seconds = time_pairs({"one": sampler(one), "other": sampler(other)}, pairs)
    return median_ratio(seconds["one"], seconds["other"])


def time_ratios(pairs: int) -> dict[str, float]:
    """Each way's time over that of two full models in memory."""
    ratios = {}
    for sizes in (LARGE, MANY):
        base = denoiser(sizes)
        student = adapted(copy.deepcopy(base))
        count = sum(hasattr(layer, "lora_A") for layer in student.modules())
        switched = student, without_adapters(student)
        kind = f"adapters switched, {count} layers of {sizes[0]}"
        ratios[kind] = time_ratio(switched, (student, base), pairs)
    student, teacher = make(), make()
    others = {
        "teacher in 8 bits": in_8_bits(copy.deepcopy(teacher)),
        "teacher in 4 bits": in_4_bits(copy.deepcopy(teacher)),
    }
    if DEVICE == "cuda":
        others["second model moved in for the step"] = Borrowed(copy.deepcopy(teacher).cpu())
    for name, other in others.items():
        ratios[name] = time_ratio((student, other), (student, teacher), pairs)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")  # the libraries', at import
    torch.set_num_threads(1)
    if DEVICE == "cpu" and not CLEAR.exists():
        parser.error("without CUDA, memory is read from Linux's /proc, and there is none here")
    if settings.case:
        print(json.dumps(measure(settings.case)))
        return
    found = {name: measure_apart(name) for name in tqdm(CASES, desc="measuring")}
    one = found["student alone"]["sampling"]
    print(heading(about()))
    print(f"memory; 1 = {one / 2**20:.0f} MiB")
    print(f"{'':40} {'making':>8} {'sampling':>8} {'after':>8}")
    for name, row in found.items():
        print(f"{name:40} " + " ".join(f"{row[at] / one:8.2f}" for at in row))
    if DEVICE == "cpu":
        print("second model moved in for the step: skipped, torch finds no CUDA device")
    ratios = time_ratios(settings.pairs)
    print("time / two full models")
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:8.2f}")
    write(settings.json, {"bytes": found, "time_ratio": ratios})


if __name__ == "__main__":
    main()
