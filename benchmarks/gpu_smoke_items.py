"""What gpu_smoke tries: each function is called in a process of its own, where heavy packages are imported.

Each is given `note`, which keeps what it finds at once, the target's name, and a folder that all share.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.engines import BACKENDS, find_backend, find_target_here, installed_version
from lcm_compile.engines.gpu import gpu_here, why_no_gpu
from lcm_compile.families import SAMPLE_PROMPT
from lcm_compile.targets import TARGETS, GpuTarget

if TYPE_CHECKING:
    from lcm_compile.spec import BuildSpec

PACKAGES = (
    *("lcm-compile", "torch", "triton", "diffusers", "transformers", "numpy", "onnx", "onnxscript"),
    *("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu13", "tensorrt-rtx"),
)
SEED, STEPS = 7, 4
WARM_UP = 3
DEMO_ROUNDS, SDXL_ROUNDS = 20, 10

Found = dict[str, Any]
Note = Callable[..., None]
Draw = Callable[[], np.ndarray]


class Missing(Exception):
    """What can't be tried here, and why."""


def examine_machine(note: Note, target: str, work: Path) -> None:
    versions = {name: installed_version((name,)) for name in PACKAGES}
    processors = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    note(
        python=sys.version.split()[0],
        processor=processors[0].partition(":")[2].strip() if processors else "",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        versions={name: version and version.split()[1] for name, version in versions.items()},
    )
    if target == "cpu":
        note(target="cpu")
        return
    import torch

    note(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    if (here := gpu_here()) is None:
        raise Missing(why_no_gpu())
    name = find_target_here()
    note(
        gpu=here[0],
        compute_capability=here[1],
        gpu_memory_bytes=torch.cuda.get_device_properties(0).total_memory,
        driver=driver_version(),
        target=None if TARGETS[name].is_cpu else name,
    )
    if TARGETS[name].is_cpu:
        raise Missing(f"no target has the compute capability {here[1]}: lcm-compile targets")


def driver_version() -> str:
    """As nvidia-smi tells it: sandboxes hide the driver's own file."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"not told: {error}"


def examine_backends(note: Note, target: str, work: Path) -> None:
    """What `doctor` does, backend by backend: where one ends the process, the report tells which."""
    from lcm_compile.doctor import examine_backend

    found: Found = {}
    for name in BACKENDS:
        note(backends={**found, name: "began"})
        found[name] = examine_backend(name).to_dict()
    note(backends=found)


def draw_demo(note: Note, target: str, work: Path, backend: str) -> None:
    from lcm_compile.spec import BuildSpec

    build_and_draw(note, BuildSpec("demo", target, backend=backend), DEMO_ROUNDS)


def draw_portable(note: Note, target: str, work: Path) -> None:
    """The demo on engines of TensorRT for RTX that name no compute capability: its portable ones."""
    from lcm_compile.compile import export
    from lcm_compile.engines import tensorrt, tensorrt_rtx
    from lcm_compile.parity import compare_calls, read_calls
    from lcm_compile.pipeline import LcmPipeline
    from lcm_compile.runners import load_tokenizers
    from lcm_compile.spec import BuildSpec

    if reason := tensorrt_rtx.cannot_run(TARGETS[target]):
        raise Missing(reason)
    import tensorrt_rtx as trt

    with tempfile.TemporaryDirectory(dir=work) as folder:
        graphs = Path(folder) / "graphs"
        parity, runners = {}, {}
        exported = export(BuildSpec("demo", precision="fp16"), graphs, report=noting(note))
        for stage in exported.stages:
            name = stage.contract.name
            note(building=name)
            path = tensorrt.build_with(trt, exported.graph(graphs, stage), Path(folder), lambda config: None)
            note(loading=name)
            runners[name] = tensorrt_rtx.load(path, stage.contract, TARGETS[target])
            calls = read_calls(graphs / "proof" / f"{name}.npz", stage.contract)
            parity[name] = round(compare_calls(runners[name], calls), 2)
            note(parity=parity)
        tokenizers = load_tokenizers(graphs, exported.pipeline)
        with LcmPipeline(exported.pipeline, runners, tokenizers) as pipeline:
            measure(note, TARGETS[target], pipeline, DEMO_ROUNDS, graphs / "proof")


def write_weights(note: Note, target: str, work: Path) -> None:
    """SDXL with random weights in fp16, as a diffusers folder: one set of weights for engines and rival."""
    from lcm_compile.fuse import fuse
    from lcm_compile.spec import BuildSpec

    fuse(BuildSpec("sdxl", weights="random"), work / "weights", "fp16", noting(note))


def draw_sdxl(note: Note, target: str, work: Path, backend: str) -> None:
    """The checkpoint in `work/weights` on engines, and then in turns with diffusers."""
    from lcm_compile.spec import BuildSpec

    base = str(work / "weights")
    # Its own VAE is named, or one of a machine's hub cache would be built where diffusers takes this one.
    spec = BuildSpec(base, target, no_lcm=True, vae=base, backend=backend)
    build_and_draw(note, spec, SDXL_ROUNDS, rival=base)


def build_and_draw(note: Note, spec: BuildSpec, rounds: int, rival: str | None = None) -> None:
    """Builds, which verifies, and measures. The precision is the target's default: fp16 on a GPU."""
    from lcm_compile.compile import build
    from lcm_compile.plan import default_precision
    from lcm_compile.runners import load

    target = TARGETS[spec.gpu]
    if reason := find_backend(spec.backend).cannot_build(target, default_precision(target)):
        raise Missing(reason)
    bundle = build(spec, report=noting(note))
    manifest = bundle.manifest
    note(
        precision=manifest.stages[0].precision,
        fp32_layers={stage.contract.name: len(stage.fp32_layers) for stage in manifest.stages},
        # Built where they run: what parity.verify found on the engines themselves, in dB.
        parity={name: round(figure.db, 2) for name, figure in manifest.parity.items()},
    )
    with load(bundle) as pipeline:
        note(load_ms=round(pipeline.load_ms, 1))
        measure(note, target, pipeline, rounds, bundle.folder / "proof", rival)


def measure(
    note: Note, target: GpuTarget, pipeline: Any, rounds: int, proof: Path, rival: str | None = None
) -> None:
    """Warm latency of each stage on its recorded inputs and of a whole picture; `rival` is a base."""
    from lcm_compile.parity import psnr_db, read_calls
    from lcm_compile.pipeline import Request

    stages = {}
    for name, runner in pipeline.runners.items():
        arrays = read_calls(proof / f"{name}.npz", runner.contract)[0][0]
        inputs = {key: runner.to_device(array) for key, array in arrays.items()}
        stages[name] = timed({name: partial(runner, inputs)}, target, rounds)[name]
        note(stage_ms=stages)
    request = Request(SAMPLE_PROMPT, SEED, steps=STEPS)
    draws: dict[str, Draw] = {"engines": lambda: pipeline.draw(request).pictures[0]}
    note(picture_ms=timed(draws, target, rounds), memory=gpu_memory(target))
    if rival is not None:
        draws["diffusers"] = eager(target, rival)
        note(in_turns_ms=timed(draws, target, rounds), memory_of_both=gpu_memory(target))
        note(diffusers_psnr_db=round(psnr_db(draws["diffusers"](), draws["engines"]()), 2))


def eager(target: GpuTarget, base: str) -> Draw:
    """diffusers as its users run it: eager, in the engines' precision, with LCMScheduler."""
    import torch
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    from lcm_compile.pipeline import eight_bits

    dtype = torch.float32 if target.is_cpu else torch.float16
    pipe = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=dtype, add_watermarker=False)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    # The engines decode in half precision too; SDXL's config would have diffusers decode in fp32.
    pipe.vae.register_to_config(force_upcast=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cpu" if target.is_cpu else "cuda")

    def draw() -> np.ndarray:
        generator = torch.Generator("cpu").manual_seed(SEED)
        options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "np"}
        return eight_bits(pipe(SAMPLE_PROMPT, generator=generator, **options).images[0])

    return draw


def timed(calls: Mapping[str, Callable[[], Any]], target: GpuTarget, rounds: int) -> dict[str, Found]:
    """Milliseconds of calls that take turns (A B A B), each waited for: every sample, and the median."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + rounds):
        for name, call in calls.items():
            wait(target)
            start = time.perf_counter()
            call()
            wait(target)
            if i >= WARM_UP:
                samples[name].append(round((time.perf_counter() - start) * 1000, 3))
    return {name: {"median": statistics.median(ms), "samples": ms} for name, ms in samples.items()}


def wait(target: GpuTarget) -> None:
    if not target.is_cpu:
        import torch

        torch.cuda.synchronize()


def gpu_memory(target: GpuTarget) -> Found:
    """Bytes: the most that torch's allocator held in this process, and all that the device holds now."""
    if target.is_cpu:
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"torch_peak_bytes": torch.cuda.max_memory_allocated(), "device_used_bytes": total - free}


def noting(note: Note) -> Callable[[str, Any], None]:
    """A build's report as parts of what is found; the one that has not ended has no cost."""
    parts: Found = {}

    def report(part: str, cost: Any) -> None:
        parts[part] = None if cost is None else asdict(cost)
        note(parts=parts)

    return report
