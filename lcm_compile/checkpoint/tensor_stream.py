"""Writes safetensors files tensor by tensor: the library's own writer needs all tensors in memory at once.

A file holds the length of the header in 8 bytes, little-endian; then the header, which is JSON with each
tensor's type, shape and byte offsets; then the bytes of the tensors, one after another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import BinaryIO

TYPES = {"fp16": ("F16", 2), "fp32": ("F32", 4)}  # safetensors' name of the type, and bytes per weight


def write_header(
    file: BinaryIO, shapes: Mapping[str, Sequence[int]], precision: str, metadata: Mapping[str, str]
) -> int:
    """Writes the header of a file, and returns how many bytes of tensors must follow.

    The tensors must be written in the order of `shapes`, contiguous and little-endian.
    """
    dtype, width = TYPES[precision]
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    return end
