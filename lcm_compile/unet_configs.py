"""The UNets of the families, as their checkpoints configure them: what differs from diffusers' defaults.

They tell a UNet's size and shapes before it is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SD15 = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

UNETS: dict[str, Mapping[str, Any]] = {
    "sdxl": SDXL,
    "ssd-1b": {
        **SDXL,
        "mid_block_type": "UNetMidBlock2D",  # one residual block, no attention
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],  # the first block has no attention
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "sd15": SD15,
    "sd21": {
        **SD15,
        "sample_size": 96,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
