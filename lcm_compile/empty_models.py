"""The families' models as shapes without weights, on torch's meta device: they cost no memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lcm_compile.checkpoints import open_checkpoint
from lcm_compile.loading import quiet_libraries
from lcm_compile.unet_configs import TEXT_ENCODERS, UNETS


def empty_unet(config: Mapping[str, Any]) -> Any:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), quiet_libraries():
        return UNet2DConditionModel.from_config(config)


def empty_text_encoder(name: str, config: Mapping[str, Any]) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
    with torch.device("meta"), quiet_libraries():
        return kind(CLIPTextConfig(**config))


def family_configs(family: str) -> dict[str, Mapping[str, Any]]:
    """The settings of a family's UNet and text encoders; needs no download."""
    if family in UNETS:
        return {"unet": UNETS[family], **TEXT_ENCODERS[family]}
    components = open_checkpoint(family).components
    return {name: component.config for name, component in components.items() if name != "vae"}


def empty_modules(family: str, names: Collection[str]) -> dict[str, Any]:
    """Those of a family's UNet and text encoders that are named."""
    return {
        name: empty_unet(config) if name == "unet" else empty_text_encoder(name, config)
        for name, config in family_configs(family).items()
        if name in names
    }
