"""The layers of an IP-Adapter: keys and values of a picture's tokens, for each cross-attention of a UNet."""

from __future__ import annotations

from typing import Any

from torch import nn

from lcm_compile.errors import CheckpointError
from lcm_compile.stages.rewrites import TextAndPictureAttention, attentions


def check_ip_layers(unet: nn.Module, layers: nn.Module) -> None:
    """Raises CheckpointError if an IP-Adapter's layers are not those that a UNet needs.

    `layers` is a component that `checkpoint/ip_adapter.py` makes. Neither needs weights.
    """
    needed = {number: tuple(layer.to_k.weight.shape) for number, layer in numbered(unet).items()}
    found = {number: tuple(pair["to_k_ip"].weight.shape) for number, pair in pairs(layers).items()}
    if needed == found:
        return
    widths = [", ".join(sorted({str(shape[0]) for shape in shapes.values()})) for shapes in (found, needed)]
    raise CheckpointError(
        f"the IP-Adapter is for {len(found)} cross-attentions, of widths {widths[0]}, and the base's UNet "
        f"has {len(needed)}, of widths {widths[1]}",
        "give an IP-Adapter made for this base to --ip-adapter",
    )


def add_ip_layers(unet: nn.Module, layers: nn.Module) -> None:
    """Adds an IP-Adapter's layers to the cross-attentions of a UNet, in place.

    Its forward then takes TextAndPicture as its hidden states. Raises CheckpointError as check_ip_layers.
    """
    check_ip_layers(unet, layers)
    given = pairs(layers)
    for number, layer in numbered(unet).items():
        layer.to_k_ip, layer.to_v_ip = given[number]["to_k_ip"], given[number]["to_v_ip"]
        layer.set_processor(TextAndPictureAttention())


def numbered(unet: nn.Module) -> dict[str, Any]:
    """Returns a UNet's cross-attentions by the numbers that IP-Adapters' files give them.

    All attentions are counted in the order of the UNet's modules: self-attentions have even numbers.
    """
    found = [layer for layer in attentions(unet) if layer.is_cross_attention]
    return {str(2 * i + 1): layer for i, layer in enumerate(found)}


def pairs(layers: nn.Module) -> dict[str, Any]:
    """Returns the two layers of each number."""
    return dict(layers.named_children())
