"""What the process that builds knows of the models that others prepare. It needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcm_compile.builder.plan import ExportPlan
from lcm_compile.graphs import GUIDES, ExportedGraph
from lcm_compile.proof.recording import Call
from lcm_compile.spec import LoraSpec

if TYPE_CHECKING:
    from lcm_compile.lora.read import Lora


@dataclass(frozen=True)
class Prepared:
    """What is kept of a stage after its weights are removed from memory.

    `twin` is the graph for the proof's pictures: it is `graph` itself if these have the bundle's shape.
    `reference` are the stage's calls in fp32. If only the exported module can be checked, `cast` are that
    module's calls and `cast_db` is their signal-to-noise ratio in dB. `calibration` are the text encoder's
    calls in fp32, one list for each picture that scales an 8-bit step. `torch_db` is what torch itself
    reaches in the stage's precision, or None if it was not measured.
    """

    graph: ExportedGraph
    twin: ExportedGraph
    reference: list[Call]
    peaks: dict[str, tuple[float, float]]
    fp32_layers: tuple[str, ...]
    cast_db: float | None = None
    cast: list[Call] | None = None
    quantized_layers: tuple[str, ...] = ()
    calibration: Sequence[list[Call]] = ()
    torch_db: float | None = None


class LoraFiles:
    """The LoRAs of a plan. Each file is read once in a process; a child process reads them again."""

    def __init__(self, plan: ExportPlan) -> None:
        self._plan = plan
        self._read: list[tuple[Lora, LoraSpec]] | None = None

    def read(self) -> list[tuple[Lora, LoraSpec]]:
        """Returns each LoRA with the strengths it is fused with. Raises LoraError if one can't be read."""
        from lcm_compile.lora.read import read_loras

        if self._read is None:
            self._read = read_loras(self._plan.loras, self._plan.spec.lora_skip)
        return self._read

    def __getstate__(self) -> dict[str, Any]:
        return {"_plan": self._plan, "_read": None}


def beside(name: str, stages: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which of a model's stages must be run to record one: for what guides it, all after that.

    The stages before it are replayed.
    """
    names = [*stages]
    return {n: stages[n] for n in names[names.index(name) + 1 :]} if name in GUIDES else {}
