"""The model families: where their weights and their LCM-LoRA are, and how to tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """`base` and `lcm_lora` are hub ids, or paths for the model that comes with the package.

    `signature` holds the UNet settings that tell the family; where two match, the longer one counts.
    `sample_prompt` is what `run` draws when it is given none, and what parity is measured on;
    `calibration_prompts` are what an 8-bit UNet is scaled to. Where `base` is a UNet alone, `others` is the
    checkpoint whose other models go with it.
    """

    name: str
    base: str
    lcm_lora: str | None
    description: str
    signature: Mapping[str, Any]
    sample_prompt: str = SAMPLE_PROMPT
    calibration_prompts: tuple[str, ...] = CALIBRATION_PROMPTS
    others: str | None = None


LCM_LORA_FILE = "pytorch_lora_weights.safetensors"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "demo",
            str(DEMO_FOLDER / "checkpoint"),
            str(DEMO_FOLDER / "lcm_lora.safetensors"),
            "a small SDXL of coloured shapes, shipped with the package, 64×64",
            {"cross_attention_dim": 128, "block_out_channels": [64, 112]},
            "a large red star on a striped pink background",
            (
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
            "stabilityai/stable-diffusion-xl-base-1.0",
            "latent-consistency/lcm-lora-sdxl",
            "Stable Diffusion XL, 1024×1024",
            {
                "cross_attention_dim": 2048,
                "transformer_layers_per_block": [1, 2, 10],
                "block_out_channels": [320, 640, 1280],
            },
        ),
        Family(
            "ssd-1b",
            "segmind/SSD-1B",
            "latent-consistency/lcm-lora-ssd-1b",
            "Segmind Stable Diffusion 1B, half an SDXL, 1024×1024",
            {
                "cross_attention_dim": 2048,
                "mid_block_type": "UNetMidBlock2D",  # one residual block, no attention
                "block_out_channels": [320, 640, 1280],
            },
        ),
        Family(
            "sd15",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "latent-consistency/lcm-lora-sdv1-5",
            "Stable Diffusion 1.5, 512×512",
            {"cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]},
        ),
        Family(
            "sd21",
            "stabilityai/stable-diffusion-2-1",
            None,
            "Stable Diffusion 2.1, v prediction, 768×768; has no published LCM-LoRA",
            {"cross_attention_dim": 1024, "block_out_channels": [320, 640, 1280, 1280]},
        ),
        # Full LCMs (Luo et al. 2023): UNets that are told the guidance scale, and take no LCM-LoRA.
        Family(
            "lcm-sdxl",
            "latent-consistency/lcm-sdxl",
            None,
            "Stable Diffusion XL as a full LCM, 1024×1024",
            {
                "cross_attention_dim": 2048,
                "transformer_layers_per_block": [1, 2, 10],
                "block_out_channels": [320, 640, 1280],
                "time_cond_proj_dim": 256,
            },
            others="stabilityai/stable-diffusion-xl-base-1.0",
        ),
        Family(
            "lcm-ssd-1b",
            "latent-consistency/lcm-ssd-1b",
            None,
            "Segmind Stable Diffusion 1B as a full LCM, 1024×1024",
            {
                "cross_attention_dim": 2048,
                "mid_block_type": "UNetMidBlock2D",
                "block_out_channels": [320, 640, 1280],
                "time_cond_proj_dim": 256,
            },
            others="segmind/SSD-1B",
        ),
        Family(
            "lcm-dreamshaper",
            "SimianLuo/LCM_Dreamshaper_v7",
            None,
            "Dreamshaper 7, a Stable Diffusion 1.5, as a full LCM, 768×768",
            {
                "cross_attention_dim": 768,
                "block_out_channels": [320, 640, 1280, 1280],
                "time_cond_proj_dim": 256,
            },
        ),
    )
}

# Width of the text states that a LoRA's cross-attention reads → the bases it can be for.
TEXT_WIDTHS = {768: "SD1.5", 1024: "SD2.x", 2048: "SDXL or SSD-1B"}


def detect_family(unet_config: Mapping[str, Any]) -> Family | None:
    """The family whose signature this UNet has, or None."""

    def matches(family: Family) -> bool:
        return all(unet_config.get(key) == value for key, value in family.signature.items())

    return max(filter(matches, FAMILIES.values()), key=lambda family: len(family.signature), default=None)
