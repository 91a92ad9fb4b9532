"""From a path to a loaded pipeline of diffusers: a folder, a single file, a network alone.

Networks, text encoders and the conversion of names are diffusers'. What happens here: the file's
header is compared with the networks that it should fill, on torch's meta device, before any weight
is read; a single file's numbers and tokenizer come from `kdpp.checkpoints.configs`. Nothing is
asked of the network, and no pickle is opened.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdpp.checkpoints.architectures import CONTEXT, FLOWS, NETWORK_PREFIXES
from kdpp.checkpoints.configs import CONFIGS, Config, TextEncoder, write_folder
from kdpp.checkpoints.files import EXPERTS, NOT_READ, PARTS, CheckpointFacts, inspect, noises_of
from kdpp.checkpoints.headers import CONVERT, PICKLES, Entry, read_header
from kdpp.checkpoints.networks import ARCHITECTURES
from kdpp.checkpoints.origins import Origins, named, origins_of
from kdpp.checkpoints.pipelines import FAMILIES

__all__ = ["draws_videos", "is_pipeline", "load_pipeline"]

Tensors = dict[str, Tensor]
INDEX = "model_index.json"
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
"""What `inspect` says, as diffusers' schedulers say it."""
UNET_PREFIX = NETWORK_PREFIXES[0]
UNET = "UNet2DConditionModel"
GUIDANCE = ("time_embed.cond_proj.weight", "time_embedding.cond_proj.weight")
"""Of a UNet that takes the CFG scale as an input: the original name, which diffusers' conversion
does not know, and diffusers'."""
UNUSED = r"norm_final\.weight$|norm_added_q\.weight$"
"""Tensors that published files of Z-Image and Wan have and nothing reads."""

LATENTS = (
    "latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
)  # fmt: skip
"""What a VAE's configuration says of the latents that it takes."""


def is_pipeline(path: str | Path) -> bool:
    """Whether `load_pipeline` is the one to load it, and not the lab's
    `kdpp.lab.models.load_model`."""
    path = Path(path)
    if path.is_dir():
        return (path / INDEX).is_file()
    return path.is_file() and inspect(path).kind != "kdpp model"


def draws_videos(path: str | Path) -> bool:
    """Whether the model at the path makes videos, by its header."""
    return inspect(path).architecture == "Wan"


def load_pipeline(
    path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    without: Iterable[str] = (),
    *,
    components: str | Path | None = None,
    prediction: str | None = None,
    vae: str | Path | None = None,
    configs: Mapping[str, Config] = CONFIGS,
) -> Any:
    """A pipeline of diffusers with the weights at ``path``, without a network and without pickles.

    Args:
        path: a folder as diffusers saves it; a safetensors file of SD 1.x or SDXL in the original
            layout; or a file with a UNet or transformer alone, in the original names or diffusers'.
        dtype: of all weights, or its name.
        device: where they lie.
        without: names of components that are left out (None in the pipeline).
        components: a folder or file of the same architecture that gives what the file at ``path``
            does not hold. Of Wan 2.2's two experts the file stands for the one for high or for low
            noise, as its name says.
        prediction: what a UNet predicts, "epsilon", "v" or "x0". None: what the file says, else the
            scheduler of the folder; where none does, ε, with a remark on stderr.
        vae: another VAE in the place of the model's: a safetensors file in the original names or
            diffusers', or a folder that diffusers saved. A file has the settings of the model's.
        configs: the numbers of the architectures that can be a single file.

    A single file's scheduler is an ``EulerDiscreteScheduler`` with Stable Diffusion's betas, at
    trailing timesteps, with zero terminal SNR if the file says so. That of a file whose UNet has
    the guidance as an input is an ``LCMScheduler``.

    Raises:
        ImportError: diffusers, transformers or (for a single file) clip-anytorch is missing.
        FileNotFoundError: there is nothing at the path.
        ValueError: it is not what this function loads, or its tensors do not have the names and
            shapes of its architecture. One sentence with the file and the key, before any weight
            is read.
    """
    _diffusers()
    path = Path(path)
    given: dict[str, Any] = dict.fromkeys([*without, "vae"] if vae is not None else without)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    facts = _usable(path)
    missing = [] if path.is_dir() else _missing(facts, configs, given)
    if missing and components is None:
        raise ValueError(_lacking(facts, missing, configs))
    if components is not None and not missing:
        raise ValueError(f"{path} holds all that is needed; leave components ({components}) out")
    rest = facts if components is None else _usable(Path(components))
    if rest.architecture != facts.architecture:
        raise ValueError(
            f"{path} is {facts.architecture} and {components} is {rest.architecture}; the rest "
            "must come from a model of the same architecture"
        )
    changes = _schedule(facts, rest, prediction)
    if vae is not None:
        given["vae"] = _load_vae(Path(vae), _vae_config(rest, configs), dtype)
    if rest.path.is_dir():
        pipe = _from_folder(facts, rest, dtype, given)
    else:
        pipe = _from_file(facts, rest, dtype, given, configs)
    if changes:
        kind = type(pipe.scheduler)
        if facts.guidance_input and not path.is_dir():
            kind = _diffusers().LCMScheduler
        elif not changes.keys() <= set(pipe.scheduler.config):
            kind = _diffusers().EulerDiscreteScheduler
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    pipe.set_progress_bar_config(disable=True)
    # It lies on the CPU, and `to` would warn of float16 there, which is where it may only wait.
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)


def _diffusers() -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError('pipelines need diffusers: pip install "kdpp[diffusers]"') from error
    return diffusers


def _as(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype under diffusers' name for it, which 0.42 has changed."""
    new = tuple(map(int, _diffusers().__version__.split(".")[:2])) >= (0, 42)
    return {"dtype" if new else "torch_dtype": dtype}


# What can be loaded -------------------------------------------------------------------------------


def _usable(path: Path) -> CheckpointFacts:
    """What is at the path; ValueError for what no pipeline can be made of."""
    facts = inspect(path)
    if facts.kind == "LoRA":
        base = f" for {facts.architecture}" if facts.architecture else ""
        raise ValueError(
            f"{path} is a LoRA{base}, not a model; give the model that it changes, and this file "
            "as its LoRA"
        )
    if facts.kind != "model" and not (path / INDEX).is_file():
        kind = NOT_READ.get(facts.kind, f"a {facts.kind}")
        notes = f" ({'; '.join(facts.notes)})" if facts.notes else ""
        raise ValueError(f"{path} is {kind}{notes}; give a model that draws prompts")
    if facts.quantised:
        raise ValueError(
            f"{path} is quantised: {facts.quantised}; kdpp reads float16, bfloat16 and float32"
        )
    if facts.variant and facts.architecture in CONTEXT.values():
        raise ValueError(
            f"{path} is {facts.architecture} ({facts.variant}): it wants a picture or a mask "
            "beside the latent; give the model for text to image"
        )
    return facts


def _missing(
    facts: CheckpointFacts, configs: Mapping[str, Config], left_out: Collection[str]
) -> list[str]:
    """What a pipeline needs and neither the file nor kdpp's table holds."""
    config = configs.get(facts.architecture or "")
    if config is None:
        return ["VAE", "text encoders"]
    needed = {"VAE": ["vae"], "text encoders": list(_texts(config))}
    return [
        part
        for part, names in needed.items()
        if part not in facts.parts and not all(name in left_out for name in names)
    ]


def _lacking(facts: CheckpointFacts, missing: list[str], configs: Mapping[str, Config]) -> str:
    """Why a file is not enough."""
    if facts.architecture not in configs and facts.parts:
        return (
            f"{facts.path} is a single file of {facts.architecture}; kdpp reads those of "
            f"{' and '.join(configs)}: give it as a diffusers folder"
        )
    return (
        f"{facts.path} is {facts.architecture} without {' and '.join(missing)}; name a model of "
        "the same architecture that has them "
        "(components=, --components), or give it as a diffusers folder"
    )


def _texts(config: Config) -> dict[str, TextEncoder]:
    """The text encoders by the pipeline's names for them."""
    return dict(zip(("text_encoder", "text_encoder_2"), config.texts))


# What a UNet predicts -----------------------------------------------------------------------------


def _schedule(
    facts: CheckpointFacts, rest: CheckpointFacts, prediction: str | None
) -> dict[str, Any]:
    """What the scheduler must say and does not: the prediction, and zero terminal SNR."""
    path = facts.path
    if facts.architecture in FLOWS:
        if prediction is not None:
            raise ValueError(f"{path} is a flow model; it takes no prediction ({prediction!r})")
        return {}
    if prediction is not None and prediction not in PREDICTIONS:
        raise ValueError(
            f"prediction is {prediction!r}; it must be one of {', '.join(PREDICTIONS)}"
        )
    if "edm" in facts.said_by or facts.prediction == "edm":
        raise ValueError(f"{path} has EDM's levels ({facts.said_by}), which no scheduler here has")
    said = prediction or facts.prediction
    if said is None and facts.said_by:
        raise ValueError(f"{path} contradicts itself about what it predicts ({facts.said_by}); "
                         "say it (prediction=, --prediction)")  # fmt: skip
    if said is None and path.is_dir():
        return {}
    if said is None:
        said = rest.prediction or "epsilon"
        source = f", as the scheduler of {rest.path} says" if rest.prediction else ""
        print(
            f"{path} does not say what it predicts; it is taken for {said}{source} "
            "(prediction=, --prediction)",
            file=sys.stderr,
        )
    snr = {"rescale_betas_zero_snr": True} if facts.zero_snr else {}
    return {"prediction_type": PREDICTIONS[said], **snr}


# Loading ------------------------------------------------------------------------------------------


def _from_folder(
    facts: CheckpointFacts, rest: CheckpointFacts, dtype: torch.dtype, given: Mapping[str, Any]
) -> Any:
    """The pipeline in the folder ``rest``, or with the network of the file ``facts``.

    ``given`` are parts that are not loaded from there, by name; None: they are left out.
    """
    index = json.loads((rest.path / INDEX).read_text(encoding="utf-8"))
    given = {name: part for name, part in given.items() if name in index}
    kind = _check_folder(rest.path, given)
    if facts is not rest:
        name = _replaced(facts.path, rest.path)
        given[name] = _load_network(facts, rest.path / name, dtype)
    if kind == "StableDiffusionPipeline" and "safety_checker" in given:
        given["requires_safety_checker"] = False  # or diffusers warns that it is left out
    # By its own class: DiffusionPipeline.from_pretrained would not heed a network given for Wan.
    load = getattr(_diffusers(), kind).from_pretrained
    return load(str(rest.path), local_files_only=True, use_safetensors=True, **_as(dtype), **given)


def _replaced(path: Path, folder: Path) -> str:
    """Which network of the folder's pipeline the one in the file stands for; ValueError for one of
    two experts that does not say which."""
    if not (folder / "transformer_2").is_dir():
        return "unet" if (folder / "unet").is_dir() else "transformer"
    said = noises_of(path)
    if len(said) != 1:
        raise ValueError(
            f"{folder} has two experts, for high and for low noise, and the name of {path} does "
            f"not say which of them it is; put {' or '.join(EXPERTS)} into it"
        )
    other = (EXPERTS.keys() - said).pop()
    print(f"{path} is the expert for {said[0]} noise; the one for {other} noise is that of "
          f"{folder}", file=sys.stderr)  # fmt: skip
    return EXPERTS[said[0]]


def _from_file(
    facts: CheckpointFacts, rest: CheckpointFacts, dtype: torch.dtype,
    given: Mapping[str, Any], configs: Mapping[str, Config],
) -> Any:  # fmt: skip
    """The network of the file ``facts``, and the rest of the file ``rest``, often the same.

    ``given`` as in `_from_folder`.
    """
    config = configs[rest.architecture or ""]
    if missing := _missing(rest, configs, given):
        raise ValueError(_lacking(rest, missing, configs))
    texts = _texts(config)
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in texts]
    parts = [name for name in ("vae", *texts, *tokenizers) if name not in given]
    given = {k: part for k, part in given.items() if k in ("vae", *texts, *tokenizers)}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(config, folder, ["unet", *parts])
        _check_others(rest, folder, {k: v for k, v in texts.items() if k in parts}, "vae" in parts)
        given["unet"] = _load_network(facts, folder / "unet", dtype)
        load = getattr(_diffusers(), config.pipeline).from_single_file
        return load(str(rest.path), config=name, local_files_only=True, **_as(dtype), **given)


def _check_folder(path: Path, left_out: Collection[str]) -> str:
    """The pipeline's class; ValueError for one that kdpp does not know, for code that is not
    diffusers', and for pickles."""
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    kind = str(index.get("_class_name"))
    if kind not in FAMILIES:
        raise ValueError(
            f"{path} is a pipeline that kdpp does not know, {kind}; it knows {', '.join(FAMILIES)}"
        )
    for name, value in index.items():
        if (
            not (isinstance(value, list) and value and isinstance(value[0], str))
            or name in left_out
        ):
            continue  # a setting, or left out
        if value[0] not in ("diffusers", "transformers", "stable_diffusion"):
            raise ValueError(
                f"{path / INDEX} takes {name!r} from {value[0]!r}; kdpp runs no code but that of "
                "diffusers and transformers"
            )
        folder = path / name
        kinds = {file.suffix for file in folder.iterdir()} if folder.is_dir() else set()
        if kinds & PICKLES and ".safetensors" not in kinds:
            raise ValueError(f"{folder} has only a pickle; {CONVERT}")
    return kind


def _load_network(facts: CheckpointFacts, folder: Path, dtype: torch.dtype) -> Any:
    """The network in a file, whose configuration is in the folder."""
    path = facts.path
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = about.get("_class_name")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder} is of a network that kdpp does not know, {kind}")
    made = getattr(_diffusers(), kind)
    header = read_header(path).entries
    inputs = [e.shape[-1] for k, e in header.items() if k.endswith(GUIDANCE) and e.shape]
    changes = {"time_cond_proj_dim": inputs[0]} if inputs and made.__name__ == UNET else {}
    network = _blank(made, {**about, **changes})
    meta = _meta(header)
    found = _renamed(facts, network, meta)
    _check(facts, folder.name, network, found)
    _check_surplus(facts, network, found, found if made.__name__ == UNET else _own(meta))
    state = _renamed(facts, network, load_file(path))
    state = {name: state[name] for name in network.state_dict()}
    return made.from_single_file(
        state, config=str(folder), local_files_only=True, **_as(dtype), **changes
    )


def _vae_config(rest: CheckpointFacts, configs: Mapping[str, Config]) -> Mapping[str, Any]:
    """The configuration of the model's own VAE."""
    if rest.path.is_dir():
        return _read_config(rest.path / "vae")
    return {"_class_name": "AutoencoderKL", **configs[rest.architecture or ""].vae}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give a folder that diffusers saved")
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return about


def _load_vae(path: Path, own: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A VAE in the place of a model's own, which has the configuration ``own``.

    ValueError unless it is of the same class, and has latents of the same channels and scale.
    """
    folder = path / "vae" if (path / INDEX).is_file() else path
    about = _read_config(folder) if path.is_dir() else dict(own)
    made = getattr(_diffusers(), str(own.get("_class_name")), None)
    if made is None or about.get("_class_name") != own.get("_class_name"):
        raise ValueError(
            f"{path} is a {about.get('_class_name')}, and the model's VAE a "
            f"{own.get('_class_name')}; give one of the same class"
        )
    wanted, network = _blank(made, own), _blank(made, about)
    for name in LATENTS:
        one, other = network.config.get(name), wanted.config.get(name)
        if one != other:
            raise ValueError(
                f"{path} does not fit the model's latents: its {name} is {one}, and that of the "
                f"model's own VAE {other}"
            )
    if path.is_dir():
        return made.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, **_as(dtype)
        )
    return _vae_of_file(path, network, about, dtype)


def _vae_of_file(path: Path, network: Any, about: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A VAE of the configuration ``about``, whose empty network is given, of a file."""
    facts = inspect(path)
    meta = _meta(read_header(path).entries)
    prefix = next((p for p in PARTS["VAE"] if any(key.startswith(p) for key in meta)), "")

    def renamed(tensors: Mapping[str, Tensor]) -> Tensors:
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if any(key.startswith("decoder.mid_block.") for key in own):  # diffusers' names
            return own
        return _convert(facts, network, own)

    _check(replace(facts, architecture="the model's VAE"), "VAE", network, renamed(meta))
    state = renamed(load_file(path))
    with TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(about), encoding="utf-8")
        return type(network).from_single_file(
            {key: state[key] for key in network.state_dict()}, config=name, local_files_only=True,
            **_as(dtype),
        )  # fmt: skip


def _own(tensors: Mapping[str, Tensor]) -> Tensors:
    """The network's tensors of a file's, without the prefix of their names."""
    prefix = next((p for p in NETWORK_PREFIXES if any(k.startswith(p) for k in tensors)), "")
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _renamed(facts: CheckpointFacts, network: Any, tensors: Mapping[str, Tensor]) -> Tensors:
    """A network's tensors from a file's, under diffusers' names."""
    own = _own(tensors)
    if facts.layout == "diffusers names":
        return own
    if type(network).__name__ != UNET:
        return _convert(facts, network, own)
    found = _convert(facts, network, {UNET_PREFIX + key: v for key, v in own.items()})
    original, renamed = GUIDANCE
    return {**found, renamed: own[original]} if original in own else found


# A file against its networks ----------------------------------------------------------------------


def _check_others(
    facts: CheckpointFacts, folder: Path, texts: Mapping[str, TextEncoder], vae: bool
) -> None:
    """ValueError unless a single file has its VAE's and text encoders' tensors."""
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils

    convert: Any = single_file_utils
    meta = _meta(read_header(facts.path).entries)
    if vae:
        about = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        network = _blank(diffusers.AutoencoderKL, about)
        _check(facts, "VAE", network, _convert(facts, network, meta))
    for name, text in texts.items():
        with torch.device("meta"):
            made = getattr(transformers, text.kind)
            network = made(transformers.CLIPTextConfig(**text.settings))
        own = {key: tensor for key, tensor in meta.items() if key.startswith(text.prefix)}
        if text.prefix.endswith("transformer."):
            found = _traced(facts, own, convert.convert_ldm_clip_checkpoint)
        else:
            found = _traced(
                facts, own, partial(convert.convert_open_clip_checkpoint, network,
                                    prefix=text.prefix)
            )  # fmt: skip
        if not hasattr(network, "text_model"):
            found = {key.removeprefix("text_model."): value for key, value in found.items()}
        _check(facts, name, network, found)


def _blank(made: Any, about: Mapping[str, Any]) -> Any:
    """A network without weights."""
    with torch.device("meta"):
        return made.from_config(about)


def _origin(tensor: Any) -> str:
    """The file's name of a tensor of `_meta`, or of the first of which it was made; "": of none."""
    return next(iter(origins_of(tensor)), "")


def _meta(entries: Mapping[str, Entry]) -> Tensors:
    """A header's tensors, without their numbers; each knows its name."""
    return {k: named(torch.empty(e.shape, device="meta"), k) for k, e in entries.items()}


def _convert(facts: CheckpointFacts, network: Any, tensors: Tensors) -> Tensors:
    """Tensors with original names under diffusers' names, by diffusers' own conversion."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    table: Any = SINGLE_FILE_LOADABLE_CLASSES
    kind = type(network).__name__
    if kind not in table:
        raise ValueError(
            f"{facts.path} has the names {min(tensors)!r} and so on, which diffusers does not "
            f"convert for a {kind}; give a file with diffusers' names"
        )
    convert = partial(table[kind]["checkpoint_mapping_fn"], config=dict(network.config))
    return _traced(facts, tensors, lambda own: convert(checkpoint=own))


def _traced(facts: CheckpointFacts, tensors: Tensors, convert: Callable[[Tensors], Any]) -> Tensors:
    """What diffusers' conversion makes of tensors; ValueError with the key that it stumbles on."""
    origins = Origins()
    try:
        with origins:
            return dict(convert(dict(tensors)))
    except KeyError as error:
        unknown = [key for key in tensors if f".{error.args[0]}." in f".{key}"]
        if unknown:  # diffusers' table of names lacks it, and not the file
            raise ValueError(_surplus(facts, _origin(tensors[unknown[0]]) or unknown[0])) from error
        some, tensor = next(iter(tensors.items()))
        prefix = _origin(tensor).removesuffix(some)
        raise ValueError(
            f"{facts.path} has no tensor '{prefix}{error.args[0]}'; get it again"
        ) from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{facts.path}: {origins.last!r} does not have the shape that diffusers' conversion "
            f"divides ({' '.join(str(error).split())}); get it again, or in diffusers' names"
        ) from error


def _surplus(facts: CheckpointFacts, key: str) -> str:
    return (
        f"{facts.path} holds {key!r}, which the {facts.architecture} of this configuration does "
        "not have; give components of the same variant"
    )


def _check(facts: CheckpointFacts, part: str, network: nn.Module, found: Tensors) -> None:
    """ValueError unless the tensors are those of the network, by name and by shape."""
    weights = network.state_dict()
    for key, wanted in weights.items():
        tensor = found.get(key)
        if tensor is None:
            raise ValueError(
                f"{facts.path} lacks {_lacked(key, found)} of its {part}; it is not a whole "
                f"{facts.architecture}"
            )
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{facts.path}: {_origin(tensor) or key!r} of its {part} has the shape "
                f"{list(tensor.shape)}, and {facts.architecture} has {list(wanted.shape)}"
            )


def _check_surplus(
    facts: CheckpointFacts, network: nn.Module, found: Tensors, held: Tensors
) -> None:
    """ValueError if the network has no place for one of the tensors ``held``."""
    weights = network.state_dict()
    used = {_origin(tensor) for key, tensor in found.items() if key in weights}
    names = {_origin(tensor) for tensor in held.values()} - used
    if more := sorted(name for name in names if not re.search(UNUSED, name)):
        raise ValueError(_surplus(facts, more[0]))


def _lacked(key: str, found: Tensors) -> str:
    """A tensor that a file lacks, in the file's names where these show in another tensor: the
    layer's bias for its weight, or the same of another block."""
    for part in (re.search("(weight|bias)$", key), re.search(r"(?<=\.)(\d+)(?=\.)", key)):
        if part is None:
            continue
        before, after = re.escape(key[: part.start()]), re.escape(key[part.end() :])
        for other, tensor in found.items():
            same = re.fullmatch(rf"{before}(\w+){after}", other)
            if same and (origin := _origin(tensor)):
                return repr(re.sub(rf"\b{same[1]}\b", part[0], origin, count=1))
    return f"{key!r} (diffusers' name)"
