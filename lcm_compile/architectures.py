"""Models as their configs describe them, with shapes but without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def empty_module(name: str, config: Mapping[str, Any]) -> Any:
    """The component `name`, as Component names it, its parameters on torch's meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        if name in ("unet", "vae"):
            import diffusers

            kind = diffusers.UNet2DConditionModel if name == "unet" else diffusers.AutoencoderKL
            return kind.from_config(dict(config))
        import transformers

        settings = transformers.CLIPTextConfig(**config)
        if name == "text_encoder_2":
            return transformers.CLIPTextModelWithProjection(settings)
        return transformers.CLIPTextModel(settings)
