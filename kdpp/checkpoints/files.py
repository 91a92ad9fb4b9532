"""What a file on disk is, read from its header alone.

A safetensors file begins with the names, dtypes and shapes of all its tensors. That is enough to
tell the architecture, the layout, a LoRA's targets and rank, and how weights are quantised;
of the data nothing is read but markers of a few bytes. What a file cannot say (SDXL's keys are the
same whether it predicts ε or v) is left open, never guessed.

Nothing is opened that could run code: a pickle is refused, whatever its name.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from kdpp.checkpoints.architectures import (
    FLOWS,
    Layers,
    Network,
    Recognised,
    lora_architecture,
    lora_layers,
    lora_layout,
    lora_rank,
    lora_target,
    network_of,
    recognise,
    takes_guidance,
)
from kdpp.checkpoints.headers import CONVERT, PICKLES, Entry, Header, read_header

__all__ = [
    "EXPERTS",
    "NOT_READ",
    "CheckpointFacts",
    "LoraFacts",
    "inspect",
    "noises_of",
    "part_numbers",
]

Prediction = Literal["epsilon", "v", "x0", "flow", "edm"]
KDPP_KEY = "kdpp.lab"
"""Under which kdpp's own models have their card in the metadata."""
JSON_CAP = 10_000_000
"""The longest of a folder's own JSON files that is read, in bytes."""
MARKER_CAP = 1024
"""The most numbers that a tensor may have to be read."""
ALPHA_DTYPES = {"F16", "BF16", "F32", "F64"}
PARTS = {
    "VAE": ("first_stage_model.", "vae."),
    "text encoders": ("cond_stage_model.", "conditioner.embedders.", "text_encoders."),
}
"""What an original single file holds besides the network."""
OTHER_KINDS = {
    "ControlNet": r"^control|controlnet",
    "VAE": r"decoder\.conv_in\.",
    "text encoder": r"(token_embedding|embed_tokens)\.weight$",
    "embedding": r"^(emb_params|clip_[lg])$",
}
"""What else a file may hold, by a pattern found in one of its keys; of several, the first."""

NOT_READ = {
    "unknown": "not a model that kdpp knows",
    "embedding": "a textual inversion embedding, which kdpp does not read",
}
"""What a sentence that refuses a file of this kind calls it."""


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA is.

    Attributes:
        layout: whose names its keys have: "kohya", "diffusers", "peft", "ComfyUI", "LyCORIS", or
            "plain" for the network's own without a prefix.
        targets: the networks that it changes.
        layers: how many layers it changes.
        ranks: the lowest and the highest; None where its form has none.
        alphas: the lowest and the highest of those that it holds; None: none, the rank.
    """

    layout: str
    targets: tuple[str, ...]
    layers: int
    ranks: tuple[int, int] | None
    alphas: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What a file or a folder is; printed, a line for each fact.

    Attributes:
        path: where it is.
        kind: "model", "LoRA", "VAE", "text encoder", "ControlNet", "embedding", "kdpp model" or
            "unknown".
        architecture: "SD 1.x", "SD 2.x", "SDXL", "SDXL refiner", "SD3", "FLUX.1", "FLUX.2",
            "Z-Image", "Qwen-Image", "Wan", …; None: its keys tell of none that kdpp knows.
        variant: what else tells one such model from another ("schnell", "T2V 14B"), if anything.
        layout: "original" or "diffusers" names in a file, "diffusers folder", or a LoRA's layout.
        parts: what a model's file or folder holds besides the network: "VAE", "text encoders", ….
        prediction: what its network predicts; None: it does not say.
        said_by: what says so, or what contradicts each other.
        zero_snr: whether its schedule ends at zero signal; None: it does not say.
        guidance_input: whether the network takes the CFG scale as an input (LCM, FLUX.1 dev).
        precision: dtypes and their share of the bytes, the largest first.
        quantised: how its weights are quantised, with a key that shows it; None: they are not.
        parameters: of the network; of all where there is none.
        bytes: of the file, or of the folder's network.
        lora: what a LoRA is; None for anything else.
        notes: what to know before it is used.
    """

    path: Path
    kind: str
    architecture: str | None
    variant: str = ""
    layout: str = ""
    parts: tuple[str, ...] = ()
    prediction: Prediction | None = None
    said_by: str = ""
    zero_snr: bool | None = None
    guidance_input: bool = False
    precision: tuple[tuple[str, float], ...] = ()
    quantised: str | None = None
    parameters: int
    bytes: int
    lora: LoraFacts | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lora = self.lora
        snr = {True: ", zero terminal SNR", False: "", None: ""}[self.zero_snr]
        said = f"{PREDICTIONS[self.prediction]}{snr} ({self.said_by})" if self.prediction else ""
        unknown = "not one that kdpp knows" if self.kind in ("LoRA", "unknown") else ""
        unsaid = "" if lora or self.kind != "model" else f"not said by the file{snr}"
        lines = {
            "kind": ", with ".join(filter(None, [self.kind, " and ".join(self.parts)])),
            "architecture": f"{self.architecture} {self.variant}" if self.architecture else unknown,
            "layout": self.layout,
            "changes": lora and f"{' and '.join(lora.targets)}, {lora.layers} layers",
            "rank": lora and lora.ranks and _range(lora.ranks),
            "alpha": lora and lora.alphas and _range(lora.alphas),
            "prediction": said or unsaid,
            "guidance": "an input of the network" if self.guidance_input else "",
            "precision": ", ".join(f"{kind} {_percent(share)}" for kind, share in self.precision),
            "quantised": self.quantised,
            "size": f"{_count(self.parameters, 'B').strip()} parameters, {_count(self.bytes)}B",
        }
        shown = [f"{name:14}{text}".rstrip() for name, text in lines.items() if text]
        return "\n".join([str(self.path), *shown, *(f"{'note':14}{note}" for note in self.notes)])


def inspect(path: str | Path) -> CheckpointFacts:
    """What a safetensors file, or a folder in diffusers' layout, is.

    Only headers and small JSON files are read, so it takes no longer for a large file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a pickle, GGUF or another format; a damaged or cut-short file; a folder without
            ``model_index.json``. One sentence with the file, the key where there is one, and what
            to do.
        OSError: it could not be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return _folder(path) if path.is_dir() else _file(path)


def part_numbers(path: str | Path) -> dict[str, int]:
    """How many numbers the weights of a model's parts have: "network", "VAE", "text encoders".

    From headers; of a file or a folder, without the parts that it does not hold. A file of another
    kind (a LoRA, a VAE) is one part, "network".

    Raises as `inspect` does.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        folders = [folder for folder in sorted(path.iterdir()) if folder.name in PART_FOLDERS]
        held = [(PART_FOLDERS[folder.name], _folder_weights(folder)[0]) for folder in folders]
        if not held:
            held = [("network", _folder_weights(path)[0])]
        found = [(part, _numbers(header.entries)) for part, header in held]
    else:
        entries = read_header(path).entries
        network = network_of(entries)
        others = {
            part: {k: e for k, e in entries.items() if k.startswith(starts)}
            for part, starts in PARTS.items()
        }
        found = [(part, _numbers(own)) for part, own in {"network": network, **others}.items()]
    sums: Counter[str] = Counter()
    for part, numbers in found:
        sums[part] += numbers
    return {part: numbers for part, numbers in sums.items() if numbers}


EXPERTS = {"high": "transformer", "low": "transformer_2"}
"""Wan 2.2's networks by the noise that they are for, as diffusers names them."""


def noises_of(path: Path) -> list[str]:
    """For which of `EXPERTS` a file is, by its name: "high", "low", both or none."""
    words = r"(?<![a-z])(high|low)(?=noise|[^a-z]|$)"
    return list(dict.fromkeys(re.findall(words, path.stem.lower())))


# A file ------------------------------------------------------------------------------------------


def _file(path: Path) -> CheckpointFacts:
    header = read_header(path)
    facts = _told(path, header, path.stat().st_size)
    shard = re.search(r"-of-0*([1-9]\d*)\.safetensors$", path.name)
    if shard is None or shard[1] == "1":
        return facts
    note = f"one of the {shard[1]} files of a model: give the folder that holds them all"
    return replace(facts, notes=(note, *facts.notes))


def _told(path: Path, header: Header, size: int) -> CheckpointFacts:
    """What a header tells."""
    entries = header.entries
    facts = CheckpointFacts(
        path=path,
        kind="unknown",
        architecture=None,
        precision=_precision(entries.values()),
        quantised=_quantised(path, header),
        parameters=_numbers(entries),
        bytes=size,
    )
    if KDPP_KEY in header.metadata:
        return _kdpp_model(facts, header.metadata[KDPP_KEY])
    layers = lora_layers(entries)
    if 2 * sum(map(len, layers.values())) > len(entries):
        return _lora(facts, header, layers)
    network = network_of(entries)
    found = recognise(network)
    if found is not None:
        return _model(facts, header, network, found)
    for kind, pattern in OTHER_KINDS.items():
        if any(re.search(pattern, key) for key in entries):
            return replace(facts, kind=kind)
    return replace(facts, notes=(f"its keys are such as {min(entries)!r}",))


def _kdpp_model(facts: CheckpointFacts, card: str) -> CheckpointFacts:
    """A network that kdpp's lab trained."""
    try:
        about = json.loads(card)
        method, sampler = str(about.get("method", "")), str(about.get("sampler", ""))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{facts.path} is damaged: the card in its metadata is not a JSON table ({error})"
        ) from error
    return replace(
        facts,
        kind="kdpp model",
        architecture="kdpp",
        variant=method,
        layout="kdpp's names",
        notes=(f"made for the sampler {sampler}",) if sampler else (),
    )


def _model(
    facts: CheckpointFacts, header: Header, network: Network, found: Recognised
) -> CheckpointFacts:
    """A network of a known architecture, with or without what belongs to it."""
    prediction, said_by, notes = _prediction(found.architecture, header)
    return replace(
        facts,
        kind="model",
        architecture=found.architecture,
        variant=found.variant,
        layout=f"{found.layout} names",
        parts=tuple(p for p, starts in PARTS.items() if _begins(header.entries, starts)),
        prediction=prediction,
        said_by=said_by,
        zero_snr=True if "ztsnr" in header.entries else None,
        guidance_input=takes_guidance(network),
        parameters=_numbers(network),
        notes=notes,
    )


def _lora(facts: CheckpointFacts, header: Header, layers: Layers) -> CheckpointFacts:
    architecture = lora_architecture(layers, header.metadata)
    layout = lora_layout(layers)
    ranks = [rank for parts in layers.values() if (rank := lora_rank(parts)) is not None]
    alphas = _alphas(facts.path, header)
    targets = {lora_target(layer, architecture) for layer in layers}
    return replace(
        facts,
        kind="LoRA",
        architecture=architecture,
        layout=f"{layout} names",
        prediction="flow" if architecture in FLOWS else None,
        said_by=f"{architecture} is a flow model" if architecture in FLOWS else "",
        lora=LoraFacts(
            layout=layout,
            targets=tuple(sorted(targets, reverse=True)),
            layers=len(layers),
            ranks=(min(ranks), max(ranks)) if ranks else None,
            alphas=(min(alphas), max(alphas)) if alphas else None,
        ),
    )


def _alphas(path: Path, header: Header) -> list[float]:
    """The factors that scale the layers, read from the file: a number each."""
    keys = [
        key
        for key, entry in header.entries.items()
        if key.endswith(".alpha") and entry.numbers == 1 and entry.dtype in ALPHA_DTYPES
    ]
    with safe_open(path, framework="pt") as file:
        return [float(file.get_tensor(key).item()) for key in keys]


# Prediction ------------------------------------------------------------------------------------

PREDICTIONS: dict[Prediction, str] = {
    "epsilon": "ε",
    "v": "v",
    "x0": "x0",
    "flow": "flow velocity",
    "edm": "EDM's preconditioned x0",
}
PREDICTION_WORDS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
    "flow": "flow",
}
"""As metadata and scheduler_config.json name it."""
USUAL = {"SD 2.x": "SD 2.x of 512 pixels predicts ε as a rule, of 768 pixels v"}
UNSAID = "without a word of its author ε is the rule"


def _prediction(
    architecture: str, header: Header
) -> tuple[Prediction | None, str, tuple[str, ...]]:
    """What the network predicts, what says so, and notes; None where nothing says it."""
    if architecture in FLOWS:
        return "flow", f"{architecture} is a flow model", ()
    said: dict[str, Prediction] = {}
    if "edm_mean" in header.entries:
        said["key 'edm_mean'"] = "edm"
    for key in ("v_pred", "edm_vpred.sigma_max"):
        if key in header.entries:
            said[f"key {key!r}"] = "v"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = header.metadata.get(key, "").lower()
        if word in PREDICTION_WORDS:
            said[f"metadata {key!r}"] = PREDICTION_WORDS[word]
    if header.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        said["metadata 'modelspec.architecture'"] = "v"
    notes = []
    if "edm_vpred.sigma_max" in header.entries:
        notes.append("its levels are EDM's, not Stable Diffusion's (key 'edm_vpred.sigma_max')")
    if not said and architecture.startswith("SD"):
        notes.append(USUAL.get(architecture, UNSAID))
    prediction, said_by, more = _agreed(said)
    return prediction, said_by, (*notes, *more)


def _agreed(said: Mapping[str, Prediction]) -> tuple[Prediction | None, str, tuple[str, ...]]:
    """The prediction that all say, by what says it; where they differ, None and a note of it."""
    if len(set(said.values())) <= 1:
        return next(iter(said.values()), None), " and ".join(said), ()
    told = ", ".join(f"{PREDICTIONS[value]} by its {source}" for source, value in said.items())
    return None, " and ".join(said), (f"it contradicts itself about its prediction: {told}",)


# Precision and quantised weights ---------------------------------------------------------------

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8",
}  # fmt: skip
QUANTISED = (
    ("ComfyUI's quantised layers", r"\.comfy_quant$"),
    ("bitsandbytes NF4", r"\.quant_state\.bitsandbytes__nf4$"),
    ("bitsandbytes FP4", r"\.quant_state\.bitsandbytes__fp4$"),
    ("bitsandbytes int8", r"\.(SCB|weight_format)$"),
    ("Nunchaku's SVDQuant", r"\.(wscales|smooth_factor)$"),
    ("GPTQ or AWQ", r"\.(qweight|qzeros)$"),
    ("scaled float8", r"(\.(scale_weight|scale_input)|(^|\.)scaled_fp8)$"),
    ("scaled weights", r"\.(weight_scale(_2|_inv)?|input_scale)$"),
)
"""How weights are quantised, by a key that only such files have; of several, the first."""


def _quantised(path: Path, header: Header) -> str | None:
    for name, pattern in QUANTISED:
        for key, entry in header.entries.items():
            if re.search(pattern, key):
                how = _comfy_format(path, key, entry) if key.endswith(".comfy_quant") else ""
                return f"{name}{how} (key {key!r})"
    if "_quantization_metadata" in header.metadata:
        return "ComfyUI's quantised layers (metadata '_quantization_metadata')"
    kinds = ("F8", "F6", "F4", "I8")
    narrow = [(k, e) for k, e in header.entries.items() if e.dtype.startswith(kinds)]
    if narrow:
        key, entry = max(narrow, key=lambda one: one[1].bytes)
        return f"{DTYPES.get(entry.dtype, entry.dtype)} without scales (key {key!r})"
    return None


def _comfy_format(path: Path, key: str, entry: Entry) -> str:
    """The format that ComfyUI's marker of a layer names, a few bytes of JSON."""
    if entry.dtype != "U8" or entry.numbers > MARKER_CAP:
        return ""
    with safe_open(path, framework="pt") as file:
        marker = bytes(file.get_tensor(key).flatten().tolist())
    try:
        return f", {json.loads(marker)['format']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def _precision(entries: Iterable[Entry]) -> tuple[tuple[str, float], ...]:
    sizes: Counter[str] = Counter()
    for entry in entries:
        sizes[DTYPES.get(entry.dtype, entry.dtype)] += entry.bytes
    total = sum(sizes.values())
    return tuple((kind, size / total) for kind, size in sizes.most_common() if size)


def _begins(entries: Mapping[str, Entry], starts: tuple[str, ...]) -> bool:
    return any(key.startswith(starts) for key in entries)


def _numbers(entries: Mapping[str, Entry]) -> int:
    return sum(entry.numbers for entry in entries.values())


# A folder --------------------------------------------------------------------------------------

MODEL_INDEX = "model_index.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""A part's file, as diffusers and transformers name it."""
PART_FOLDERS = {
    "unet": "network",
    "transformer": "network",
    "transformer_2": "network",
    "vae": "VAE",
    **{f"text_encoder{end}": "text encoders" for end in ("", "_2", "_3")},
}
"""A model's parts with weights, by the folders that diffusers saves them in."""


def _folder(path: Path) -> CheckpointFacts:
    if not (path / MODEL_INDEX).is_file():
        if (path / "model.safetensors").is_file() and not (path / "config.json").exists():
            return replace(_file(path / "model.safetensors"), path=path)  # a run of kdpp's lab
        if (path / "config.json").is_file():
            raise ValueError(
                f"{path} is one part of a model, with a config.json and no {MODEL_INDEX}; give the "
                "folder above it, or the safetensors file in it"
            )
        raise ValueError(
            f"{path} has no {MODEL_INDEX}; give a folder in diffusers' layout or a safetensors file"
        )
    index = _read_json(path / MODEL_INDEX)
    parts = [k for k, v in index.items() if isinstance(v, list) and any(v)]
    name = next((name for name in ("unet", "transformer") if (path / name).is_dir()), None)
    if name is None:
        raise ValueError(f"{path} has no folder unet or transformer, whose weights kdpp samples")
    header, size = _folder_weights(path / name)
    others = [part for part in parts if part not in (name, "scheduler") and "tokenizer" not in part]
    facts = replace(_told(path, header, size), layout="diffusers folder", parts=tuple(others))
    config = path / "scheduler" / "scheduler_config.json"
    return _scheduled(facts, _read_json(config)) if config.is_file() else facts


def _scheduled(facts: CheckpointFacts, scheduler: Mapping[str, Any]) -> CheckpointFacts:
    """With what the scheduler's configuration says of the prediction."""
    said = PREDICTION_WORDS.get(str(scheduler.get("prediction_type")))
    if facts.prediction == "flow" or said is None:
        return facts
    told = {"scheduler_config.json": said}
    if facts.prediction is not None:
        told[facts.said_by] = facts.prediction
    prediction, said_by, notes = _agreed(told)
    others = tuple(note for note in facts.notes if note not in (UNSAID, *USUAL.values()))
    return replace(
        facts,
        prediction=prediction,
        said_by=said_by,
        zero_snr=scheduler.get("rescale_betas_zero_snr") is True,
        notes=(*others, *notes),
    )


def _folder_weights(folder: Path) -> tuple[Header, int]:
    """The headers of all files that a network's weights are in, as one, and their bytes."""
    shards = _shards(folder)
    headers = [(read_header(shard), shard.stat().st_size) for shard in shards]
    entries = {key: entry for header, _ in headers for key, entry in header.entries.items()}
    return Header(entries, headers[0][0].metadata), sum(size for _, size in headers)


def _shards(folder: Path) -> list[Path]:
    index = next((i for name in WEIGHTS if (i := folder / f"{name}.index.json").is_file()), None)
    if index is not None:
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ValueError(f"{index} names no files under weight_map; get it again")
        for name in sorted(set(map(str, names.values()))):
            if Path(name).name != name:
                raise ValueError(f"{index} names {name!r}, which is not a file beside it")
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing; {index.name} names it: get it again")
        return [folder / name for name in sorted(set(map(str, names.values())))]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        why = f"only the pickle {pickles[0]}; {CONVERT}" if pickles else "no safetensors file"
        raise ValueError(f"{folder} has {why}")
    return [next((folder / name for name in WEIGHTS if folder / name in found), found[0])]


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > JSON_CAP:
        raise ValueError(f"{path} has more than {JSON_CAP:,} bytes; it is not a configuration")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON ({error}); get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, it does not hold a table; get it again")
    return content


# Words -----------------------------------------------------------------------------------------


def _count(number: int, billion: str = "G") -> str:
    """1234567 as "1.23 M"."""
    for power, unit in ((12, "T"), (9, billion), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {unit}"
    return f"{number} "


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "below 1%"


def _range(ends: tuple[float, float]) -> str:
    low, high = ends
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
