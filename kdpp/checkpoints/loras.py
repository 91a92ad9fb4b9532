"""LoRAs with a role: for the student, for the teacher, or for both, on one network."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from safetensors.torch import load_file
from torch import nn

from kdpp.checkpoints.architectures import recognise
from kdpp.checkpoints.files import EXPERTS, NOT_READ, inspect, noises_of
from kdpp.checkpoints.headers import Entry, read_header
from kdpp.checkpoints.origins import Origins, named, origins_of
from kdpp.checkpoints.pipelines import (
    denoiser_of,
    encode_sdxl,
    encoders_of,
    family_of,
    network_of,
)
from kdpp.checks import check_number
from kdpp.lab import processes
from kdpp.memory import without_adapters

__all__ = ["Lora", "load_loras"]

Role = Literal["both", "student", "teacher"]


OTHER_NAMES = {
    "transformer_2.": "transformer.", ".text_model.": ".", ".processor.": ".", "_lora.": ".lora.",
    ".self_attn.to_q.": ".self_attn.q_proj.", ".self_attn.to_k.": ".self_attn.k_proj.",
    ".self_attn.to_v.": ".self_attn.v_proj.", ".self_attn.to_out.": ".self_attn.out_proj.",
}  # fmt: skip
"""Parts of the names of layers, by which the same layer may be called otherwise."""


class Lora(NamedTuple):
    """A LoRA's file, the factor of its change, and whose network it changes."""

    path: str | Path
    weight: float = 1.0
    role: Role = "both"


def load_loras(
    pipe: Any, loras: Iterable[Lora], *, lcm: bool | None = None, device: Any = None
) -> tuple[nn.Module, nn.Module]:
    """Load LoRAs into a pipeline, and give its student and its teacher, two denoisers.

    Both are the pipeline's one network; each call switches off the LoRAs that are for the other
    role (`kdpp.without_adapters`)::

        loras = [Lora("sdxl_lightning_4step_lora.safetensors", role="student"),
                 Lora("watercolour.safetensors", 0.8)]
        student, teacher = load_loras(pipe, loras)

    Args:
        pipe: a pipeline of `kdpp.checkpoints.pipelines.FAMILIES`, without LoRAs. It holds them
            afterwards; of a call that raises it holds none.
        loras: tuples of file, weight and role.
        lcm: of the student, as in `kdpp.checkpoints.networks.as_denoiser`. A teacher whose LoRAs
            are not the student's is never a consistency model.
        device: where the levels lie, as in `kdpp.checkpoints.pipelines.denoiser_of`.

    Of two networks, Wan 2.2's experts, a LoRA changes the one for high noise if its file's name
    has the word "high", the one for low noise if "low", else both. Of tensors that diffusers has no
    place for, stderr says how many there are, and the first one's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not a LoRA, is one for another architecture, matches no layer or does
            not fit; or it is for one role and changes the text encoders, which both roles share; or
            the pipeline holds LoRAs already.
    """
    network = network_of(pipe)
    if any(getattr(part, "peft_config", None) for part in pipe.components.values()):
        raise ValueError("the pipeline holds LoRAs already; load all of them with load_loras")
    loras = [Lora(*lora) for lora in loras]
    for lora in loras:
        _check(lora, network, bool(encoders_of(pipe)))
    names = [f"lora{number}" for number in range(len(loras))]
    try:
        for name, lora in zip(names, loras):
            _load(pipe, name, Path(lora.path))
        if loras:
            pipe.set_adapters(names, [float(lora.weight) for lora in loras])
    except BaseException:
        pipe.unload_lora_weights()
        raise
    off = {
        role: [name for name, lora in zip(names, loras) if lora.role not in ("both", role)]
        for role in ("student", "teacher")
    }
    same = not any(off.values())
    student = denoiser_of(pipe, lcm=lcm, device=device)
    teacher = student if same else denoiser_of(pipe, lcm=False, device=device)
    if off["student"]:
        student = without_adapters(student, off["student"])
    return student, without_adapters(teacher, off["teacher"]) if off["teacher"] else teacher


def _check(lora: Lora, network: nn.Module, reads: bool) -> None:
    """ValueError for what can be told from the LoRA's header.

    ``reads``: whether the pipeline has text encoders.
    """
    path, facts = Path(lora.path), inspect(lora.path)
    check_number("weight", lora.weight, -float("inf"), float("inf"))
    if lora.role not in get_args(Role):
        raise ValueError(f"role is {lora.role!r}; it must be one of {', '.join(get_args(Role))}")
    if facts.lora is None:
        raise ValueError(f"{path} is {NOT_READ.get(facts.kind, f'a {facts.kind}')}, not a LoRA")
    shapes = {key: Entry("F32", tuple(t.shape)) for key, t in network.state_dict().items()}
    found = recognise(shapes)
    if found and facts.architecture and found.architecture != facts.architecture:
        raise ValueError(
            f"{path} is a LoRA for {facts.architecture}, and the model is {found.architecture}"
        )
    texts = [target for target in facts.lora.targets if target.startswith("text")]
    if texts and lora.role != "both":
        raise ValueError(
            f"{path} changes the {' and '.join(texts)}, which student and teacher share; it "
            "cannot be for one of them"
        )
    if texts and not reads:
        raise ValueError(
            f"{path} changes the {' and '.join(texts)}, and this model is held without: the "
            "student's serve both. Give the LoRA for the student's network alone, without a teacher"
        )


def _load(pipe: Any, name: str, path: Path) -> None:
    """Load one LoRA; ValueError unless it changes a layer and fits."""
    try:
        with warnings.catch_warnings():
            # peft, of the second LoRA, and of one that is taken out again.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            for expert in _experts(pipe, path):
                pipe.load_lora_weights(
                    str(path.parent), weight_name=path.name, adapter_name=name,
                    local_files_only=True, use_safetensors=True, **expert,
                )  # fmt: skip
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        # diffusers' cleaning up may fail, too.
        cause = (error.__context__ or error) if isinstance(error, KeyError) else error
        reason = " ".join(str(cause).split())
        raise ValueError(f"{path} does not fit the {type(pipe).__name__}: {reason}") from error
    layers = {
        f"{part}.{place}"
        for part, network in pipe.components.items()
        if isinstance(network, nn.Module)
        for place, layer in network.named_modules()
        if name in getattr(layer, "lora_A", ())
    }
    if not layers:
        key = min(read_header(path).entries)
        raise ValueError(
            f"{path} matches no layer of the {type(pipe).__name__}; its keys are such as {key!r}"
        )
    lost = _lost(pipe, path, layers)
    if lost and processes.share()[0] == 0:
        print(
            f"{path}: {len(lost)} of its tensors change nothing, such as {lost[0]!r}; diffusers "
            f"has no place for them in the {type(pipe).__name__}",
            file=sys.stderr,
        )


def _lost(pipe: Any, path: Path, layers: Collection[str]) -> list[str]:
    """The file's tensors that did not reach any of the layers that a LoRA has changed.

    A scale (alpha) goes with its layer and is not counted.
    """
    held = {key: named(tensor, key) for key, tensor in load_file(path).items()}
    sdxl = {"unet_config": pipe.unet.config} if family_of(pipe).encode is encode_sdxl else {}
    with Origins():
        found = pipe.lora_state_dict(dict(held), **sdxl)
    state = found[0] if isinstance(found, tuple) else found
    places = tuple(f"{_place(layer)}." for layer in layers)
    arrived = {
        key
        for name, tensor in state.items()
        if _place(name).startswith(places)
        for key in origins_of(tensor)
    }
    return sorted(key for key in held if key not in arrived and not key.endswith(".alpha"))


def _place(name: str) -> str:
    """A name of a layer, or of one of its tensors, without what older files say otherwise."""
    for old, new in OTHER_NAMES.items():
        name = name.replace(old, new)
    return name


def _experts(pipe: Any, path: Path) -> list[dict[str, bool]]:
    """For which networks a LoRA is, as arguments of load_lora_weights."""
    if getattr(pipe, "transformer_2", None) is None:
        return [{}]
    said = noises_of(path) or list(EXPERTS)
    return [{"load_into_transformer_2": EXPERTS[noise] == "transformer_2"} for noise in said]
