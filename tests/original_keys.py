"""The keys of Stability's and CompVis' published one-file checkpoints, written down as patterns.

From the model definitions that those files were saved by (CompVis' `openaimodel.py` and `model.py`, OpenAI's
CLIP as transformers has it, OpenCLIP's text tower), and their published counts: 1,131 keys in
v1-5-pruned-emaonly and 2,515 in sd_xl_base_1.0, of which OPTIONAL ones are not weights.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

WB = "{weight,bias}"
RES = "{in_layers.{0,2},emb_layers.1,out_layers.{0,3}}"
ATTENTION = "{to_q.weight,to_k.weight,to_v.weight,to_out.0.weight,to_out.0.bias}"
VAE_RES = "{norm1,conv1,norm2,conv2}"


def expand(pattern: str) -> list[str]:
    """`a{b,c{d,e}}` → ab, acd, ace; `{0..3}` counts."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    if counted := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        options = [str(n) for n in range(int(counted[1]), int(counted[2]) + 1)]
    else:
        options = inner.split(",")
    expanded = [expand(pattern[: match.start()] + option + pattern[match.end() :]) for option in options]
    return list(dict.fromkeys(itertools.chain.from_iterable(expanded)))


def unet(
    resnets: Sequence[str], shortcuts: Sequence[str], attentions: dict[str, int], ops: str, ups: Sequence[str]
) -> Iterable[str]:
    """`attentions`: place → transformer blocks."""
    yield f"time_embed.{{0,2}}.{WB}"
    yield f"input_blocks.0.0.{WB}"
    yield f"out.{{0,2}}.{WB}"
    yield from (f"{place}.{RES}.{WB}" for place in resnets)
    yield from (f"{place}.skip_connection.{WB}" for place in shortcuts)
    yield f"input_blocks.{{{ops}}}.0.op.{WB}"
    yield from (f"{place}.conv.{WB}" for place in ups)
    for place, depth in attentions.items():
        blocks = f"{place}.transformer_blocks.{{0..{depth - 1}}}"
        yield f"{place}.{{norm,proj_in,proj_out}}.{WB}"
        yield f"{blocks}.attn{{1,2}}.{ATTENTION}"
        yield f"{blocks}.norm{{1..3}}.{WB}"
        yield f"{blocks}.ff.net.{{0.proj,2}}.{WB}"


def vae() -> Iterable[str]:
    """The f8 autoencoder: four levels of 128, 256, 512 and 512 channels."""
    yield f"{{encoder,decoder}}.{{conv_in,conv_out,norm_out}}.{WB}"
    yield f"{{encoder,decoder}}.mid.block_{{1,2}}.{VAE_RES}.{WB}"
    yield f"{{encoder,decoder}}.mid.attn_1.{{norm,q,k,v,proj_out}}.{WB}"
    yield f"encoder.down.{{0..3}}.block.{{0,1}}.{VAE_RES}.{WB}"
    yield f"encoder.down.{{1,2}}.block.0.nin_shortcut.{WB}"
    yield f"encoder.down.{{0..2}}.downsample.conv.{WB}"
    yield f"decoder.up.{{0..3}}.block.{{0..2}}.{VAE_RES}.{WB}"
    yield f"decoder.up.{{0,1}}.block.0.nin_shortcut.{WB}"
    yield f"decoder.up.{{1..3}}.upsample.conv.{WB}"
    yield f"{{quant_conv,post_quant_conv}}.{WB}"


def clip(layers: int) -> Iterable[str]:
    yield "text_model.embeddings.{token_embedding,position_embedding}.weight"
    block = f"text_model.encoder.layers.{{0..{layers - 1}}}"
    yield f"{block}.self_attn.{{q_proj,k_proj,v_proj,out_proj}}.{WB}"
    yield f"{block}.{{layer_norm1,layer_norm2,mlp.fc1,mlp.fc2}}.{WB}"
    yield f"text_model.final_layer_norm.{WB}"


def open_clip(layers: int) -> Iterable[str]:
    yield "{token_embedding.weight,positional_embedding}"
    block = f"transformer.resblocks.{{0..{layers - 1}}}"
    yield f"{block}.attn.{{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}}"
    yield f"{block}.{{ln_1,ln_2,mlp.c_fc,mlp.c_proj}}.{WB}"
    yield f"ln_final.{WB}"


SD_UNET = unet(
    ["input_blocks.{1,2,4,5,7,8,10,11}.0", "middle_block.{0,2}", "output_blocks.{0..11}.0"],
    ["input_blocks.{4,7}.0", "output_blocks.{0..11}.0"],
    {"input_blocks.{1,2,4,5,7,8}.1": 1, "middle_block.1": 1, "output_blocks.{3..11}.1": 1},
    "3,6,9",
    ["output_blocks.2.1", "output_blocks.{5,8}.2"],
)
XL_RESNETS = ["input_blocks.{1,2,4,5,7,8}.0", "output_blocks.{0..8}.0"]
XL_SHORTCUTS = ["input_blocks.{4,7}.0", "output_blocks.{0..8}.0"]
XL_UPS = ["output_blocks.{2,5}.2"]
XL_UNET = [
    f"label_emb.0.{{0,2}}.{WB}",
    *unet(
        [*XL_RESNETS, "middle_block.{0,2}"],
        XL_SHORTCUTS,
        {
            "input_blocks.{4,5}.1": 2,
            "input_blocks.{7,8}.1": 10,
            "middle_block.1": 10,
            "output_blocks.{0..2}.1": 10,
            "output_blocks.{3..5}.1": 2,
        },
        "3,6",
        XL_UPS,
    ),
]
# Segmind's SSD-1B: SDXL with blocks removed, and of its middle the first residual block alone.
SSD_UNET = [
    f"label_emb.0.{{0,2}}.{WB}",
    *unet(
        [*XL_RESNETS, "middle_block.0"],
        XL_SHORTCUTS,
        {
            "input_blocks.{4,5}.1": 2,
            "input_blocks.{7,8}.1": 4,
            "output_blocks.{0,1}.1": 4,
            "output_blocks.2.1": 10,
            "output_blocks.3.1": 2,
            "output_blocks.{4,5}.1": 1,
        },
        "3,6",
        XL_UPS,
    ),
]
XL_REST = {
    "first_stage_model.": list(vae()),
    "conditioner.embedders.0.transformer.": list(clip(12)),
    "conditioner.embedders.1.model.": [*open_clip(32), "text_projection"],
}
SD_UNET = list(SD_UNET)
PARTS = {
    "sd15": {
        "model.diffusion_model.": SD_UNET,
        "first_stage_model.": list(vae()),
        "cond_stage_model.transformer.": list(clip(12)),
    },
    # The 24th block of SD2's text encoder is in the published files, and never computed.
    "sd21": {
        "model.diffusion_model.": SD_UNET,
        "first_stage_model.": list(vae()),
        "cond_stage_model.model.": list(open_clip(23)),
    },
    "sdxl": {"model.diffusion_model.": XL_UNET, **XL_REST},
    "ssd-1b": {"model.diffusion_model.": SSD_UNET, **XL_REST},
}
# Full LCMs have one weight more, under the name that the original's time_embed gives it.
for full_lcm, base in (("lcm-sdxl", "sdxl"), ("lcm-ssd-1b", "ssd-1b"), ("lcm-dreamshaper", "sd15")):
    own = PARTS[base]["model.diffusion_model."]
    PARTS[full_lcm] = PARTS[base] | {"model.diffusion_model.": [*own, "time_embed.cond_proj.weight"]}
OPTIONAL = {
    "sd15": ["cond_stage_model.transformer.text_model.embeddings.position_ids"],
    "sdxl": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    ],
}


def original_keys(family: str) -> list[str]:
    return [f"{prefix}{key}" for prefix, ps in PARTS[family].items() for p in ps for key in expand(p)]
