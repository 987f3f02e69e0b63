"""Detects what a path holds (a bundle, a checkpoint, a LoRA, …), and describes it for `inspect`."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.bundles.manifest import MANIFEST, BundleManifest, read_manifest
from lcm_compile.bundles.sizes import sizes_of
from lcm_compile.checkpoint import controlnet, single_file, t2i_adapter, weight_files
from lcm_compile.checkpoint.diffusers_folder import find_component, read_json
from lcm_compile.checkpoint.families import DEMO_STYLE, FAMILIES, detect_family
from lcm_compile.checkpoint.find import Checkpoint, Component, open_checkpoint
from lcm_compile.errors import BundleError, CheckpointError, UsageError
from lcm_compile.lora.find import LORA_FILES, find_lora, lora_digest
from lcm_compile.lora.peft_folder import CONFIG
from lcm_compile.spec import LoraSpec
from lcm_compile.system.cache import Digests
from lcm_compile.system.files import user_path

if TYPE_CHECKING:
    from lcm_compile.lora.read import Lora

# The file that a folder must hold → the kind of the folder.
FOLDERS = {
    MANIFEST: "bundle",
    "model_index.json": "checkpoint",
    **dict.fromkeys((*LORA_FILES, CONFIG), "lora"),
}
# The class in the config.json of a model's own folder → the kind of the folder.
CLASSES = {controlnet.CLASS: "ControlNet", t2i_adapter.CLASS: "T2I-Adapter"}


def describe(name: str, base: str | None, lora_skip: Sequence[str] = ()) -> dict[str, Any]:
    """Returns a description of what a name stands for; its first key is the kind.

    That is a bundle, a checkpoint, a LoRA, a ControlNet or a T2I-Adapter. `name` is a path, a LoRA's hub id
    or "demo". A LoRA is compared with the checkpoint `base`, if given, and its keys that match a pattern of
    `lora_skip` are left out. Raises BundleError, CheckpointError or LoraError if it is damaged or missing,
    and UsageError if there is a `base` or a pattern for something that is not a LoRA.
    """
    path = user_path(name)
    kind = kind_of(name, path)
    if (base is not None or lora_skip) and kind != "lora":
        option = "--lora-skip" if base is None else "--base"
        raise UsageError(f"{option} is for LoRAs; {name} is a {kind}", f"lcm-compile inspect {name}")
    if kind == "lora":
        # Imported here because they import torch, which the description of a bundle does not need.
        from lcm_compile.lora.read import check_patterns, read_lora
        from lcm_compile.lora.report import describe_lora

        lora = read_lora(find_lora(LoraSpec(name)), lora_skip)
        check_patterns([lora], lora_skip)
        report = describe_lora(lora, None if base is None else open_checkpoint(base))
        return {**report, "few_step": describe_few_step(lora, name)}
    if kind == "demo":
        return describe_demo()
    if kind == "bundle":
        return describe_bundle(path, *read_manifest(path))
    if kind in CLASSES.values():
        return describe_guide(kind, path, name)
    if kind == "checkpoint":
        return describe_checkpoint(open_checkpoint(str(path.absolute())))
    return describe_single_file(path)


def kind_of(name: str, path: Path) -> str:
    """Returns "demo", "bundle", "checkpoint", "lora", "single file" or one of CLASSES.

    Raises BundleError if it is none.
    """
    if name == "demo":
        return "demo"
    if path.is_dir():
        for file, kind in FOLDERS.items():
            if (path / file).is_file():
                return kind
        config = path / "config.json"
        if config.is_file() and (found := CLASSES.get(read_json(config).get("_class_name", ""))):
            return found
        raise BundleError(
            f"{name} is no bundle, checkpoint or LoRA: it holds none of {', '.join(FOLDERS)}",
            "give the folder that holds one, or a LoRA's file",
        )
    if not path.exists() and "/" not in name:
        raise BundleError(
            f"there is no bundle, LoRA or checkpoint at {name}", "give a path, a LoRA's hub id, or demo"
        )
    try:
        shapes, _ = weight_files.read_header(path)
    except (CheckpointError, OSError):  # a LoRA's hub id, or a file of which read_lora says what is wrong
        return "lora"
    if controlnet.is_controlnet(shapes):
        return "ControlNet"
    if t2i_adapter.is_adapter(shapes):
        return "T2I-Adapter"
    whole = single_file.FIRST in shapes and not weight_files.is_pickle(path)
    return "single file" if whole else "lora"


def describe_guide(kind: str, path: Path, name: str) -> dict[str, Any]:
    """Returns the description of a ControlNet or a T2I-Adapter, in a diffusers folder or a file.

    Raises CheckpointError if it is damaged.
    """
    adapter = kind == "T2I-Adapter"
    if path.is_dir():
        component, made = find_component(path, "control"), kind
    else:
        shapes, _ = weight_files.read_header(path)
        shown = t2i_adapter.shown_by(shapes) if adapter else controlnet.shown_by(shapes)
        component, made = Component("control", shown, (path,)), kind
        if controlnet.CONTROL_LORA in shapes:
            rank = max(shape[0] for key, shape in shapes.items() if key.endswith(".down"))
            made = f"control-LoRA of rank {rank}, which build adds to the base's UNet"
    facts = describe_component(component)
    data = {kind.lower(): str(path), "kind": made}
    if adapter:
        data |= {key: t2i_adapter.setting(component, key) for key in t2i_adapter.DEFAULTS}
    else:
        data["made_for"] = controlnet.kind_of(component.config)
    option = "--t2i-adapter" if adapter else "--controlnet"
    data |= {
        "parameters": facts["parameters"],
        "dtype": facts["dtype"],
        "build": f"{option} {shlex.quote(name)}",
    }
    return data


def describe_few_step(lora: Lora, name: str) -> dict[str, Any] | None:
    """Returns which few-step method a LoRA of that name is of, and how it is built; None if it is of none."""
    from lcm_compile.lora.few_step_method import VARIANTS, few_step_method

    digests = Digests()
    found = few_step_method(lora, lora_digest(lora.path, digests))
    digests.save()
    if found is None:
        return None
    variants = VARIANTS.get(found.method or "", ())
    option = ":".join([found.method or "METHOD", *([found.variant or "VARIANT"] if variants else [])])
    build = None if found.unsupported else f"--few-step {option} --few-step-lora {shlex.quote(name)}"
    return {**asdict(found), "variants": list(variants), "build": build}


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the description of a diffusers folder. Raises CheckpointError if a weight file is damaged."""
    height, width = checkpoint.default_size
    return {
        "checkpoint": str(checkpoint.folder),
        "family": checkpoint.family.name if checkpoint.family else None,
        "architecture": checkpoint.architecture,
        "size": {"height": height, "width": width},
        "prediction_type": checkpoint.scheduler.prediction_type,
        "scheduler": checkpoint.scheduler_config.get("_class_name"),
        "guidance_embedding": checkpoint.has_guidance_embedding,
        "components": [describe_component(component) for component in checkpoint.components.values()],
    }


def describe_component(component: Component) -> dict[str, Any]:
    """Returns a component's parameters and most common type. Raises CheckpointError if it is damaged."""
    parameters: Counter[str] = Counter()
    for path in component.weight_files:
        for shape, dtype in weight_files.read_layout(path).values():
            parameters[dtype] += math.prod(shape)
    return {
        "name": component.name,
        "parameters": sum(parameters.values()),
        "dtype": parameters.most_common(1)[0][0],
        "variant": component.variant,
    }


def describe_single_file(path: Path) -> dict[str, Any]:
    """Returns the description of a checkpoint in one file, in the original Stable Diffusion's layout.

    Raises CheckpointError if it is no text-to-image base of a known architecture.
    """
    shapes, metadata = weight_files.read_header(path)
    single_file.refuse_others(path, shapes)
    family = detect_family(single_file.unet_shape(shapes))
    types = {key: dtype for key, (_, dtype) in weight_files.read_layout(path).items()}
    components = []
    for name, prefix in single_file.models_in(shapes).items():
        own = [key for key in shapes if key.startswith(prefix)]
        components.append(
            {
                "name": name,
                "parameters": sum(math.prod(shapes[key]) for key in own),
                "dtype": Counter(types[key] for key in own).most_common(1)[0][0],
                "variant": None,
            }
        )
    extra = single_file.unread(shapes)
    return {
        "single_file": str(path),
        "layout": "a complete checkpoint in the original Stable Diffusion's layout, not a LoRA",
        "family": family.name if family else "unknown; give its settings with --config DIR",
        "prediction_type": single_file.prediction_type(path, family, shapes, metadata) if family else None,
        "keys of no model": f"{len(extra)}, such as {extra[0]}" if extra else None,
        "components": components,
    }


def describe_demo() -> dict[str, Any]:
    """Returns the description of the demo model: its checkpoint, its two LoRAs and their size in bytes."""
    checkpoint = open_checkpoint("demo")
    lora = Path(FAMILIES["demo"].lcm_lora or "")
    files = [*checkpoint.content_files().values(), lora, DEMO_STYLE]
    return {
        "checkpoint": str(checkpoint.folder),
        "lcm_lora": str(lora),
        "style_lora": str(DEMO_STYLE),
        "architecture": checkpoint.architecture,
        "size": list(checkpoint.default_size),
        "bytes": sum(path.stat().st_size for path in files),
        "sample_prompt": FAMILIES["demo"].sample_prompt,
    }


def describe_bundle(folder: Path, manifest: BundleManifest, digest: str) -> dict[str, Any]:
    """Returns the description of a bundle, from its manifest alone."""
    return {
        "bundle": str(folder),
        "digest": digest,
        "base": manifest.spec.base,
        "weights": manifest.spec.weights or "the base's own",
        "architecture": manifest.architecture,
        "target": manifest.target.name,
        "compute_capability": ", ".join(manifest.target.capabilities) or None,
        "backend": manifest.backend,
        "shape": vars(manifest.pipeline.shape),
        "sizes": sizes_of(folder, manifest),
        "prompt_tokens": manifest.spec.prompt_tokens,
        "clip_skip": manifest.spec.clip_skip or 0,
        "few_step": asdict(weights) if (weights := manifest.pipeline.few_step) else None,
        "draws_by_default": {
            name: getattr(manifest.pipeline, name) for name in ("sampler", "steps", "guidance_scale", "eta")
        },
        "lossy": dict(manifest.lossy),
        "loras": [dict(lora) for lora in manifest.loras],
        "lora_weights": {
            lora.source: f"{lora.effective}, changed by run --lora-weight {lora.source}=W"
            for lora in manifest.pipeline.loras
        },
        "lora_slots": {
            "count": slots.count,
            "rank": slots.rank,
            "filled by": "run --lora FILE:W",
        }
        if (slots := manifest.pipeline.lora_slots)
        else None,
        "embeddings": [dict(embedding) for embedding in manifest.embeddings],
        "controlnets": [vars(controlnet) for controlnet in manifest.spec.controlnets],
        "t2i_adapters": [vars(adapter) for adapter in manifest.spec.t2i_adapters],
        "ip_adapter": vars(manifest.spec.ip_adapter) if manifest.spec.ip_adapter else None,
        "stages": [
            {
                "name": stage.contract.name,
                "precision": stage.precision,
                "engine": stage.file,
                "fp32_layers": len(stage.fp32_layers),
                "quantized_layers": len(stage.quantized_layers),
                "largest_activation": stage.largest_activation,
                "torch_db": None if stage.torch_db is None else round(stage.torch_db, 2),
            }
            for stage in manifest.stages
        ],
        "fp32_layers": {s.contract.name: list(s.fp32_layers) for s in manifest.stages if s.fp32_layers},
        "parity": {name: figure.to_dict() for name, figure in manifest.parity.items()},
        "toolchain": dict(manifest.toolchain),
        "costs": {name: asdict(cost) for name, cost in manifest.costs.items()},
        "created": manifest.created,
    }
