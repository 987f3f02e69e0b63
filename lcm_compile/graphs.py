"""A stage as a static graph: its contract, and the file that it is exported to. No torch, no hardware."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lcm_compile.precisions import Precision

# The one stage of a bundle that draws a whole picture in one call, and the rewrites that it needs.
DRAW = "draw"


@dataclass(frozen=True)
class TensorSpec:
    """One array at a stage's edge. `dtype` is NumPy's name: float32 but for tokens and 8-bit pictures."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str


@dataclass(frozen=True)
class StageContract:
    """A static graph's inputs and outputs, in order. The pipeline reads nothing else about a stage."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """A stage as a file that a backend builds from; weights over 2 GB lie beside it."""

    path: Path
    precision: Precision
    contract: StageContract

    @property
    def weights(self) -> Path:
        """Where an ONNX graph keeps weights that are too large for its own file."""
        return self.path.with_name(f"{self.path.name}.data")


STAGES = ("encode", "context", "step", "decode")  # the context may be part of the step
