"""Models as their configs describe them, with shapes but without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcm_compile.checkpoint.checkpoint import Component, is_tiny
from lcm_compile.errors import CheckpointError, first_line


def empty_module(component: Component) -> Any:
    """A component whose parameters are on torch's meta device. CheckpointError for a senseless config."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            return module_of(component.name, component.config)
    except Exception as error:  # the libraries raise whatever their constructors meet
        place = f"{component.folder}/config.json" if component.folder else f"config of the {component.name}"
        raise CheckpointError(
            f"{place} can't be used: {first_line(error)}", "download the checkpoint again"
        ) from error


def empty_unet(config: Mapping[str, Any]) -> Any:
    return empty_module(Component("unet", config))


def module_of(name: str, config: Mapping[str, Any]) -> Any:
    kind = class_of(name, config)
    if name in ("unet", "vae"):
        return kind.from_config(dict(config))
    import transformers

    return kind(transformers.CLIPTextConfig(**config))


def class_of(name: str, config: Mapping[str, Any]) -> Any:
    """The class of a component, diffusers' or transformers'."""
    if name in ("unet", "vae"):
        import diffusers

        vae = diffusers.AutoencoderTiny if is_tiny(config) else diffusers.AutoencoderKL
        return diffusers.UNet2DConditionModel if name == "unet" else vae
    import transformers

    if name == "text_encoder_2":
        return transformers.CLIPTextModelWithProjection
    return transformers.CLIPTextModel
