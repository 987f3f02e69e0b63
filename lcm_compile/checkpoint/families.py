"""The model families. A family is one row of `FAMILIES`; no other file names one.

The configs in a row are put together from `configs.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcm_compile.checkpoint import configs

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_STYLE = DEMO_FOLDER / "zebra_lora.safetensors"  # trained on the demo base alone

SAMPLE_PROMPT = "a photograph of an astronaut riding a horse"
# What an 8-bit UNet is scaled to: many kinds of pictures, light and dark, full and empty.
CALIBRATION_PROMPTS = (
    "a portrait of an old fisherman, studio light",
    "a bowl of fruit on a wooden table, oil painting",
    "a city street at night in the rain, neon signs",
    "a snowy mountain under a clear blue sky",
    "a black cat on a white sofa",
    "a detailed map of an imaginary island, ink on parchment",
)


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    `base` and `lcm_lora` are hub ids; those of the model in this package are paths. `others` is the
    checkpoint that holds the remaining models if `base` is a UNet alone. `short` is the name in messages
    about a LoRA. `signature` lists the UNet settings by which a checkpoint of the family is recognised; if
    the signatures of two families match, the longer one counts. A one-file checkpoint shows only
    `block_out_channels`, `transformer_layers_per_block`, `cross_attention_dim` and `mid_block_type`.

    `models` maps each component, such as `unet`, to its config, and `scheduler` is the scheduler's config.
    They are used where no checkpoint folder is at hand: for random weights, for one-file checkpoints and to
    count parameters. They are empty for the model in this package, whose folder is always there.

    `sample_prompt` is drawn by `run` without a prompt, and parity is measured on it. `calibration_prompts`
    are used to scale an 8-bit UNet. `fp16_vae` is a hub id: the VAE to build in fp16 in place of the family's
    own, if that overflows.

    The last two fields are for a family whose checkpoints predict either noise or v. `prediction_norm` is the
    tensor of a one-file checkpoint whose values tell which, and `epsilon_sample_size` is the UNet's sample
    size in a checkpoint that predicts noise.
    """

    name: str
    short: str
    base: str
    lcm_lora: str | None
    description: str
    signature: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    sample_prompt: str = SAMPLE_PROMPT
    calibration_prompts: tuple[str, ...] = CALIBRATION_PROMPTS
    others: str | None = None
    fp16_vae: str | None = None
    prediction_norm: str | None = None
    epsilon_sample_size: int | None = None

    @property
    def is_full_lcm(self) -> bool:
        """Whether its UNet reads the guidance scale, and so takes no LCM-LoRA."""
        return "time_cond_proj_dim" in self.signature


LCM_LORA_FILE = "pytorch_lora_weights.safetensors"
SDXL_FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "demo",
            short="the demo",
            base=str(DEMO_FOLDER / "checkpoint"),
            lcm_lora=str(DEMO_FOLDER / "lcm_lora.safetensors"),
            description="a small SDXL of coloured shapes, shipped with the package, 64×64",
            signature={"cross_attention_dim": 128, "block_out_channels": [64, 112]},
            sample_prompt="a large red star on a striped pink background",
            calibration_prompts=(
                "a small green square on a plain white background",
                "a large yellow circle on a checkered black background",
                "a purple ring and an orange cross on a striped gray background",
                "a small blue triangle on a plain pink background",
                "a green star and a red circle on a checkered white background",
                "a large orange square on a striped black background",
                "a blue cross and a yellow triangle on a plain gray background",
                "a small purple circle on a plain gray background",
            ),
        ),
        Family(
            "sdxl",
            short="SDXL",
            base="stabilityai/stable-diffusion-xl-base-1.0",
            lcm_lora="latent-consistency/lcm-lora-sdxl",
            description="Stable Diffusion XL, 1024×1024",
            signature={
                "cross_attention_dim": 2048,
                "transformer_layers_per_block": [1, 2, 10],
                "block_out_channels": [320, 640, 1280],
            },
            models={"unet": configs.UNET_XL, **configs.XL},
            scheduler=configs.EULER,
            fp16_vae=SDXL_FP16_VAE,
        ),
        Family(
            "ssd-1b",
            short="SSD-1B",
            base="segmind/SSD-1B",
            lcm_lora="latent-consistency/lcm-lora-ssd-1b",
            description="Segmind Stable Diffusion 1B, half an SDXL, 1024×1024",
            signature={
                "cross_attention_dim": 2048,
                "mid_block_type": "UNetMidBlock2D",  # one residual block, no attention
                "block_out_channels": [320, 640, 1280],
            },
            models={"unet": configs.UNET_SSD_1B, **configs.XL},
            scheduler=configs.EULER,
            fp16_vae=SDXL_FP16_VAE,
        ),
        Family(
            "sd15",
            short="SD1.5",
            base="stable-diffusion-v1-5/stable-diffusion-v1-5",
            lcm_lora="latent-consistency/lcm-lora-sdv1-5",
            description="Stable Diffusion 1.5, 512×512",
            signature={"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]},
            models={"unet": configs.UNET_SD15, "vae": configs.VAE, "text_encoder": configs.CLIP_L},
            scheduler=configs.PNDM,
        ),
        Family(
            "sd21",
            short="SD2.x",
            base="stabilityai/stable-diffusion-2-1",
            lcm_lora=None,
            description="Stable Diffusion 2.1, v prediction, 768×768; has no published LCM-LoRA",
            signature={"cross_attention_dim": 1024, "block_out_channels": [320, 640, 1280, 1280]},
            models={
                "unet": configs.UNET_SD21,
                "vae": {**configs.VAE, "sample_size": 768},
                "text_encoder": configs.CLIP_H,
            },
            scheduler=configs.DDIM_V,
            prediction_norm="output_blocks.11.1.transformer_blocks.0.norm1.bias",
            epsilon_sample_size=64,  # 2.0-base and 2.1-base: 512×512 pictures
        ),
        # Full LCMs (Luo et al. 2023).
        Family(
            "lcm-sdxl",
            short="SDXL",
            base="latent-consistency/lcm-sdxl",
            lcm_lora=None,
            description="Stable Diffusion XL as a full LCM, 1024×1024",
            signature={
                "cross_attention_dim": 2048,
                "transformer_layers_per_block": [1, 2, 10],
                "block_out_channels": [320, 640, 1280],
                "time_cond_proj_dim": 256,
            },
            models={"unet": {**configs.UNET_XL, **configs.GUIDED}, **configs.XL},
            scheduler=configs.EULER,
            others="stabilityai/stable-diffusion-xl-base-1.0",
            fp16_vae=SDXL_FP16_VAE,
        ),
        Family(
            "lcm-ssd-1b",
            short="SSD-1B",
            base="latent-consistency/lcm-ssd-1b",
            lcm_lora=None,
            description="Segmind Stable Diffusion 1B as a full LCM, 1024×1024",
            signature={
                "cross_attention_dim": 2048,
                "mid_block_type": "UNetMidBlock2D",
                "block_out_channels": [320, 640, 1280],
                "time_cond_proj_dim": 256,
            },
            models={"unet": {**configs.UNET_SSD_1B, **configs.GUIDED}, **configs.XL},
            scheduler=configs.EULER,
            others="segmind/SSD-1B",
            fp16_vae=SDXL_FP16_VAE,
        ),
        Family(
            "lcm-dreamshaper",
            short="SD1.5",
            base="SimianLuo/LCM_Dreamshaper_v7",
            lcm_lora=None,
            description="Dreamshaper 7, a Stable Diffusion 1.5, as a full LCM, 768×768",
            signature={
                "cross_attention_dim": 768,
                "block_out_channels": [320, 640, 1280, 1280],
                "time_cond_proj_dim": 256,
            },
            models={
                "unet": {**configs.UNET_SD15, **configs.GUIDED, "sample_size": 96},
                "vae": {**configs.VAE, "sample_size": 768},
                "text_encoder": configs.CLIP_L,
            },
            scheduler=configs.LCM,
        ),
    )
}


def detect_family(unet_config: Mapping[str, Any]) -> Family | None:
    """Returns the family whose signature this UNet config has, or None."""

    def matches(family: Family) -> bool:
        return all(unet_config.get(key) == value for key, value in family.signature.items())

    return max(filter(matches, FAMILIES.values()), key=lambda family: len(family.signature), default=None)


def lora_bases() -> list[Family]:
    """Returns the families that LoRAs are made for: all but the full LCMs."""
    return [family for family in FAMILIES.values() if not family.is_full_lcm]


def names_of_width(width: int) -> str:
    """Returns in words the families whose text states are `width` wide: `SDXL or SSD-1B`. Empty if none."""
    return " or ".join(f.short for f in lora_bases() if f.signature.get("cross_attention_dim") == width)
