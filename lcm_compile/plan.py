"""What a build would do and why: every input resolved, hashed and compared with the bundle that exists.

Needs neither torch nor diffusers, so that a hit answers at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lcm_compile
from lcm_compile.bundle import check_destination, key_digest, read_manifest
from lcm_compile.checkpoints import Checkpoint, check_size, open_checkpoint
from lcm_compile.engines import Backend, choose_backend, find_backend, installed_version
from lcm_compile.errors import BackendError, BundleError
from lcm_compile.export import EXPORTERS
from lcm_compile.lora import find_lcm_lora, find_lora
from lcm_compile.pipeline import STAGES
from lcm_compile.random_base import open_random
from lcm_compile.spec import BuildSpec, LoraSpec, Shape
from lcm_compile.store import Digests, bundles_folder
from lcm_compile.targets import TARGETS, GpuTarget, find_target
from lcm_compile.vae import download_fixed_vae, overflows, with_fixed_vae, with_own_vae, with_vae

REASONS_SHOWN = 8
NAME_LENGTH = 40
LARGE_BYTES = 1 << 30
TWIN_LATENT = 32  # a side
ENGINE = "engine"
GRAPH = "graph, on ONNX Runtime's CPU provider"
MODULE = "torch module that was exported"
# How the names of those inputs begin that a command line chooses.
ASKED = ("LoRA", "backend", "precision", "shape", "target")


@dataclass(frozen=True)
class PlannedLora:
    role: str  # "lcm" or "style"
    spec: LoraSpec
    path: Path
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A build with everything settled. `reasons` tell why it is a hit, or what differs."""

    spec: BuildSpec
    checkpoint: Checkpoint
    loras: tuple[PlannedLora, ...]
    target: GpuTarget
    backend_name: str
    shape: Shape
    precisions: Mapping[str, str]
    key: Mapping[str, str]
    folder: Path
    hit: bool
    reasons: tuple[str, ...]

    @property
    def backend(self) -> Backend:
        return find_backend(self.backend_name)

    @property
    def is_large(self) -> bool:
        """Whether each stage is made in a process of its own, so that one model at a time is in memory."""
        return self.checkpoint.random_seed is not None or self.checkpoint.weight_bytes >= LARGE_BYTES

    @property
    def checked(self) -> str:
        """What is compared with torch on this machine: the engine, where it runs here; else its graph.

        ONNX Runtime's CPU provider has no bf16: there the torch module that was exported stands for it.
        """
        if self.backend.cannot_run(self.target) is None:
            return ENGINE
        onnxruntime = find_backend("onnxruntime")
        able = all(onnxruntime.cannot_build(TARGETS["cpu"], p) is None for p in self.precisions.values())
        return GRAPH if able and self.backend.GRAPH_FORMAT == "onnx" else MODULE

    @property
    def proof_shape(self) -> Shape:
        """The pictures that parity is measured on: the bundle's own, or smaller ones.

        A large model that runs on another machine has a twin: the same weights as a graph for small
        pictures, which a CPU computes in seconds.
        """
        side = TWIN_LATENT * self.checkpoint.vae_factor
        small = self.shape.height * self.shape.width <= side * side
        if self.checked == ENGINE or not self.is_large or small:
            return self.shape
        return Shape(1, side, side)

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": str(self.checkpoint.location),
            "vae": self.checkpoint.components["vae"].location,
            "architecture": self.checkpoint.architecture,
            "loras": [{"role": p.role, "path": str(p.path), "weight": p.spec.weight} for p in self.loras],
            "target": self.target.to_dict(),
            "backend": self.backend_name,
            "shape": vars(self.shape),
            "precisions": dict(self.precisions),
            "key": key_digest(self.key),
            "bundle": str(self.folder),
            "hit": self.hit,
            "reasons": list(self.reasons),
        }


def make_plan(spec: BuildSpec, out: Path | None = None, force: bool = False) -> Plan:
    """Settles a spec. UsageError, CheckpointError, LoraError or BackendError where that can't be."""
    target = find_target(spec.gpu)
    if spec.backend != "auto":
        find_backend(spec.backend)
    if out is not None:
        check_destination(out)
    precision = spec.precision if spec.precision != "auto" else default_precision(target)
    checkpoint = open_base(spec, half=precision == "fp16")
    if spec.vae or precision != "fp16" or not overflows(checkpoint):
        return settle(spec, checkpoint, target, precision, out, force)
    # The hub is asked for the fixed VAE when there is something to build, and not for a hit.
    fixed = with_fixed_vae(checkpoint)
    if fixed is None:
        plan = settle(spec, checkpoint, target, precision, out, force)
        if plan.hit:
            return plan
        reason = download_fixed_vae()
        fixed = with_fixed_vae(checkpoint) or with_own_vae(checkpoint, reason or "it is not whole")
    return settle(spec, fixed, target, precision, out, force)


def open_base(spec: BuildSpec, half: bool) -> Checkpoint:
    """The base that a spec names, with its VAE if it names one."""
    seed = spec.random_seed
    if seed is None:
        checkpoint = open_checkpoint(spec.base, spec.config, half)
    else:
        checkpoint = open_random(spec.base, seed)
    return with_vae(checkpoint, spec.vae, half) if spec.vae else checkpoint


def settle(
    spec: BuildSpec, checkpoint: Checkpoint, target: GpuTarget, precision: str, out: Path | None, force: bool
) -> Plan:
    height, width = checkpoint.default_size
    shape = Shape(spec.batch, spec.height or height, spec.width or width)
    check_size(checkpoint, shape.height, shape.width)
    precisions = dict.fromkeys(STAGES, precision)
    backend_name = settle_backend(spec, target, precision)
    digests = Digests()
    loras = find_loras(spec, checkpoint, digests)
    backend = find_backend(backend_name)
    key = {
        **export_key(checkpoint, loras, shape, precisions, backend.GRAPH_FORMAT, digests),
        **engine_key(backend_name, backend, target),
    }
    digests.save()
    folder = out if out is not None else bundles_folder() / bundle_name(checkpoint, target, key)
    hit, reasons = explain(key, folder, spec, force)
    return Plan(
        spec, checkpoint, loras, target, backend_name, shape, precisions, key, folder, hit, tuple(reasons)
    )


def default_precision(target: GpuTarget) -> str:
    return "fp32" if target.is_cpu else "fp16"


def settle_backend(spec: BuildSpec, target: GpuTarget, precision: str) -> str:
    if spec.backend == "auto":
        return choose_backend(target, precision)
    reason = find_backend(spec.backend).cannot_build(target, precision)
    if reason:
        raise BackendError(
            f"{spec.backend} can't build {precision} engines for {target.name} here: {reason}",
            "lcm-compile doctor shows what works here; --backend auto chooses",
        )
    return spec.backend


def find_loras(spec: BuildSpec, checkpoint: Checkpoint, digests: Digests) -> tuple[PlannedLora, ...]:
    """The LCM-LoRA first (given, or the family's own), then the styles in their order."""
    found: list[tuple[str, LoraSpec, Path]] = []
    if spec.lcm_lora:
        found.append(("lcm", spec.lcm_lora, find_lora(spec.lcm_lora)))
    elif not (spec.no_lcm or checkpoint.has_guidance_embedding or checkpoint.random_seed is not None):
        path = find_lcm_lora(checkpoint.family, spec.base)
        assert checkpoint.family is not None
        found.append(("lcm", LoraSpec(checkpoint.family.lcm_lora or str(path)), path))
    found += [("style", lora, find_lora(lora)) for lora in spec.loras]
    return tuple(PlannedLora(role, lora, path, digests.sha256(path)) for role, lora, path in found)


def export_key(
    checkpoint: Checkpoint,
    loras: tuple[PlannedLora, ...],
    shape: Shape,
    precisions: Mapping[str, str],
    graph_format: str,
    digests: Digests,
) -> dict[str, str]:
    """All that the exported graphs depend on, as content: no path is in it."""
    key = {f"base {name}": digest for name, digest in checkpoint.content(digests.sha256).items()}
    for i, lora in enumerate(loras, 1):
        key[f"LoRA {i}"] = lora.sha256
        key[f"LoRA {i} weight"] = repr(lora.spec.weight)
    key["shape"] = str(shape)
    key |= {f"precision of {stage}": precision for stage, precision in precisions.items()}
    key["graph format"] = graph_format
    for package in EXPORTERS[graph_format]:
        key[f"{package} version"] = str(installed_version((package,)))
    key["lcm-compile"] = f"{lcm_compile.__version__} {code_digest(digests)}"
    return key


def engine_key(name: str, backend: Backend, target: GpuTarget) -> dict[str, str]:
    """All that the engines depend on besides the graphs."""
    return {
        "target": f"{target.name} {target.compute_capability or ''}".strip(),
        "backend": name,
        "backend version": str(installed_version(backend.PACKAGES)),
        "builder options": json.dumps(backend.options(target), sort_keys=True),
    }


def code_digest(digests: Digests) -> str:
    """Of this package's own source: a change of how graphs are shaped is a miss too."""
    from lcm_compile import engines, export

    folders = [Path(module.__path__[0]) for module in (lcm_compile, export, engines)]
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256("".join(digests.sha256(path) for path in files).encode()).hexdigest()[:16]


def bundle_name(checkpoint: Checkpoint, target: GpuTarget, key: Mapping[str, str]) -> str:
    base = "".join(c if c.isalnum() else "-" for c in checkpoint.name)[:NAME_LENGTH] or "base"
    return f"{base}-{target.name}-{key_digest(key)[:16]}"


def explain(key: Mapping[str, str], folder: Path, spec: BuildSpec, force: bool) -> tuple[bool, list[str]]:
    """Whether `folder` already holds this build, and why; a miss is told against the nearest bundle."""
    existing = existing_key(folder)
    if existing == dict(key):
        if force:
            return False, [f"--force: {folder.name} holds this very build and is built again"]
        return True, [f"all {len(key)} inputs are those of {folder.name}"]
    nearest, name = existing, folder.name
    if nearest is None:
        candidates = [
            (candidate, other.name)
            for other in sorted(bundles_folder().glob("[!.]*"))
            if (candidate := existing_key(other)) is not None
        ]
        if not candidates:
            return False, ["there is no bundle yet"]
        nearest, name = min(candidates, key=lambda c: len(differences(key, c[0])))
    changed = differences(key, nearest)
    if not changed:
        return False, [f"there is no bundle at {folder} yet ({name} is the same build)"]
    reasons = [f"differs from {name}:", *changed[:REASONS_SHOWN]]
    if len(changed) > REASONS_SHOWN:
        reasons.append(f"and {len(changed) - REASONS_SHOWN} more inputs")
    return False, reasons


def existing_key(folder: Path) -> dict[str, str] | None:
    try:
        return dict(read_manifest(folder)[0].key)
    except BundleError:
        return None


def differences(new: Mapping[str, str], old: Mapping[str, str]) -> list[str]:
    """Each input that differs, in words, what was asked for first; digests are cut to their first digits."""

    def short(value: str) -> str:
        return value[:12] if len(value) == 64 else value

    told = []
    for name in sorted({*new, *old}, key=lambda name: (not name.startswith(ASKED), name)):
        if name not in old:
            told.append(f"{name} is new ({short(new[name])})")
        elif name not in new:
            told.append(f"{name} is gone (was {short(old[name])})")
        elif new[name] != old[name]:
            told.append(f"{name} changed: {short(old[name])} → {short(new[name])}")
    return told
