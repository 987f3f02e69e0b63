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
# The stage that turns the picture for an IP-Adapter into tokens, which are read beside those of the text.
IP_IMAGE = "ip-image"
# The inputs of whatever reads these tokens: the tokens, and how strongly they count.
IP_TOKENS, IP_WEIGHT = "ip_tokens", "ip_weight"

# The note at a convolution in 8 bits by which an exported graph tells the scales of its output's channels.
OUTPUT_SCALES = "lcm_compile.output_scales"
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
class LoraInputs:
    """What of a bundle's LoRAs is an input of its stages, and not fused.

    `names` are the LoRAs whose weights are: `lora_strengths` (LoRAs, parts) has one for each of the `parts`
    of the model. With `slots`, each layer takes the factors of that many LoRAs of up to `rank`.
    """

    names: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    slots: int = 0
    rank: int = 0

    def __bool__(self) -> bool:
        return bool(self.names or self.slots)


STRENGTHS = "lora_strengths"
DOWN, UP = "lora_down.", "lora_up."  # before the names of the component and the layer


def is_lora_input(name: str) -> bool:
    """Returns whether a stage's input is one of LoraInputs."""
    return name == STRENGTHS or name.startswith((DOWN, UP))


@dataclass(frozen=True)
class ExportedGraph:
    """A stage exported to a file, from which a backend builds an engine."""

    path: Path
    precision: Precision
    contract: StageContract

    @property
    def weights(self) -> Path:
        """The file next to an ONNX graph that holds its weights if they are large."""
        return self.path.with_name(f"{self.path.name}.data")


# The stages of a bundle in their order. `context` may be part of `step`.
STAGES = ("encode", "context", "step", "decode")
# The stages of ControlNets, which each step runs before `step`; most bundles have none.
CONTROLS = ("control", "control-2", "control-3", "control-4")
# The stages of T2I-Adapters, which each picture that guides runs once.
T2I_ADAPTERS = ("t2i-adapter", "t2i-adapter-2", "t2i-adapter-3", "t2i-adapter-4")
# What is added to a base to guide it by pictures, in the order in which these are given.
GUIDES = (*CONTROLS, *T2I_ADAPTERS)
ALL_STAGES = ("encode", IP_IMAGE, *T2I_ADAPTERS, "context", *CONTROLS, "step", "decode", ENCODE_IMAGE)
