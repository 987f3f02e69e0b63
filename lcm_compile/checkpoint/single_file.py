"""Opens a base that is one file in the original layout, and recognises it by its keys and shapes. No torch.

The layout is CompVis' and Stability's, which webui and ComfyUI read. The UNet's keys begin with
`model.diffusion_model.`, the VAE's with `first_stage_model.`, and the text encoders' with `cond_stage_model.`
or, in SDXL, with `conditioner.`. A file holds no settings: they are taken from its family, or from a
diffusers folder that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import Checkpoint, Component
from lcm_compile.checkpoint.diffusers_folder import Settings, read_settings
from lcm_compile.checkpoint.families import Family, detect_family
from lcm_compile.checkpoint.hub import fetch
from lcm_compile.checkpoint.weight_files import Shapes, read_header
from lcm_compile.errors import CheckpointError, first_few

UNET, VAE = "model.diffusion_model.", "first_stage_model."
# The first text encoder of SD1.x is OpenAI's CLIP, that of SD2.x is OpenCLIP's; SDXL has one of each.
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TEXT_PREFIXES = {
    CLIP: "text_encoder",
    OPEN_CLIP: "text_encoder",
    CLIP_XL: "text_encoder",
    OPEN_CLIP_XL: "text_encoder_2",
}
# Keys that training leaves in a file next to the models: averaged weights, and forms of the noise schedule.
LEFT_OVERS = re.compile(
    r"model_ema\..*|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|posterior_.*"
    r"|sqrt_(recip|recipm1)_alphas_cumprod|log_one_minus_.*|lvlb_weights|logvar|scale_factor|global_step"
    r"|denoiser\..*|v_pred|ztsnr"
)
TOKENIZER_FILES = ["tokenizer*/*.json", "tokenizer*/merges.txt"]


def open_file(base: str, path: Path, config: Path | None) -> Checkpoint:
    """Returns the checkpoint in a file, with its family's settings or those of the diffusers folder `config`.

    Raises CheckpointError if the file is no Stable Diffusion base. If it is known what the file is, the error
    says so, and how the file can be used.
    """
    refuse_pickle(path)
    shapes, metadata = read_header(path)
    refuse_others(path, shapes)
    family = detect_family(unet_shape(shapes))
    folder, settings = settings_of(path, family, config, shapes, metadata)
    prefixes = models_in(shapes)
    for name in settings.configs:
        if name not in prefixes:
            raise CheckpointError(
                f"{path} has no {name}", "give a complete checkpoint's file or folder to --base"
            )
    components = {
        name: Component(name, settings.configs[name], (path,), prefix=prefixes[name])
        for name in settings.configs
    }
    extra = unread(shapes)
    notes = (f"{path.name}: {len(extra)} keys belong to no model and are not read: {first_few(extra)}",)
    return Checkpoint(
        base,
        folder,
        family or detect_family(settings.configs["unet"]),
        components,
        settings.scheduler,
        settings.zero_negative_prompt,
        file=path,
        notes=notes if extra else (),
    )


def models_in(shapes: Shapes) -> dict[str, str]:
    """Returns the models in a file by name, each with the prefix of its keys."""
    known = {UNET: "unet", VAE: "vae", **TEXT_PREFIXES}
    return {name: prefix for prefix, name in known.items() if under(prefix, shapes)}


def unread(shapes: Shapes) -> list[str]:
    """Returns the keys that belong to no model, except those that training leaves."""
    known = tuple(models_in(shapes).values())
    return [key for key in shapes if not key.startswith(known) and not LEFT_OVERS.fullmatch(key)]


def refuse_pickle(path: Path) -> None:
    """Raises CheckpointError if a file is a pickle: whole checkpoints hold more than weights."""
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise CheckpointError(
            f"{path} is a pickle, which can run code and is never opened",
            "get it as .safetensors; or, if you trust it, let diffusers convert it: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)",
        )


def under(prefix: str, keys: Iterable[str]) -> bool:
    """Returns whether any key begins with a prefix."""
    return any(key.startswith(prefix) for key in keys)


def refuse_others(path: Path, shapes: Shapes) -> None:
    """Raises CheckpointError if a file is no text-to-image base of these architectures."""
    hint = "give a complete checkpoint's file or folder to --base"
    if any(re.search(r"lora|\.hada_|\.lokr_|\.diff(_b)?$", key) for key in shapes):
        raise CheckpointError(f"{path} is a LoRA, not a base", f"--lora {path} fuses it into a --base")
    kinds = {
        "joint_blocks.": "a Stable Diffusion 3 model",
        "double_blocks.": "a Flux model or one derived from it",
        "control_model.": "a ControlNet",
        "conditioner.embedders.0.model.": "an SDXL refiner, which draws no picture alone",
        "edm_mean": "a Playground 2.5 model, whose noise LCM's schedule does not fit",
        "down_blocks.": "a diffusers UNet without its other models",
    }
    for start, kind in kinds.items():
        if any(key.removeprefix(UNET).startswith(start) for key in shapes):
            raise CheckpointError(f"{path} is {kind}; Stable Diffusion 1, 2 and XL bases are known", hint)
    if not under(UNET, shapes):
        if under(VAE, shapes) or under("decoder.", shapes):
            raise CheckpointError(f"{path} is a VAE alone", f"--vae {path}, with a --base")
        raise CheckpointError(
            f"{path} is no Stable Diffusion checkpoint: no key begins with {UNET} "
            f"(it has {first_few([*shapes])})",
            hint,
        )
    takes = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))[1]
    if takes != 4:
        tasks = {5: "a depth-to-image model", 7: "an upscaler", 8: "an edit model", 9: "an inpainting model"}
        raise CheckpointError(
            f"{path} is {tasks.get(takes, 'for another task')}: its UNet takes {takes} channels, not 4",
            "give a text-to-image base to --base",
        )


def unet_shape(shapes: Shapes) -> dict[str, Any]:
    """Returns the settings in families' signatures that a UNet's original keys and shapes show."""
    channels: list[int] = []
    depths: list[int] = []
    for block in range(1 + max(int(key.split(".")[3]) for key in shapes if key.startswith(f"{UNET}input_"))):
        place = f"{UNET}input_blocks.{block}."
        if f"{place}0.op.weight" in shapes or block == 0:
            channels.append(0)
            depths.append(1)
        else:
            channels[-1] = shapes.get(f"{place}0.out_layers.3.weight", (0,))[0]
            depths[-1] = max(depths[-1], len(transformers(f"{place}1.", shapes)))
    widths = {shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")}
    middle = bool(transformers(f"{UNET}middle_block.1.", shapes))
    return {
        "block_out_channels": channels,
        "transformer_layers_per_block": depths,
        "cross_attention_dim": max(widths, default=0),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
    }


def transformers(place: str, shapes: Shapes) -> set[str]:
    """Returns the numbers of the transformer blocks under a prefix of the keys."""
    start = f"{place}transformer_blocks."
    return {key.removeprefix(start).split(".")[0] for key in shapes if key.startswith(start)}


def settings_of(
    path: Path, family: Family | None, config: Path | None, shapes: Shapes, metadata: Mapping[str, str]
) -> tuple[Path, Settings]:
    """Returns the folder of a file's tokenizers, and its settings.

    Raises CheckpointError if the file's family is unknown, or if its tokenizers can't be had.
    """
    if family and Path(family.base).is_absolute():
        config = config or Path(family.base)
    if config:
        return config, read_settings(config)
    if family is None:
        seen = unet_shape(shapes)
        raise CheckpointError(
            f"{path} is of no known family: its blocks are {seen['block_out_channels']} wide, "
            f"its text states {seen['cross_attention_dim']}",
            "give --config DIR, a diffusers folder of its architecture",
        )
    try:
        folder = fetch(family.base, TOKENIZER_FILES)
    except ConnectionError as error:
        raise CheckpointError(
            f"{path} is of the {family.name} family and holds no tokenizer, and that of {family.base} is not "
            f"in the hub cache and can't be downloaded: {error}",
            "check the network (or HF_HOME, HF_TOKEN), or give "
            f"--config DIR, a diffusers folder of {family.name}",
        ) from error
    return folder, family_settings(path, family, shapes, metadata)


def family_settings(path: Path, family: Family, shapes: Shapes, metadata: Mapping[str, str]) -> Settings:
    """Returns the family's settings, with what the file itself shows of its noise schedule."""
    prediction = prediction_type(path, family, shapes, metadata)
    found = {"prediction_type": prediction, "rescale_betas_zero_snr": "ztsnr" in shapes}
    models = {name: dict(config) for name, config in family.models.items()}
    if family.epsilon_sample_size and prediction == "epsilon":
        models["unet"]["sample_size"] = family.epsilon_sample_size
    return Settings(models, {**family.scheduler, **found}, "text_encoder_2" in models)


def prediction_type(path: Path, family: Family, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """Returns what the UNet of a file predicts, `epsilon` or `v_prediction`.

    The shapes do not show it. So this reads, in this order, the metadata of the SAI model spec; the key
    `v_pred`, which trainers of v-predicting SDXLs write into their files; and the family. Some SD2.x models
    predict v and others noise. For these the test is ComfyUI's: the biases of the last norm before a
    self-attention have a standard deviation above 0.09 if the UNet predicts v.
    """
    prediction = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if prediction in ("epsilon", "v"):
        return {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    if "v_pred" in shapes:
        return "v_prediction"
    if family.prediction_norm is None:
        return str(family.scheduler.get("prediction_type", "epsilon"))
    key = f"{UNET}{family.prediction_norm}"
    if key not in shapes:
        return "epsilon"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        spread = float(handle.get_tensor(key).float().std(correction=0))
    return "v_prediction" if spread > 0.09 else "epsilon"
