"""A stage as a static graph: its contract, and the file that it is exported to.

This file needs neither torch nor any hardware.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcm_compile.precisions import Precision

# The single stage of a bundle that draws a complete picture in one call.
DRAW = "draw"
# The stage that turns a picture into a latent, which is the last of a bundle that has it.
ENCODE_IMAGE = "encode-image"

# The input of the step by which an inpainting model is told what it repaints.
MASKED = "masked"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a stage.

    `dtype` is NumPy's name for the type: float32, except for tokens and 8-bit pictures. `meaning` is a
    description in words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True)
class StageContract:
    """The inputs and outputs of a static graph, in order. The pipeline knows nothing else about a stage."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """A stage exported to a file, from which a backend builds an engine."""

    path: Path
    precision: Precision
    contract: StageContract

    @property
    def weights(self) -> Path:
        """The file next to an ONNX graph that holds its weights if they are over 2 GB."""
        return self.path.with_name(f"{self.path.name}.data")


# The stages of a bundle in their order. `context` may be part of `step`.
STAGES = ("encode", "context", "step", "decode")
