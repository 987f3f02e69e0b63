"""Models as their configs describe them, with shapes but without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcm_compile.components import Component
from lcm_compile.errors import CheckpointError
from lcm_compile.hub import first_line


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
    if name in ("unet", "vae"):
        import diffusers

        kind = diffusers.UNet2DConditionModel if name == "unet" else diffusers.AutoencoderKL
        return kind.from_config(dict(config))
    import transformers

    settings = transformers.CLIPTextConfig(**config)
    if name == "text_encoder_2":
        return transformers.CLIPTextModelWithProjection(settings)
    return transformers.CLIPTextModel(settings)
