"""Rewrites a model's torch modules for LCM before they are exported. The results are equal up to rounding.

Values that depend only on the prompt and a few fixed timesteps are computed once instead of at every step,
and some layers are replaced by equivalent ones with less arithmetic. REWRITES in spec lists the rewrites;
each can be switched off.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcm_compile.errors import CheckpointError
from lcm_compile.stages.lora_branches import join_branches, move_branch

# Keys and values (2·layers, b, heads, tokens, head width) for each group of cross_attentions, by its name.
# Those of an IP-Adapter's picture have `ip_` in front of the name.
KeysValues = Mapping[str, Tensor]
# Text states (b, n, c), the tokens of an IP-Adapter's picture (1, m, c), and their weight (1,).
TextAndPicture = tuple[Tensor, Tensor, Tensor]


def rewrite_unet(
    unet: nn.Module, rewrites: Collection[str], latents: Sequence[tuple[int, int]]
) -> nn.Module | None:
    """Rewrites a UNet in place for latents of these (height, width).

    With the rewrite `context` it returns the Context whose outputs the UNet then takes, otherwise None.
    Raises CheckpointError if the context can't be taken out of this UNet.
    """
    context = split_context(unet) if "context" in rewrites else None
    if "qkv" in rewrites:
        fuse_projections(unet)
    if "upsampling" in rewrites:
        levels = len([block for block in attribute(unet, "up_blocks") if block.upsamplers])
        rewrite_upsampling(unet, [doublings(latent, levels) for latent in latents])
    return context


def rewrite_vae(vae: nn.Module, rewrites: Collection[str]) -> None:
    """Rewrites the decoder of a VAE in place."""
    decoder: Any = vae.decoder
    if "upsampling" not in rewrites:
        return
    if hasattr(decoder, "up_blocks"):
        rewrite_upsampling(decoder, [])
    else:
        rewrite_tiny_decoder(decoder.layers)


def attribute(module: Any, name: str) -> Any:
    """Returns an attribute of a module, typed as Any."""
    return getattr(module, name)


# ---- the context: values that depend only on the prompt and the timesteps ----


class Context(nn.Module):
    """The layers of a UNet that compute cross-attention's keys and values and the ResBlocks' time embeddings.

    Its inputs are hidden_states (b, n, c), or with an IP-Adapter TextAndPicture; timesteps (s,), the
    embedding of pooled text and size ids (b, e) or None, and the embedding of the guidance scale (1, g) or
    None. It returns keys and values, one tensor for each group of cross_attentions, then those of the
    picture, and times (s, b, t): the time embeddings of all ResBlocks joined.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.add_time_proj = getattr(unet, "add_time_proj", None)
        self.add_embedding: Any = getattr(unet, "add_embedding", None)
        self.time_cond_width = unet.config.time_cond_proj_dim
        self.time_projection = joined([resnet.time_emb_proj for resnet in resnets(unet)])
        self.heads: dict[str, tuple[int, int, int]] = {}
        projections, of_picture = {}, {}
        for name, layers in cross_attentions(unet).items():
            projections[name] = joined([linear for layer in layers for linear in (layer.to_k, layer.to_v)])
            if reads_picture(layers[0]):
                both = [linear for layer in layers for linear in (layer.to_k_ip, layer.to_v_ip)]
                of_picture[name] = joined(both)
            width = layers[0].to_k.out_features // layers[0].heads
            self.heads[name] = (2 * len(layers), layers[0].heads, width)
        self.projections, self.ip_projections = nn.ModuleDict(projections), nn.ModuleDict(of_picture)

    def forward(
        self,
        states: Tensor | TextAndPicture,
        timesteps: Tensor,
        added: Tensor | None,
        guidance: Tensor | None,
    ) -> tuple[list[Tensor], Tensor]:
        hidden_states, *picture = states if isinstance(states, tuple) else (states,)
        batch = len(hidden_states)
        keys_values = [self.split(name, self.projections[name](hidden_states)) for name in self.heads]
        if picture:
            tokens, weight = picture
            weights = torch.cat([torch.ones_like(weight), weight])  # of keys, and of values
            for name, projection in self.ip_projections.items():
                both = self.split(name, projection(tokens)).unflatten(0, (-1, 2))
                weighted = (both * weights[:, None, None, None, None]).flatten(0, 1)
                keys_values.append(weighted.expand(-1, batch, -1, -1, -1).contiguous())
        embedding = self.time_embedding(self.time_proj(timesteps).to(hidden_states.dtype), guidance)
        embedding = embedding[:, None].expand(-1, batch, -1)  # (s, b, e)
        if added is not None:
            embedding = embedding + self.add_embedding(added)[None]
        return keys_values, self.time_projection(F.silu(embedding))

    def split(self, name: str, projected: Tensor) -> Tensor:
        """Returns keys and values of a group (2·layers, b, heads, n, width) of their product (b, n, …)."""
        layers, heads, width = self.heads[name]
        return projected.unflatten(-1, (layers, heads, width)).permute(2, 0, 3, 1, 4).contiguous()


def split_context(unet: Any) -> Context:
    """Moves the context layers out of a UNet, in place, and returns them.

    The forward of the UNet then takes the `times` (b, t) of one step as its timestep, and KeysValues as its
    hidden states. Raises CheckpointError if the UNet has layers that the context would compute wrongly.
    """
    unsupported = unsupported_layers(unet)
    if unsupported:
        raise CheckpointError(
            f"the UNet has {unsupported}, which no context can be taken from", "--without context"
        )
    context = Context(unet)
    for name, layers in cross_attentions(unet).items():
        for i, layer in enumerate(layers):
            layer.set_processor(GivenKeysValues(name, 2 * i))
            layer.to_k = layer.to_v = nn.Identity()
            if reads_picture(layer):
                del layer.to_k_ip, layer.to_v_ip
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


def is_of_context(layer: str) -> bool:
    """Returns whether a UNet's layer of this name is one that split_context moves."""
    return bool(re.match(r"(time|add)_embedding\.|.*(\.attn2\.to_[kv]|\.time_emb_proj)$", layer))


def unsupported_layers(unet: Any) -> str:
    """Returns what a UNet has that Context does not compute, in words, or "". Stable Diffusion's has none."""
    if unet.time_embed_act is not None or any(
        not isinstance(resnet.nonlinearity, nn.SiLU) or resnet.skip_time_act for resnet in resnets(unet)
    ):
        return "time embeddings that are activated in another way"
    layers = [layer for group in cross_attentions(unet).values() for layer in group]
    if any(layer.norm_cross or layer.norm_k or layer.norm_q for layer in layers):
        return "cross-attention that normalises its keys"
    return ""


def context_sizes(unet: Any) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Returns (2·layers, heads, head width) of each group of cross_attentions, and the width of `times`."""
    heads = {
        name: (2 * len(layers), layers[0].heads, layers[0].to_k.out_features // layers[0].heads)
        for name, layers in cross_attentions(unet).items()
    }
    return heads, sum(resnet.time_emb_proj.out_features for resnet in resnets(unet))


def resnets(unet: nn.Module) -> list[Any]:
    """Returns the blocks that take the time embedding, in the order of the UNet's modules."""
    return [m for m in unet.modules() if getattr(m, "time_emb_proj", None) is not None]


def cross_attentions(unet: nn.Module) -> dict[str, list[Any]]:
    """Returns the layers that attend to the text, grouped by number and width of their heads.

    The name of a group is `keys_values_8x40` for 8 heads of width 40.
    """
    groups: dict[str, list[Any]] = {}
    for layer in attentions(unet):
        if layer.is_cross_attention:
            width = layer.inner_dim // layer.heads
            groups.setdefault(f"keys_values_{layer.heads}x{width}", []).append(layer)
    return groups


def attentions(unet: nn.Module) -> Iterator[Any]:
    """Yields all attention layers, self-attention and cross-attention."""
    for module in unet.modules():
        for name in ("attn1", "attn2"):
            if getattr(module, name, None) is not None:
                yield getattr(module, name)


def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Returns a layer whose output is that of all these layers side by side; they share their input.

    It takes their weights from them one by one, so that memory does not hold both: SDXL's keys and values
    have 1.5 GB.
    """
    has_bias = layers[0].bias is not None
    one = nn.Linear(1, 1, bias=has_bias, device="meta")
    one.in_features, one.out_features = layers[0].in_features, sum(layer.out_features for layer in layers)
    weight = layers[0].weight.new_empty(one.out_features, one.in_features)
    for part, layer in zip(weight.split([layer.out_features for layer in layers]), layers, strict=True):
        part.copy_(layer.weight.detach())
        del layer.weight
    one.weight = nn.Parameter(weight, requires_grad=False)
    if has_bias:
        one.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    join_branches(one, layers)
    return one


class Slice(nn.Module):
    """Returns the columns from `start` to `stop` of its input."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop]


class PassFirst(nn.Module):
    """Returns its first argument."""

    def forward(self, first: Tensor, *_: Any) -> Tensor:
        return first


# ---- attention ----


def attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, picture: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Returns attention (b, n, c) for query (b, n, h·d), key and value (b, h, m, d).

    The arithmetic is that of diffusers' AttnProcessor2_0; with the key and the weighted value of an
    IP-Adapter's `picture`, that of its IPAdapterAttnProcessor2_0.
    """
    batch, tokens, width = query.shape
    query = query.view(batch, tokens, layer.heads, -1).transpose(1, 2)
    attended = F.scaled_dot_product_attention(query, key, value)
    if picture is not None:
        # In single products: TensorRT for RTX 1.7 crashes when it builds the sum of two Attention nodes.
        key, value = picture
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        attended = attended + scores.softmax(-1) @ value
    return layer.to_out[0](attended.transpose(1, 2).reshape(batch, tokens, width))


class GivenKeysValues:
    """An attention processor that takes its keys and values from KeysValues instead of computing them."""

    def __init__(self, name: str, index: int) -> None:
        self.name, self.index = name, index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: KeysValues,
        attention_mask: None = None,
    ) -> Tensor:
        given, of_picture = (encoder_hidden_states.get(prefix + self.name) for prefix in ("", "ip_"))
        assert given is not None
        picture = None if of_picture is None else (of_picture[self.index], of_picture[self.index + 1])
        return attend(attn, attn.to_q(hidden_states), given[self.index], given[self.index + 1], picture)


class TextAndPictureAttention:
    """An attention processor with an IP-Adapter's layers, whose states are TextAndPicture.

    The picture's values are multiplied by its weight, which is the same as multiplying what is attended to.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: TextAndPicture,
        attention_mask: None = None,
    ) -> Tensor:
        text, tokens, weight = encoder_hidden_states
        tokens = tokens.expand(len(text), -1, -1)

        def by_heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        picture = by_heads(attn.to_k_ip(tokens)), by_heads(attn.to_v_ip(tokens) * weight)
        key, value = by_heads(attn.to_k(text)), by_heads(attn.to_v(text))
        return attend(attn, attn.to_q(hidden_states), key, value, picture)


def reads_picture(layer: Any) -> bool:
    """Returns whether a cross-attention has the layers of an IP-Adapter."""
    return hasattr(layer, "to_k_ip")


class FusedSelfAttention:
    """An attention processor that computes queries, keys and values in one product, `attn.to_qkv`."""

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
    """Joins the query, key and value projections of every self-attention into one product, in place."""
    for layer in attentions(unet):
        if not layer.is_cross_attention and not layer.norm_q:
            layer.to_qkv = joined([layer.to_q, layer.to_k, layer.to_v])
            layer.to_q = layer.to_k = layer.to_v = nn.Identity()
            layer.set_processor(FusedSelfAttention())


# ---- upsampling ----


def doublings(latent: tuple[int, int], levels: int) -> list[bool]:
    """Returns for each upsampler, from the smallest map up, whether its output is exactly twice its input.

    Halving a map of odd side rounds up, and upsampling restores the odd side.
    """
    sides = [latent]
    for _ in range(levels):
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    pairs = list(zip(sides[1:], sides, strict=False))
    return [large == (2 * small[0], 2 * small[1]) for small, large in reversed(pairs)]


def rewrite_upsampling(module: nn.Module, exact: Sequence[Sequence[bool]]) -> None:
    """Replaces, in place, every nearest-2× upsampling that a 3×3 convolution follows by an Upsampling.

    `exact` has for each size of latent the result of doublings: an upsampler is replaced only if it exactly
    doubles its map at every size. If `exact` is empty, all are replaced.
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
            move_branch(conv, block.upsamplers[i])


def rewrite_tiny_decoder(layers: nn.Sequential) -> None:
    """Does what rewrite_upsampling does for the decoder of a tiny autoencoder, a sequence of layers."""
    pairs: Any = pairwise(layers)
    for i, (layer, conv) in enumerate(pairs):
        doubles = isinstance(layer, nn.Upsample) and (layer.scale_factor, layer.mode) == (2, "nearest")
        if doubles and is_plain(conv):
            layers[i], layers[i + 1] = Upsampling(conv), nn.Identity()


def is_plain(conv: Any) -> bool:
    """Returns whether a layer is a 3×3 convolution with a padding of 1."""
    return isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.padding == (1, 1)


class Upsampling(nn.Module):
    """Nearest-2× upsampling and the 3×3 convolution after it, as four 2×2 convolutions on the small map.

    An output pixel depends on only 2×2 input pixels, on some of them through several of the 3×3 weights. The
    sums of these weights are the 2×2 weights. This takes 4/9 of the arithmetic, and equals the original up to
    rounding, at the borders too.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.corners = nn.ModuleList(corner(conv, row, column) for row in (0, 1) for column in (0, 1))

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        # (b, c, h, w) → (b, c', 2h, 2w)
        batch, _, height, width = hidden_states.shape
        # The upper left output pixel of an input pixel depends on its upper and left neighbours.
        corners = [
            conv(F.pad(hidden_states, (1 - i % 2, i % 2, 1 - i // 2, i // 2)))
            for i, conv in enumerate(self.corners)
        ]
        return F.pixel_shuffle(torch.stack(corners, 2).reshape(batch, -1, height, width), 2)


def corner(conv: nn.Conv2d, row: int, column: int) -> nn.Conv2d:
    """Returns the 2×2 convolution for the output pixels of even (0) or odd (1) rows and columns."""
    one = nn.Conv2d(conv.in_channels, conv.out_channels, 2, bias=conv.bias is not None, device="meta")
    one.weight = nn.Parameter(corner_kernel(conv.weight, row, column), requires_grad=False)
    one.bias = conv.bias
    return one


def corner_kernel(weight: Tensor, row: int, column: int) -> Tensor:
    """Returns the 2×2 weights (o, c, 2, 2) of `corner`, from the 3×3 weights (o, c, 3, 3)."""

    def halves(weight: Tensor, dimension: int, odd: int) -> Tensor:
        one, two, three = weight.unbind(dimension)
        return torch.stack([one + two, three] if odd else [one, two + three], dimension)

    return halves(halves(weight, 2, row), 3, column)
