"""The LoRAs of a request, as the arrays that a bundle's stages take: see LoraInputs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.bundles.manifest import PipelineSettings
from lcm_compile.errors import UsageError, first_few
from lcm_compile.graphs import DOWN, STRENGTHS, UP, StageContract, is_lora_input
from lcm_compile.pipeline.loop import Arrays, Runners
from lcm_compile.pipeline.request import Request
from lcm_compile.spec import LoraSpec, containing_part

# What a picture is drawn with: the weights of a bundle's own LoRAs, and the files in its slots with what
# tells whether one has changed.
Choice = tuple[tuple[LoraSpec, ...], tuple[tuple[LoraSpec, Path, int, int], ...]]
NO_LORAS: Choice = ((), ())
KEPT = 4  # choices whose arrays stay on the device
# Called with a LoRA's file, the slots' rank, and the largest share of a layer's change that is left out.
Told = Callable[[Path, int, float], None]


def warn_of_error(path: Path, rank: int, error: float) -> None:
    """Warns of a LoRA whose form in a slot is not exact."""
    warnings.warn(error_text(path, rank, error), stacklevel=2)


def error_text(path: Path, rank: int, error: float) -> str:
    """Returns in words how much of a LoRA a slot has no room for."""
    share = f"{error:.2%} of a layer's change"
    return f"{path} is no product of matrices of rank {rank}: the slot leaves out up to {share}"


class Loras:
    """Makes the LoRA inputs of a bundle's stages, and keeps those of the last choices.

    Several threads may use it at the same time. `told` is called for each LoRA whose form is not exact.
    """

    def __init__(self, runners: Runners, settings: PipelineSettings) -> None:
        self._runners = runners
        self._settings = settings
        self._arrays: dict[Choice, dict[str, Arrays]] = {}  # the last used one is at the end
        self._read: dict[tuple[Path, int, int], Mapping[str, Any]] = {}
        self._modules: Mapping[str, Any] = {}
        self._lock = threading.Lock()
        self.told: Told = warn_of_error
        self.proof_factors = False  # whether empty slots have the factors of the proof: see seeded

    @property
    def usual(self) -> Choice:
        """What a request that says nothing of LoRAs is drawn with."""
        return self._settings.loras, ()

    def choose(self, request: Request) -> Choice:
        """Returns what a request is drawn with. Raises LoraError if one of its LoRAs can't be found."""
        given = {lora.source: lora for lora in request.lora_weights}
        weights = tuple(given.get(lora.source, lora) for lora in self._settings.loras)
        return weights, tuple(map(found, request.loras))

    def inputs(self, choice: Choice, stage: str) -> Arrays:
        """Returns the LoRA inputs of a stage, on the device. Raises LoraError if a LoRA does not fit."""
        with self._lock:
            arrays = self._arrays.pop(choice, None) or self._make(choice)
            self._arrays[choice] = arrays
            while len(self._arrays) > KEPT:
                del self._arrays[next(iter(self._arrays))]
        return arrays.get(stage, {})

    def _make(self, choice: Choice) -> dict[str, Arrays]:
        weights, files = choice
        factors = [(lora, self._factors(path, size, time)) for lora, path, size, time in files]
        made: dict[str, Arrays] = {}
        for stage, runner in self._runners.items():
            specs = [spec for spec in runner.contract.inputs if is_lora_input(spec.name)]
            arrays: dict[str, np.ndarray] = {}
            for spec in specs:
                if spec.name == STRENGTHS:
                    arrays[STRENGTHS] = strengths(weights, self._settings.lora_parts)
                elif self.proof_factors and not files:
                    arrays[spec.name] = seeded(spec.name, spec.shape)
                else:
                    arrays[spec.name] = self._slots(spec.name, spec.shape, factors)
            made[stage] = {name: runner.to_device(array) for name, array in arrays.items()}
        return made

    def _slots(
        self, name: str, shape: tuple[int, ...], factors: Sequence[tuple[LoraSpec, Mapping[str, Any]]]
    ) -> np.ndarray:
        """Returns the factors of each slot for one input, zeros where there are none."""
        slots = self._settings.lora_slots
        assert slots is not None
        array = np.zeros(shape, np.float32)
        side = DOWN if name.startswith(DOWN) else UP
        for i, (lora, layers) in enumerate(factors):
            if (layer := layers.get(name.removeprefix(side))) is None:
                continue
            down, up, part = layer
            start = i * slots.rank
            if side == DOWN:
                array[start : start + len(down)] = down
            else:
                array[:, start : start + len(down)] = up * np.float32(lora.strength_of(part))
        return array

    def _factors(self, path: Path, size: int, time: int) -> Mapping[str, Any]:
        """Returns (down, up, part) of each layer of a LoRA's file, by the layer's name. Reads it once."""
        known = self._read.pop((path, size, time), None)
        if known is None:
            known = self._read_factors(path)
        self._read[path, size, time] = known
        while len(self._read) > KEPT:
            del self._read[next(iter(self._read))]
        return known

    def _layers(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of the weight of each layer that has slots, by component and layer."""
        specs = [spec for runner in self._runners.values() for spec in runner.contract.inputs]
        ins = {s.name.removeprefix(DOWN): s.shape[1:] for s in specs if s.name.startswith(DOWN)}
        outs = {s.name.removeprefix(UP): s.shape[0] for s in specs if s.name.startswith(UP)}
        return {name: (outs[name], *shape) for name, shape in ins.items()}

    def _read_factors(self, path: Path) -> Mapping[str, Any]:
        from lcm_compile.lora.factors import in_slots, modules_of_layers

        slots = self._settings.lora_slots
        assert slots is not None
        self._modules = self._modules or modules_of_layers(self._layers())
        layers, error = in_slots(path, self._modules, slots.rank)
        if error:
            self.told(path, slots.rank, error)
        return layers


def found(lora: LoraSpec) -> tuple[LoraSpec, Path, int, int]:
    """Returns a LoRA for a slot with its file, and what tells whether that has changed. Raises LoraError."""
    from lcm_compile.lora.find import find_lora  # not before a picture has one: the first would take longer

    path = find_lora(lora)
    stat = path.stat()
    return lora, path, stat.st_size, stat.st_mtime_ns


def strengths(weights: Sequence[LoraSpec], parts: Sequence[str]) -> np.ndarray:
    """Returns the weight of each LoRA in each part of the model: float32 (LoRAs, parts)."""
    return np.asarray([[lora.strength_of(part) for part in parts] for lora in weights], np.float32)


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns small factors for the proof's picture, which a name and a shape always have alike.

    With zeros, which draw the same picture as no slots at all, the proof would not see what slots do.
    """
    draws = np.random.default_rng([*name.encode()])
    size = 0.1 if name.startswith(DOWN) else 0.02
    width = np.sqrt(np.prod(shape[1:]))  # of the inputs that each output sums
    return (size / width * draws.standard_normal(shape, np.float32)).astype(np.float32)


def check_loras(request: Request, settings: PipelineSettings) -> None:
    """Raises UsageError if a bundle with these settings can't draw with a request's LoRAs."""
    names = [lora.source for lora in settings.loras]
    for lora in request.lora_weights:
        if lora.source not in names:
            raise UsageError(
                f"this bundle has no LoRA {lora.source} whose weight can be changed"
                + (f"; it has {first_few(names)}" if names else ""),
                "build with --lora FILE:runtime, whose name is the file's",
            )
        for part in lora.strengths:
            if part != "text" and not any(part in with_containing(own) for own in settings.lora_parts):
                raise UsageError(
                    f"LoRA {lora.source} has a strength for {part}, which this bundle's model lacks",
                    f"give strengths for these only: {', '.join(settings.lora_parts)}",
                )
    slots = settings.lora_slots
    if request.loras and slots is None:
        raise UsageError(
            "this bundle has no slots for LoRAs", "build with --lora-slots 1; or fuse it: build --lora FILE"
        )
    if slots is not None and len(request.loras) > slots.count:
        raise UsageError(
            f"{len(request.loras)} LoRAs for {slots.count} slots",
            f"build with --lora-slots {len(request.loras)}",
        )
    for lora in request.loras:
        if lora.name is not None:
            raise UsageError(f"a LoRA in a slot takes no :runtime, as {lora.source} has", "drop it")


def with_containing(part: str) -> list[str]:
    """Returns a part and those that contain it."""
    found = [part]
    while found[-1]:
        found.append(containing_part(found[-1]))
    return found


def check_contracts(settings: PipelineSettings, contracts: Sequence[StageContract]) -> str | None:
    """Returns which LoRA input of a bundle's stages has another shape than its settings ask for, or None."""
    slots, wanted = settings.lora_slots, (len(settings.loras), len(settings.lora_parts))
    for contract in contracts:
        for spec in contract.inputs:
            if not is_lora_input(spec.name):
                continue
            if spec.name == STRENGTHS:
                fits = spec.shape == wanted
            else:
                ranks = slots.count * slots.rank if slots else 0
                fits = spec.shape[0 if spec.name.startswith(DOWN) else 1] == ranks
            if not fits:
                return f"{contract.name}'s {spec.name} {spec.shape}"
    return None
