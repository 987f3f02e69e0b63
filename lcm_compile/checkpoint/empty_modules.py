"""Makes models from their configs on torch's meta device: with shapes, but without memory for weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcm_compile.checkpoint.checkpoint import Component, is_tiny
from lcm_compile.checkpoint.ip_adapter import (
    IP_ENCODER,
    IP_LAYERS,
    IP_PROJECTION,
    layers_of,
    projection_of,
)
from lcm_compile.errors import CheckpointError, first_line
from lcm_compile.graphs import CONTROLS, GUIDES


def empty_module(component: Component) -> Any:
    """Returns a component's module, with its parameters on torch's meta device.

    Raises CheckpointError if its config can't be used.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            return module_of(component.name, component.config)
    except Exception as error:  # the libraries' constructors raise errors of many types
        place = f"{component.folder}/config.json" if component.folder else f"config of the {component.name}"
        raise CheckpointError(
            f"{place} can't be used: {first_line(error)}",
            "correct it, or give --base a model that diffusers opens",
        ) from error


def empty_unet(config: Mapping[str, Any]) -> Any:
    """Returns a UNet on torch's meta device. Raises CheckpointError if its config can't be used."""
    return empty_module(Component("unet", config))


def module_of(name: str, config: Mapping[str, Any]) -> Any:
    """Returns a new module of a component, on torch's current device."""
    if name == IP_PROJECTION:
        return projection_of(config)
    if name == IP_LAYERS:
        return layers_of(config)
    kind = class_of(name, config)
    if name in ("unet", "vae", *GUIDES):
        return kind.from_config(dict(config))
    import transformers

    settings = transformers.CLIPVisionConfig if name == IP_ENCODER else transformers.CLIPTextConfig
    return kind(settings(**config))


def class_of(name: str, config: Mapping[str, Any]) -> Any:
    """Returns the class of a component's module, from diffusers or transformers."""
    if name in ("unet", "vae", *GUIDES):
        import diffusers

        if name in GUIDES:
            return diffusers.ControlNetModel if name in CONTROLS else diffusers.T2IAdapter
        vae = diffusers.AutoencoderTiny if is_tiny(config) else diffusers.AutoencoderKL
        return diffusers.UNet2DConditionModel if name == "unet" else vae
    import transformers

    if name == IP_ENCODER:
        return transformers.CLIPVisionModelWithProjection
    if name == "text_encoder_2":
        return transformers.CLIPTextModelWithProjection
    return transformers.CLIPTextModel
