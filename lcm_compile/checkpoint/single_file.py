"""Opens a base that is one file in the original layout, and recognises it by its keys and shapes. No torch.

The layout is CompVis' and Stability's, which webui and ComfyUI read. The UNet's keys begin with
`model.diffusion_model.`, the VAE's with `first_stage_model.`, and the text encoders' with `cond_stage_model.`
or, in SDXL, with `conditioner.`. A file holds no settings: they are taken from its family, or from a
diffusers folder that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint.checkpoint import FUSED_FEW_STEP, Checkpoint, Component
from lcm_compile.checkpoint.diffusers_folder import Settings, read_settings
from lcm_compile.checkpoint.families import Family, detect_family
from lcm_compile.checkpoint.hub import fetch
from lcm_compile.checkpoint.weight_files import Shapes, read_header
from lcm_compile.errors import CheckpointError, first_few
from lcm_compile.scheduler import SchedulerSettings

UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST = f"{UNET}input_blocks.0.0.weight"  # every complete checkpoint has it, and no LoRA
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
    # What ComfyUI saves of CLIP's other half, which no model here reads.
    r"|(cond_stage_model|conditioner\.embedders\.\d)\.(text_projection|logit_scale)"
)
INPAINTING = 9  # channels that an inpainting model takes: a latent, a mask and another latent
# The first layer by which a ControlNet reads its picture, by the original's name and by diffusers'.
CONTROL_FIRST = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
# The weight by which a full LCM reads the guidance scale.
GUIDANCE = f"{UNET}time_embed.cond_proj.weight"
TOKENIZER_FILES = ["tokenizer*/*.json", "tokenizer*/merges.txt"]


def open_file(base: str, path: Path, config: Path | None, own_vae: bool = True) -> Checkpoint:
    """Returns the checkpoint in a file, with its family's settings or those of the diffusers folder `config`.

    What the file itself says holds against either. Without `own_vae`, the file needs no VAE. Raises
    CheckpointError if the file is no Stable Diffusion base. If it is known what the file is, the error says
    so, and how the file can be used.
    """
    refuse_pickle(path)
    shapes, metadata = read_header(path)
    refuse_others(path, shapes)
    family = detect_family(unet_shape(shapes))
    folder, settings = settings_of(path, family, config, shapes, metadata)
    if fused := metadata.get(FUSED_FEW_STEP.removeprefix("_")):
        settings = replace(settings, scheduler={**settings.scheduler, FUSED_FEW_STEP: fused})
    unet = {**settings.configs["unet"], "in_channels": shapes[FIRST][1]}
    settings = replace(settings, configs={**settings.configs, "unet": unet})
    prefixes = models_in(shapes)
    for name in settings.configs:
        if name not in prefixes and (own_vae or name != "vae"):
            hint = "give a complete checkpoint's file or folder to --base"
            if name == "vae":
                hint = "give the VAE that it is used with to --vae: a file, a folder, a hub id, or taesd"
            raise CheckpointError(f"{path} has no {name}", hint)
    components = {
        name: Component(name, settings.configs[name], (path,), prefix=prefixes.get(name, VAE))
        for name in settings.configs
    }
    notes = settings.notes
    if extra := unread(shapes):
        notes += (f"{path.name}: {len(extra)} keys belong to no model and are not read: {first_few(extra)}",)
    return Checkpoint(
        base,
        folder,
        family or detect_family(settings.configs["unet"]),
        components,
        settings.scheduler,
        settings.zero_negative_prompt,
        file=path,
        notes=notes,
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
    if under("control_model.", shapes) or any(key in shapes for key in CONTROL_FIRST):
        raise CheckpointError(f"{path} is a ControlNet, not a base", f"--controlnet {path}, with a --base")
    if FIRST not in shapes and any(
        re.search(r"lora|\.hada_|\.lokr_|\.diff(_b)?$|\.oft_blocks$|\.on_input$|\.a1\.weight$", key)
        for key in shapes
    ):
        raise CheckpointError(f"{path} is a LoRA, not a base", f"--lora {path} fuses it into a --base")
    kinds = {
        "joint_blocks.": "a Stable Diffusion 3 model",
        "double_blocks.": "a Flux model or one derived from it",
        "conditioner.embedders.0.model.": "an SDXL refiner, which draws no picture alone",
        "edm_mean": "a Playground 2.5 model, whose noise LCM's schedule does not fit",
        "edm_vpred.": "a CosXL model (edm_vpred), whose noise LCM's schedule does not fit",
        "down_blocks.": "a diffusers UNet without its other models",
    }
    for start, kind in kinds.items():
        if any(key.removeprefix(UNET).startswith(start) for key in shapes):
            raise CheckpointError(f"{path} is {kind}; Stable Diffusion 1, 2 and XL bases are known", hint)
    if not under(UNET, shapes):
        if under("model_ema.", shapes):
            raise CheckpointError(
                f"{path} holds its UNet only as training's averaged weights (model_ema.)",
                "get the file with the weights under their own names, which is for drawing",
            )
        if under(VAE, shapes) or under("decoder.", shapes):
            raise CheckpointError(f"{path} is a VAE alone", f"--vae {path}, with a --base")
        raise CheckpointError(
            f"{path} is no Stable Diffusion checkpoint: no key begins with {UNET} "
            f"(it has {first_few([*shapes])})",
            hint,
        )
    takes = shapes.get(FIRST, (0, 0))[1]
    if takes not in (4, INPAINTING):
        tasks = {5: "a depth-to-image model", 7: "an upscaler", 8: "an edit model"}
        raise CheckpointError(
            f"{path} is {tasks.get(takes, 'for another task')}: its UNet takes {takes} channels, not 4",
            "give a text-to-image base to --base",
        )
    if under(f"{UNET}label_emb.", shapes) and not under(OPEN_CLIP_XL, shapes):
        raise CheckpointError(
            f"{path} is an unCLIP model or one for another task: its UNet reads more than text (label_emb)",
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
        **({"time_cond_proj_dim": shapes[GUIDANCE][1]} if GUIDANCE in shapes else {}),
    }


def transformers(place: str, shapes: Shapes) -> set[str]:
    """Returns the numbers of the transformer blocks under a prefix of the keys."""
    start = f"{place}transformer_blocks."
    return {key.removeprefix(start).split(".")[0] for key in shapes if key.startswith(start)}


def settings_of(
    path: Path, family: Family | None, config: Path | None, shapes: Shapes, metadata: Mapping[str, str]
) -> tuple[Path, Settings]:
    """Returns the folder of a file's tokenizers, and its settings, in which what the file says holds.

    Raises CheckpointError if the file's family is unknown, if its tokenizers can't be had, or if LCM can't
    sample what the file says.
    """
    if family and Path(family.base).is_absolute():
        config = config or Path(family.base)
    if config:
        folder, settings = config, with_statements(path, config, read_settings(config), shapes, metadata)
    elif family is None:
        seen = unet_shape(shapes)
        raise CheckpointError(
            f"{path} is of no known family: its blocks are {seen['block_out_channels']} wide, "
            f"its text states {seen['cross_attention_dim']}",
            "give --config DIR, a diffusers folder of its architecture",
        )
    else:
        folder, settings = tokenizers_of(path, family), family_settings(path, family, shapes, metadata)
    try:
        SchedulerSettings.from_dict(settings.scheduler)
    except ValueError as error:
        raise CheckpointError(
            f"the LCM loop can't use {path}, by what it says of its noise schedule: {error}",
            "give a base whose UNet predicts v, or one without zero SNR, to --base",
        ) from error
    return folder, settings


def tokenizers_of(path: Path, family: Family) -> Path:
    """Returns the folder with a family's tokenizers. Raises CheckpointError if they can't be had."""
    repository = family.others or family.base
    try:
        return fetch(repository, TOKENIZER_FILES)
    except ConnectionError as error:
        raise CheckpointError(
            f"{path} is of the {family.name} family and holds no tokenizer, and that of {repository} is not "
            f"in the hub cache and can't be downloaded: {error}",
            "check the network (or HF_HOME, HF_TOKEN), or give "
            f"--config DIR, a diffusers folder of {family.name}",
        ) from error


def family_settings(path: Path, family: Family, shapes: Shapes, metadata: Mapping[str, str]) -> Settings:
    """Returns the family's settings, with what the file itself shows of its noise schedule."""
    prediction = prediction_type(path, family, shapes, metadata)
    scheduler = {**family.scheduler, "prediction_type": prediction, **stated_schedule(shapes, metadata)}
    models = {name: dict(config) for name, config in family.models.items()}
    if family.epsilon_sample_size and prediction == "epsilon":
        models["unet"]["sample_size"] = family.epsilon_sample_size
    return Settings(models, scheduler, "text_encoder_2" in models, contradiction(path, shapes, metadata))


def with_statements(
    path: Path, folder: Path, settings: Settings, shapes: Shapes, metadata: Mapping[str, str]
) -> Settings:
    """Returns a diffusers folder's settings, changed to what a file says of itself, with a note of each.

    A file says what its UNet predicts, whether its schedule ends in noise alone, and whether it is a full
    LCM.
    """
    stated = stated_schedule(shapes, metadata)
    unet = dict(settings.configs["unet"])
    guidance = {"time_cond_proj_dim": shapes[GUIDANCE][1]} if GUIDANCE in shapes else {}
    own = {**{name: stated[name] for name in SCHEDULE_DEFAULTS if name in stated}, **guidance}
    theirs = {**SCHEDULE_DEFAULTS, **settings.scheduler, "time_cond_proj_dim": unet.get("time_cond_proj_dim")}
    notes = [
        f"{path.name} says that its {name} is {value}, and {folder} says {theirs[name]}: the file's own holds"
        for name, value in own.items()
        if theirs[name] != value
    ]
    return replace(
        settings,
        configs={**settings.configs, "unet": {**unet, **guidance}},
        scheduler={**settings.scheduler, **stated},
        notes=(*contradiction(path, shapes, metadata), *notes),
    )


# The settings of a noise schedule that a file may state, with diffusers' defaults.
SCHEDULE_DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
# What trainers call what a UNet predicts, and diffusers' name.
PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "vpred", "vprediction", "velocity"), "v_prediction"),
}


def metadata_prediction(metadata: Mapping[str, str]) -> str | None:
    """Returns what a UNet predicts by the metadata of the SAI model spec, or None if that does not say it."""
    told = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    return PREDICTIONS.get(re.sub(r"[\W_]", "", told.lower()))


def stated_schedule(shapes: Shapes, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the settings of the noise schedule that a file states, under diffusers' names.

    The key `v_pred` says that the UNet predicts v, and `ztsnr` that the last timestep is noise alone (zero
    terminal SNR), from which samplers must start. Where the metadata contradicts a key, the key holds:
    ComfyUI, Forge and webui read the keys only.
    """
    prediction = "v_prediction" if "v_pred" in shapes else metadata_prediction(metadata)
    stated: dict[str, Any] = {"prediction_type": prediction} if prediction else {}
    if "ztsnr" in shapes:
        stated |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif prediction == "epsilon":  # which nothing but noise is no base for
        stated["rescale_betas_zero_snr"] = False
    return stated


def contradiction(path: Path, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Returns a note if a file's key says that its UNet predicts v, and its metadata something else."""
    told = metadata_prediction(metadata)
    if "v_pred" not in shapes or told in (None, "v_prediction"):
        return ()
    return (f"{path.name} predicts v by its key v_pred, and {told} by its metadata: the key holds",)


def prediction_type(path: Path, family: Family, shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """Returns what the UNet of a file predicts, `epsilon` or `v_prediction`.

    The shapes do not show it. If the file does not state it, the family does. Some SD2.x models predict v and
    others noise. For these the test is ComfyUI's: the biases of the last norm before a self-attention have a
    standard deviation above 0.09 if the UNet predicts v.
    """
    if stated := stated_schedule(shapes, metadata).get("prediction_type"):
        return str(stated)
    if family.prediction_norm is None:
        return str(family.scheduler.get("prediction_type", "epsilon"))
    key = f"{UNET}{family.prediction_norm}"
    if key not in shapes:
        return "epsilon"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as handle:
        spread = float(handle.get_tensor(key).float().std(correction=0))
    return "v_prediction" if spread > 0.09 else "epsilon"
