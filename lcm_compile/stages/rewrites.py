"""Rewrites of a model for LCM, exact to rounding, made on its torch modules before they are exported.

What a prompt and a few fixed timesteps settle is computed once instead of at every step; layers are put so
that they take less arithmetic. REWRITES in spec names them; each can be switched off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_compile.errors import CheckpointError

# Keys and values of all layers whose heads have one form, (2·layers, b, heads, tokens, head width), by name.
KeysValues = Mapping[str, Tensor]


def rewrite_unet(
    unet: nn.Module, rewrites: Collection[str], latents: Sequence[tuple[int, int]]
) -> nn.Module | None:
    """Rewrites a UNet in place for latents of these sizes; returns the context that it then depends on.

    CheckpointError for a UNet of another kind than Stable Diffusion's.
    """
    context = split_context(unet) if "context" in rewrites else None
    if "qkv" in rewrites:
        fuse_projections(unet)
    if "upsampling" in rewrites:
        levels = len([block for block in parts(unet, "up_blocks") if block.upsamplers])
        rewrite_upsampling(unet, [doublings(latent, levels) for latent in latents])
    return context


def rewrite_vae(vae: nn.Module, rewrites: Collection[str]) -> None:
    """Rewrites the drawing half of a VAE in place."""
    decoder: Any = vae.decoder
    if "upsampling" not in rewrites:
        return
    if hasattr(decoder, "up_blocks"):
        rewrite_upsampling(decoder, [])
    else:
        rewrite_tiny_decoder(decoder.layers)


def parts(module: Any, name: str) -> Any:
    return getattr(module, name)


# ---- what depends on the prompt and the timesteps alone ----


class Context(nn.Module):
    """Cross-attention's keys and values, and the ResBlocks' share of the time embeddings, taken from a UNet.

    hidden_states (b, n, c), timesteps (s,), the embedding of pooled text and size ids (b, e) or None, that of
    the guidance scale (1, g) or None → keys and values by the form of their heads, times (s, b, t).
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.add_time_proj = getattr(unet, "add_time_proj", None)
        self.add_embedding: Any = getattr(unet, "add_embedding", None)
        self.time_cond_width = unet.config.time_cond_proj_dim
        self.time_projection = joined([resnet.time_emb_proj for resnet in resnets(unet)])
        self.heads: dict[str, tuple[int, int, int]] = {}
        projections = {}
        for name, layers in cross_attentions(unet).items():
            projections[name] = joined([linear for layer in layers for linear in (layer.to_k, layer.to_v)])
            width = layers[0].to_k.out_features // layers[0].heads
            self.heads[name] = (2 * len(layers), layers[0].heads, width)
        self.projections = nn.ModuleDict(projections)

    def forward(
        self, hidden_states: Tensor, timesteps: Tensor, added: Tensor | None, guidance: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        batch, tokens, _ = hidden_states.shape
        keys_values = []
        for name, (layers, heads, width) in self.heads.items():
            projected = self.projections[name](hidden_states)  # (b, n, 2·layers·heads·width)
            split = projected.view(batch, tokens, layers, heads, width)
            keys_values.append(split.permute(2, 0, 3, 1, 4).contiguous())
        embedding = self.time_embedding(self.time_proj(timesteps).to(hidden_states.dtype), guidance)
        embedding = embedding[:, None].expand(-1, batch, -1)  # (s, b, e)
        if added is not None:
            embedding = embedding + self.add_embedding(added)[None]
        return keys_values, self.time_projection(F.silu(embedding))


def split_context(unet: Any) -> Context:
    """Takes its context out of a UNet, whose forward then takes `times` of one step (b, t) as its timestep,
    and KeysValues as its hidden states."""
    odd = odd_parts(unet)
    if odd:
        raise CheckpointError(f"the UNet has {odd}, which no context can be taken from", "--without context")
    context = Context(unet)
    for name, layers in cross_attentions(unet).items():
        for i, layer in enumerate(layers):
            layer.set_processor(GivenKeysValues(name, 2 * i))
            layer.to_k = layer.to_v = nn.Identity()
    start = 0
    for resnet in resnets(unet):
        stop = start + resnet.time_emb_proj.out_features
        resnet.time_emb_proj, resnet.skip_time_act = Slice(start, stop), True
        start = stop
    unet.get_time_embed = lambda sample, timestep: timestep
    unet.get_aug_embed = lambda **_: None
    unet.time_proj = unet.time_embedding = PassFirst()
    unet.add_time_proj = unet.add_embedding = None
    return context


def odd_parts(unet: Any) -> str:
    """What a UNet has that Stable Diffusion's have not, and that the context would leave out."""
    if unet.time_embed_act is not None or any(
        not isinstance(resnet.nonlinearity, nn.SiLU) or resnet.skip_time_act for resnet in resnets(unet)
    ):
        return "time embeddings that are activated in another way"
    layers = [layer for group in cross_attentions(unet).values() for layer in group]
    if any(layer.norm_cross or layer.norm_k or layer.norm_q for layer in layers):
        return "cross-attention that normalises its keys"
    return ""


def context_sizes(unet: Any) -> tuple[dict[str, tuple[int, int, int]], int]:
    """(2·layers, heads, head width) by name, and the width of a step's times."""
    heads = {
        name: (2 * len(layers), layers[0].heads, layers[0].to_k.out_features // layers[0].heads)
        for name, layers in cross_attentions(unet).items()
    }
    return heads, sum(resnet.time_emb_proj.out_features for resnet in resnets(unet))


def resnets(unet: nn.Module) -> list[Any]:
    """Blocks that the time embedding goes into, in the order of the UNet's names."""
    return [m for m in unet.modules() if getattr(m, "time_emb_proj", None) is not None]


def cross_attentions(unet: nn.Module) -> dict[str, list[Any]]:
    """Layers that attend to the text, by the form of their heads: `keys_values_8x40` for 8 of width 40."""
    groups: dict[str, list[Any]] = {}
    for layer in attentions(unet):
        if layer.is_cross_attention:
            width = layer.inner_dim // layer.heads
            groups.setdefault(f"keys_values_{layer.heads}x{width}", []).append(layer)
    return groups


def attentions(unet: nn.Module) -> Iterator[Any]:
    for module in unet.modules():
        for name in ("attn1", "attn2"):
            if getattr(module, name, None) is not None:
                yield getattr(module, name)


def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that gives the outputs of all of them side by side."""
    has_bias = layers[0].bias is not None
    one = nn.Linear(1, 1, bias=has_bias, device="meta")
    one.in_features, one.out_features = layers[0].in_features, sum(layer.out_features for layer in layers)
    one.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if has_bias:
        one.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return one


class Slice(nn.Module):
    """Some columns of what it is given."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


class PassFirst(nn.Module):
    """The first thing that it is given."""

    def forward(self, first: Tensor, *_: Any) -> Tensor:
        return first


# ---- attention ----


def attend(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (b, n, h·d), key and value (b, h, m, d) → (b, n, c), as diffusers' AttnProcessor2_0."""
    batch, tokens, width = query.shape
    query = query.view(batch, tokens, layer.heads, -1).transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value)
    return layer.to_out[0](attended.transpose(1, 2).reshape(batch, tokens, width))


class GivenKeysValues:
    """An attention processor that takes its keys and values from KeysValues, in place of hidden states."""

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index = name, index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: KeysValues,
        attention_mask: None = None,
    ) -> Tensor:
        given = encoder_hidden_states[self.name]
        return attend(attn, attn.to_q(hidden_states), given[self.index], given[self.index + 1])


class FusedSelfAttention:
    """An attention processor whose queries, keys and values come out of one product, `attn.to_qkv`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
    ) -> Tensor:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        heads = (*key.shape[:2], attn.heads, -1)
        return attend(attn, query, key.view(heads).transpose(1, 2), value.view(heads).transpose(1, 2))


def fuse_projections(unet: nn.Module) -> None:
    """Makes one product of the three of every self-attention, in place."""
    for layer in attentions(unet):
        if not layer.is_cross_attention and not layer.norm_q:
            layer.to_qkv = joined([layer.to_q, layer.to_k, layer.to_v])
            layer.to_q = layer.to_k = layer.to_v = nn.Identity()
            layer.set_processor(FusedSelfAttention())


# ---- upsampling ----


def doublings(latent: tuple[int, int], levels: int) -> list[bool]:
    """For each upsampler, from the smallest map up, whether its output is exactly twice its input.

    A map of an odd side is halved to the next whole number, and goes back to the odd one.
    """
    sides = [latent]
    for _ in range(levels):
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    pairs = list(zip(sides[1:], sides, strict=False))
    return [large == (2 * small[0], 2 * small[1]) for small, large in reversed(pairs)]


def rewrite_upsampling(module: nn.Module, exact: Sequence[Sequence[bool]]) -> None:
    """Replaces, in place, every nearest-2× upsampling that a 3×3 convolution follows.

    `exact` tells for each size of picture which of them really double their map; all do where it is empty.
    """
    found = [
        (block, i, upsampler)
        for block in module.up_blocks  # type: ignore[union-attr]
        for i, upsampler in enumerate(block.upsamplers or ())
    ]
    for number, (block, i, upsampler) in enumerate(found):
        conv: Any = getattr(upsampler, "conv", None)
        if is_plain(conv) and upsampler.interpolate and all(doubles[number] for doubles in exact):
            block.upsamplers[i] = Upsampling(conv)


def rewrite_tiny_decoder(layers: nn.Sequential) -> None:
    """The same in a tiny autoencoder's decoder, whose layers are one sequence."""
    pairs: Any = pairwise(layers)
    for i, (layer, conv) in enumerate(pairs):
        doubles = isinstance(layer, nn.Upsample) and (layer.scale_factor, layer.mode) == (2, "nearest")
        if doubles and is_plain(conv):
            layers[i], layers[i + 1] = Upsampling(conv), nn.Identity()


def is_plain(conv: Any) -> bool:
    return isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


class Upsampling(nn.Module):
    """Nearest-2× upsampling and the 3×3 convolution after it, as four 2×2 convolutions on the small map.

    An output pixel sees only 2×2 input pixels, some through several of the 3×3 weights: their sums are its
    weights. So it takes 4/9 of the arithmetic, and is exact to rounding, at the borders too.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.corners = nn.ModuleList(corner(conv, row, column) for row in (0, 1) for column in (0, 1))

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        # (b, c, h, w) → (b, c', 2h, 2w)
        batch, _, height, width = hidden_states.shape
        # The upper left quarter of an input pixel sees its upper and left neighbours.
        corners = [
            conv(F.pad(hidden_states, (1 - i % 2, i % 2, 1 - i // 2, i // 2)))
            for i, conv in enumerate(self.corners)
        ]
        return F.pixel_shuffle(torch.stack(corners, 2).reshape(batch, -1, height, width), 2)


def corner(conv: nn.Conv2d, row: int, column: int) -> nn.Conv2d:
    """The 2×2 convolution that gives the output pixels of even (0) or odd (1) rows and columns."""
    one = nn.Conv2d(conv.in_channels, conv.out_channels, 2, bias=conv.bias is not None, device="meta")
    one.weight = nn.Parameter(corner_kernel(conv.weight, row, column), requires_grad=False)
    one.bias = conv.bias
    return one


def corner_kernel(weight: Tensor, row: int, column: int) -> Tensor:
    """(o, c, 3, 3) → (o, c, 2, 2), for the output pixels of odd or even rows and columns."""

    def halves(weight: Tensor, dimension: int, odd: int) -> Tensor:
        one, two, three = weight.unbind(dimension)
        return torch.stack([one + two, three] if odd else [one, two + three], dimension)

    return halves(halves(weight, 2, row), 3, column)
