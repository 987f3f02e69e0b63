"""safetensors files written tensor by tensor: the library's own writer wants them all in memory at once.

The format: the header's length in 8 bytes, little-endian; the header, JSON, which gives each tensor its type,
shape and place; the tensors' bytes, one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import BinaryIO

TYPES = {"fp16": ("F16", 2), "fp32": ("F32", 4)}


def write_header(
    file: BinaryIO, shapes: Mapping[str, Sequence[int]], precision: str, metadata: Mapping[str, str]
) -> int:
    """Begins a file of tensors that follow in this order; returns how many bytes they must be."""
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
