"""Finds IP-Adapters and their image encoders, and checks that they fit the base. Needs no torch.

An IP-Adapter is a file (safetensors, or a pickle of weights) with a projection, which makes tokens of what a
CLIP image encoder says of a picture, under `image_proj.`, and with keys and values of these tokens for each
cross-attention of a UNet, under `ip_adapter.` and the attention's number. The image encoder is a folder of
transformers. In the repository h94/IP-Adapter it is `image_encoder` beside the file, or that of `models`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.controlnet import kind_of, numbers
from lcm_compile.checkpoint.diffusers_folder import (
    FULL_FIRST,
    HALF_FIRST,
    find_component,
    needed_files,
    read_json,
)
from lcm_compile.checkpoint.hub import REPOSITORY, fetch
from lcm_compile.checkpoint.weight_files import Shapes, read_header
from lcm_compile.errors import CheckpointError, UsageError, first_few
from lcm_compile.spec import LORA_SUFFIXES
from lcm_compile.system.files import user_path

if TYPE_CHECKING:
    import torch

# The components of a checkpoint that an IP-Adapter is.
IP_ENCODER, IP_PROJECTION, IP_LAYERS = IP_PARTS = ("image_encoder", "image_projection", "ip_layers")
PROJECTION, LAYERS = "image_proj.", "ip_adapter."  # what a file's keys begin with
ENCODER_FOLDER = "image_encoder"
HEAD_WIDTH = 64  # of the attention in the projection of plus adapters, whose files do not tell it
# The names of the projections' layers in files, and diffusers' names.
RENAMED = {
    "base": {r"^proj\.": "image_embeds."},
    "full": {r"^proj\.0\.": "ff.net.0.proj.", r"^proj\.2\.": "ff.net.2.", r"^proj\.3\.": "norm."},
    "plus": {
        r"^(layers\.\d+)\.0\.norm1\.": r"\1.ln0.",
        r"^(layers\.\d+)\.0\.norm2\.": r"\1.ln1.",
        r"^(layers\.\d+)\.0\.to_out\.": r"\1.attn.to_out.0.",
        r"^(layers\.\d+)\.0\.to_": r"\1.attn.to_",
        r"^(layers\.\d+)\.1\.0\.": r"\1.ff.0.",
        r"^(layers\.\d+)\.1\.1\.": r"\1.ff.1.net.0.proj.",
        r"^(layers\.\d+)\.1\.3\.": r"\1.ff.1.net.2.",
    },
}
HINT = "give an IP-Adapter's file to --ip-adapter, such as h94/IP-Adapter:models/ip-adapter_sd15.safetensors"
ENCODER_HINT = "name its image encoder: --ip-encoder DIR"


def has_ip_adapter(checkpoint: Checkpoint) -> bool:
    """Returns whether a checkpoint has an IP-Adapter."""
    return IP_LAYERS in checkpoint.components


def image_size(checkpoint: Checkpoint) -> int:
    """Returns the side in pixels of the pictures that the image encoder reads."""
    return int(checkpoint.components[IP_ENCODER].config.get("image_size", 224))


def reads_hidden_states(checkpoint: Checkpoint) -> bool:
    """Returns whether an IP-Adapter reads the encoder's second to last hidden states, not its embedding."""
    return bool(checkpoint.components[IP_PROJECTION].config["kind"] != "base")


def tokens_shape(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Returns the shape (1, n, d) of a picture's tokens."""
    config = checkpoint.components[IP_PROJECTION].config
    if config["kind"] == "full":  # a token for each part of the picture, and one for all
        encoder = checkpoint.components[IP_ENCODER].config
        return 1, 1 + (image_size(checkpoint) // int(encoder.get("patch_size", 32))) ** 2, config["width"]
    return 1, config["tokens"], config["width"]


def with_ip_adapter(checkpoint: Checkpoint, source: str, encoder: str | None, half: bool) -> Checkpoint:
    """Returns the checkpoint with an IP-Adapter as its components IP_PARTS.

    `source` is a file, a folder with one file, or `OWNER/NAME[:FILE]` on the hub, and `encoder` the folder of
    the image encoder or `OWNER/NAME[:FOLDER]`, or None for the one beside the file. With `half`, fp16 weights
    of the encoder are preferred on the hub. Raises UsageError if there is none of this name, and
    CheckpointError if it can't be downloaded or read, or if it does not fit the base.
    """
    path = find_file(source)
    shapes, _ = read_header(path)
    projection = Component(IP_PROJECTION, projection_config(path, shapes), (path,), prefix=PROJECTION)
    layers = Component(IP_LAYERS, layers_config(path, shapes), (path,), prefix=LAYERS)
    reads, gives = checkpoint.unet["cross_attention_dim"], projection.config["width"]
    if reads != gives:
        raise CheckpointError(
            f"the IP-Adapter {source} makes tokens of width {gives}, and the UNet of {checkpoint.base}, "
            f"{kind_of(checkpoint.unet)}, reads tokens of width {reads}",
            "give an IP-Adapter made for this base to --ip-adapter",
        )
    if encoder is None:
        folder = encoder_beside(source, path, projection, half)
    else:
        folder = find_encoder(encoder, half)
    variants = HALF_FIRST if half and is_on_hub(encoder or source) else FULL_FIRST
    found = find_component(folder, IP_ENCODER, variants)
    if (missing := why_unfit(found.config, projection.config)) is not None:
        raise CheckpointError(
            f"the IP-Adapter {source} does not fit the image encoder {folder}: {missing}", ENCODER_HINT
        )
    parts = {part.name: part for part in (found, projection, layers)}
    return replace(checkpoint, components={**checkpoint.components, **parts})


# ---- the adapter's file ----


def find_file(source: str) -> Path:
    """Returns the file of an IP-Adapter. Raises UsageError or CheckpointError as `with_ip_adapter` does."""
    path = user_path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return only_file(path, source)
    if not is_on_hub(source):
        raise UsageError(f"--ip-adapter {source} does not exist", HINT)
    repository, _, file = source.partition(":")
    folder = fetched(repository, [file] if file else adapter_files, f"the IP-Adapter {source}")
    if not file:
        return only_file(folder, source)
    if not (folder / file).is_file():
        raise CheckpointError(
            f"{repository} has no {file} on the hub",
            f"https://huggingface.co/{repository}/tree/main lists its files",
        )
    return folder / file


def is_on_hub(source: str) -> bool:
    """Returns whether a source is `OWNER/NAME[:PATH]` on the hub, and no path on this machine."""
    repository = source.partition(":")[0]
    return bool(
        re.fullmatch(REPOSITORY, repository)
        and not repository.endswith(LORA_SUFFIXES)
        and not user_path(source).exists()
        and not user_path(repository).exists()
    )


def fetched(repository: str, files: Any, what: str) -> Path:
    """Returns a hub repository's folder with some files. Raises CheckpointError if it can't be had."""
    try:
        return fetch(repository, files)
    except ConnectionError as error:
        raise CheckpointError(
            f"{what} is neither a path nor in the hub cache, and can't be downloaded: {error}",
            "check the path or the hub id, and the network (or HF_HOME, HF_TOKEN)",
        ) from error


def adapter_files(names: Sequence[str]) -> list[str]:
    """Returns the files of weights in the root of a hub repository, if it has one alone."""
    found = [name for name in names if "/" not in name and name.endswith(LORA_SUFFIXES)]
    return found if len(found) == 1 else []


def only_file(folder: Path, source: str) -> Path:
    """Returns the only file of weights in a folder. Raises UsageError unless there is exactly one."""
    found = sorted(path for path in folder.iterdir() if path.suffix in LORA_SUFFIXES)
    if len(found) == 1:
        return found[0]
    names = f"{len(found)} files ({first_few([path.name for path in found])})" if found else "no file"
    raise UsageError(f"--ip-adapter {source} has {names} of weights: name one", HINT)


def projection_config(path: Path, shapes: Shapes) -> dict[str, Any]:
    """Returns what a file's shapes tell of its projection.

    Its `kind` is base, full or plus; `reads` is the width of what it reads, `tokens` and `width` are the
    number and width of its tokens. Raises CheckpointError if the file has none, or one that is not built.
    """
    own = {key.removeprefix(PROJECTION): shape for key, shape in shapes.items() if key.startswith(PROJECTION)}
    if "perceiver_resampler.proj_in.weight" in own or {"norm.weight", "proj.0.weight"} <= own.keys():
        raise CheckpointError(
            f"{path} is a FaceID IP-Adapter, which reads what insightface says of a face, and is not built",
            "take a face adapter that reads the picture itself, such as ip-adapter-plus-face_sd15",
        )
    try:
        if "proj.weight" in own:
            width = own["norm.weight"][0]
            joined, reads = own["proj.weight"]
            return {"kind": "base", "reads": reads, "tokens": joined // width, "width": width}
        if "proj.3.weight" in own:
            return {"kind": "full", "reads": own["proj.0.weight"][0], "width": own["proj.3.weight"][0]}
        if "latents" in own:
            _, tokens, inner = own["latents"]
            query = own.get("layers.0.0.to_q.weight") or own["layers.0.attn.to_q.weight"]
            return {
                "kind": "plus",
                "reads": own["proj_in.weight"][1],
                "tokens": tokens,
                "width": own["proj_out.weight"][0],
                "inner": inner,
                "depth": len(numbers(r"layers\.(\d+)\..*", own)),
                "heads": query[0] // HEAD_WIDTH,
            }
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} lacks a part of its projection: {error}", HINT) from error
    raise CheckpointError(
        f"{path} is no IP-Adapter: it has neither {PROJECTION}proj.weight nor {PROJECTION}latents "
        f"(it has {first_few([*shapes])})",
        HINT,
    )


def layers_config(path: Path, shapes: Shapes) -> dict[str, Any]:
    """Returns the `layers` of a file: the shape (out, in) of the keys' layer by the attention's number.

    Raises CheckpointError if there are none, or others, as the LoRA of a FaceID adapter.
    """
    found = {}
    for key, shape in shapes.items():
        if not key.startswith(LAYERS):
            continue
        match = re.fullmatch(r"(\d+)\.to_([kv])_ip\.weight", key.removeprefix(LAYERS))
        if match is None or len(shape) != 2:
            raise CheckpointError(f"{path} has {key}, which no IP-Adapter for these bases has", HINT)
        if match[2] == "k":
            found[match[1]] = list(shape)
    if not found:
        raise CheckpointError(f"{path} is no IP-Adapter: it has no {LAYERS}1.to_k_ip.weight", HINT)
    return {"layers": found}


# ---- the image encoder ----


def encoder_beside(source: str, path: Path, projection: Component, half: bool) -> Path:
    """Returns the folder of the first image encoder beside an adapter's file that fits it.

    On the hub its weights are downloaded when it is known to fit. Raises CheckpointError if there is none.
    """
    repository, _, file = source.partition(":")
    on_hub = is_on_hub(source)
    root = path.parents[file.count("/")] if on_hub else Path()
    places = encoder_places(path.parent.relative_to(root) if on_hub else path.parent)
    configs = [f"{place.as_posix()}/config.json" for place in places]
    if on_hub:
        fetched(repository, configs, f"the image encoder of {source}")
    unfit = {}
    for place, config in zip(places, configs, strict=True):
        if (root / config).is_file():
            unfit[place] = why_unfit(read_json(root / config), projection.config)
            if unfit[place] is None:
                return find_encoder(f"{repository}:{place.as_posix()}", half) if on_hub else root / place
    reasons = "; ".join(f"{place}: {why}" for place, why in unfit.items())
    looked = ", ".join(map(str, places))
    raise CheckpointError(
        f"the IP-Adapter {source} has no image encoder: "
        + (f"none of those beside it fits: {reasons}" if reasons else f"there is none in {looked}"),
        ENCODER_HINT,
    )


def encoder_places(folder: Path) -> list[Path]:
    """Returns where the image encoder of an adapter in a folder may be."""
    parent = folder.parent
    places = (folder, parent / "models", parent)
    return list(dict.fromkeys(place / ENCODER_FOLDER for place in places))


def find_encoder(source: str, half: bool) -> Path:
    """Returns the folder of an image encoder: a path, or `OWNER/NAME[:FOLDER]` on the hub.

    Raises UsageError if it is neither, and CheckpointError if it can't be downloaded.
    """
    path = user_path(source)
    if path.is_dir():
        return path
    if not is_on_hub(source):
        raise UsageError(
            f"--ip-encoder {source} is no folder", "give transformers' folder of a CLIP image encoder"
        )
    repository, _, place = source.partition(":")
    variants = HALF_FIRST if half else FULL_FIRST

    def wanted(names: Iterable[str]) -> list[str]:
        return [name for name in needed_files(names, variants, (place,)) if name.startswith(place)]

    return fetched(repository, wanted, f"the image encoder {source}") / place


def why_unfit(encoder: Mapping[str, Any], projection: Mapping[str, Any]) -> str | None:
    """Returns why a projection can't read what an image encoder gives, by their configs, or None."""
    key = "projection_dim" if projection["kind"] == "base" else "hidden_size"
    gives = encoder.get(key)
    if gives == projection["reads"]:
        return None
    return f"it gives {gives} numbers ({key}), and {projection['reads']} are read"


# ---- modules and weights ----


def projection_of(config: Mapping[str, Any]) -> Any:
    """Returns a new projection of a config, of diffusers' class."""
    from diffusers.models import embeddings

    if config["kind"] == "base":
        return embeddings.ImageProjection(config["reads"], config["width"], config["tokens"])
    if config["kind"] == "full":
        return embeddings.IPAdapterFullImageProjection(config["reads"], config["width"])
    return embeddings.IPAdapterPlusImageProjection(
        embed_dims=config["reads"],
        output_dims=config["width"],
        hidden_dims=config["inner"],
        depth=config["depth"],
        dim_head=HEAD_WIDTH,
        heads=config["heads"],
        num_queries=config["tokens"],
    )


def layers_of(config: Mapping[str, Any]) -> Any:
    """Returns the new layers of a config: a pair for each attention's number."""
    from torch import nn

    def pair(out: int, width: int) -> nn.ModuleDict:
        return nn.ModuleDict({f"to_{one}_ip": nn.Linear(width, out, bias=False) for one in "kv"})

    return nn.ModuleDict({number: pair(*shape) for number, shape in config["layers"].items()})


def ip_weights(component: Component, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a projection or of the layers under the names of their module."""
    bare = {key.removeprefix(component.prefix): tensor for key, tensor in tensors.items()}
    found: dict[str, torch.Tensor] = {}
    for key, tensor in bare.items():
        for pattern, name in RENAMED.get(component.config.get("kind", ""), {}).items():
            key = re.sub(pattern, name, key)
        if ".to_kv." in key:
            found[key.replace("to_kv", "to_k")], found[key.replace("to_kv", "to_v")] = tensor.chunk(2)
        else:
            found[key] = tensor
    return found
