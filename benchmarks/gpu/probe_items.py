"""The parts of the probe. Each of these functions is called in its own process: see gpu_items.

On a processor the arrays are smaller by `SMALLER`, to try the parts out; the figures then say nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from lcm_compile.benchmarks.gpu import kit
from lcm_compile.benchmarks.gpu.items import Found, Missing, Note, report_path
from lcm_compile.targets import TARGETS

if TYPE_CHECKING:
    import torch

    from lcm_compile.bundles.bundle import EngineBundle
    from lcm_compile.engines.runner import Array, Runner

# The products (tokens, inputs, outputs) of SDXL's UNet at 1024×1024 that take most of its time.
PRODUCTS = (
    *((4096, 640, outputs) for outputs in (640, 1920, 5120)),
    (4096, 2560, 640),
    *((1024, 1280, outputs) for outputs in (1280, 3840, 10240)),
    (1024, 5120, 1280),
)
# Those that a GEGLU and a residual follow.
FOLLOWED = ((4096, 640, 5120), (4096, 2560, 640), (1024, 1280, 10240), (1024, 5120, 1280))
# Attention (heads, queries, keys, width): SDXL's, to the picture and to the text, and that of its VAE.
ATTENTIONS = ((10, 4096, 4096, 64), (10, 4096, 77, 64), (20, 1024, 1024, 64), (20, 1024, 77, 64))
WIDE_ATTENTION = (1, 16384, 16384, 512)
MAPS = ((512, 128), (512, 256), (256, 512))  # (channels, side) of the maps that SDXL's decoder doubles
NORMALIZED = ((512, 256), (256, 512), (128, 1024))  # those that it normalizes
SMALLER = 16  # by how much arrays on a processor are
EACH = 0.15  # seconds for each measurement
MOST = 50  # calls of each
LEAST = 3
WARM_UP = 2
PICTURES, SECONDS = 20, 20.0  # of the benchmark of whole pictures


def device_of(target: str) -> str:
    """Returns torch's name of the device."""
    return "cpu" if TARGETS[target].is_cpu else "cuda"


def smaller(target: str, size: int, by: int = SMALLER) -> int:
    """Returns a size of an array; on a processor one that it computes with in no time."""
    return max(size // by, 8) if TARGETS[target].is_cpu else size


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """Returns the median of the milliseconds that calls of a function take on a device."""
    import torch

    samples: list[float] = []
    with torch.inference_mode():
        for _ in range(WARM_UP):
            function()
        end = time.perf_counter() + EACH
        while len(samples) < LEAST or (len(samples) < MOST and time.perf_counter() < end):
            if device == "cpu":
                start = time.perf_counter()
                function()
                samples.append((time.perf_counter() - start) * 1000)
                continue
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            function()
            marks[1].record()
            marks[1].synchronize()
            samples.append(marks[0].elapsed_time(marks[1]))
    return median(samples)


def tried(figure: Callable[..., float], *arguments: Any) -> float | str:
    """Returns the figure of a call, or why there is none: what one form can't do ends no other."""
    try:
        return float(f"{figure(*arguments):.4g}")
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def facts(note: Note, target: str, work: Path) -> None:
    """Notes what compiling and running here needs: headers, the link, compilers, libraries, clocks."""
    import torch

    from lcm_compile.engines import BACKENDS, find_backend
    from lcm_compile.engines.aotinductor import missing_for_gpus
    from lcm_compile.engines.cuda_toolkit import find_toolkit
    from lcm_compile.engines.gpu import driver_cuda

    toolkit = find_toolkit()
    note(
        toolkit=toolkit and str(toolkit),
        driver_cuda=driver_cuda(),
        compiler=shutil.which("g++"),
        aotinductor_lacks=missing_for_gpus(),
        disk_bytes=shutil.disk_usage(work).free,
    )
    note(cannot_run={name: find_backend(name).cannot_run(TARGETS[target]) for name in BACKENDS})
    if device_of(target) == "cuda":
        free, total = torch.cuda.mem_get_info()
        note(gpu_memory_bytes=[free, total], flash=torch.backends.cuda.flash_sdp_enabled())
    note(headline=missing_for_gpus() or "aotinductor can build here")


def ceilings(note: Note, target: str, work: Path) -> None:
    """Measures copies in GB/s, and products in fp16 and 8 bits in TFLOP/s."""
    import torch

    device = device_of(target)
    count = smaller(target, 256 << 20, 64)
    source = torch.empty(count, dtype=torch.float16, device=device)
    copied = torch.empty_like(source)
    note(copy_gb_s=tried(rate, 4 * count / 1e6, lambda: copied.copy_(source), device))
    found: dict[str, dict[str, float | str]] = {}
    for sizes in PRODUCTS:
        tokens, inputs, outputs = (smaller(target, size) for size in sizes)
        x, w = (torch.randn(n, inputs, device=device) for n in (tokens, outputs))
        found["×".join(map(str, sizes))] = {
            way: tried(tflop_s, product, x, w, device) for way, product in PRODUCTS_IN.items()
        }
        note(tflop_s=found)
    best = [figure for figures in found.values() if isinstance(figure := figures["fp16"], float)]
    note(headline=f"fp16 up to {max(best, default=0):.0f} TFLOP/s")


def rate(amount: float, run: Callable[[], Any], device: str) -> float:
    """Returns how much of an amount a millisecond does."""
    return amount / milliseconds(run, device)


def tflop_s(product: Product, x: torch.Tensor, w: torch.Tensor, device: str) -> float:
    """Returns the TFLOP/s of a product of (tokens, inputs) and (outputs, inputs)."""
    return rate(2 * x.numel() * len(w) / 1e9, product(x, w), device)


def product_in(dtype: str, x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    """Returns what multiplies in a type."""
    import torch

    a, b = (array.to(getattr(torch, dtype)) for array in (x, w))
    return lambda: a @ b.T


def product_in_fp8(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    """Returns what multiplies in fp8, with one scale for each array."""
    import torch

    a, b = (array.to(torch.float8_e4m3fn) for array in (x, w))
    one = torch.ones((), device=x.device)
    return lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)


def product_in_int8(x: torch.Tensor, w: torch.Tensor) -> Callable[[], Any]:
    """Returns what multiplies in int8."""
    import torch

    a, b = (array.to(torch.int8) for array in (x, w))
    return lambda: torch._int_mm(a, b.T)


Product = Callable[["torch.Tensor", "torch.Tensor"], Callable[[], Any]]
PRODUCTS_IN: dict[str, Product] = {
    "fp16": partial(product_in, "float16"),
    "bf16": partial(product_in, "bfloat16"),
    "fp8": product_in_fp8,
    "int8": product_in_int8,
}


def attention(note: Note, target: str, work: Path) -> None:
    """Measures torch's kinds of attention in milliseconds, and one that is written out."""
    import torch

    device = device_of(target)
    dtype = torch.float32 if device == "cpu" else torch.float16
    found: dict[str, dict[str, float | str]] = {}
    for shape in (*ATTENTIONS, WIDE_ATTENTION):
        heads, queries, keys, width = shape
        sizes = [smaller(target, size) for size in (queries, keys, keys)]
        arrays = [torch.randn(1, heads, n, width, device=device, dtype=dtype) for n in sizes]
        kinds = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")
        figures = {kind: tried(kind_of_attention, kind, arrays, device) for kind in kinds}
        figures["written out"] = tried(milliseconds, partial(written_out, *arrays), device)
        found["×".join(map(str, shape))] = figures
        note(attention_ms=found)
    note(headline=f"{len(found)} shapes")


def kind_of_attention(kind: str, arrays: list[torch.Tensor], device: str) -> float:
    """Returns the milliseconds that one of torch's kernels of attention takes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = arrays
    with sdpa_kernel(getattr(SDPBackend, kind)):
        return milliseconds(lambda: scaled_dot_product_attention(query, key, value), device)


def written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns attention as two products and a softmax."""
    scaled = key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (query @ scaled).softmax(-1) @ value


def forms(note: Note, target: str, work: Path) -> None:
    """Measures forms of doubling a map, with kernels that cuDNN chooses or times, and of group normalization.

    The forms compute the same: the largest difference from the first is noted.
    """
    import torch

    device = device_of(target)
    dtype = torch.float32 if device == "cpu" else torch.float16
    found: dict[str, Any] = {}
    for (channels, side), timing in product(MAPS, (False, True)):
        torch.backends.cudnn.benchmark = timing
        side = smaller(target, side)
        x = torch.randn(1, channels, side, side, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        name = f"{channels} @ {side}², {'timed' if timing else 'chosen'}"
        found[name] = compared(doublings(channels, device, dtype), x, device)
        note(doubling=found)
    torch.backends.cudnn.benchmark = False
    normal: dict[str, Any] = {}
    for channels, side in NORMALIZED:
        side = smaller(target, side)
        x = torch.randn(1, channels, side, side, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        normal[f"{channels} @ {side}²"] = compared(normalizations(channels, device, dtype), x, device)
        note(normalization=normal)
    note(headline=f"{len(found)} doublings, {len(normal)} normalizations")


Form = tuple[str, "Callable[[torch.Tensor], torch.Tensor]"]


def compared(ways: Iterator[Form], x: torch.Tensor, device: str) -> Found:
    """Returns the milliseconds of forms, and how far each is from the first."""
    import torch

    results: Found = {}
    expected: torch.Tensor | None = None
    for name, run in ways:
        figure = tried(milliseconds, partial(run, x), device)
        if isinstance(figure, str):
            results[name] = {"error": figure}
            continue
        with torch.inference_mode():
            given = run(x).float()
        expected = given if expected is None else expected
        results[name] = {"ms": figure, "differs": float((given - expected).abs().max())}
    return results


def doublings(channels: int, device: str, dtype: torch.dtype) -> Iterator[Form]:
    """Yields forms of nearest-2× upsampling and the 3×3 convolution after it."""
    import torch
    from torch.nn import functional as F

    from lcm_compile.stages.rewrites import Upsampling

    torch.manual_seed(0)
    conv: Any = torch.nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
    four: Any = Upsampling(conv)
    conv, four = (one.to(device, dtype, memory_format=torch.channels_last) for one in (conv, four))
    kernels: Any = [one.weight for one in four.corners]
    # As engines.gpu_rewrites.doubling puts the numbers of the four in order.
    ordered = torch.stack(kernels).unflatten(0, (2, 2)).permute(3, 2, 4, 0, 5, 1)
    weights = ordered.reshape(channels, channels, 4, 4).flip(2, 3)
    bias = conv.bias
    yield "doubled and 3×3", lambda x: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    yield "four 2×2", four
    joined = torch.cat(kernels)

    def one_by_one(x: torch.Tensor) -> torch.Tensor:
        parts = F.conv2d(x, joined, padding=1).unflatten(1, (4, -1))
        height, width = x.shape[2:]
        cut = [parts[:, i, :, i // 2 : i // 2 + height, i % 2 : i % 2 + width] for i in range(4)]
        together = torch.stack(cut, 2).flatten(1, 2)
        return F.pixel_shuffle(together, 2) + bias[:, None, None]

    yield "one 2×2", one_by_one
    yield "transposed 4×4", lambda x: F.conv_transpose2d(x, weights, bias, 2, 1)


def normalizations(channels: int, device: str, dtype: torch.dtype) -> Iterator[Form]:
    """Yields forms of group normalization with 32 groups: torch's, by channel, and that one compiled."""
    import torch
    from torch.nn.functional import group_norm

    weight, bias = (torch.rand(channels, device=device, dtype=dtype) for _ in range(2))

    def by_channel(x: torch.Tensor) -> torch.Tensor:
        variances, means = torch.var_mean(x.float(), (2, 3), correction=0)
        variances, means = (array.unflatten(1, (32, -1)) for array in (variances, means))
        mean = means.mean(2, True)
        deviation = ((variances + (means - mean) ** 2).mean(2, True) + 1e-5).rsqrt()
        factor = deviation.expand_as(means).flatten(1) * weight.float()
        shift = bias.float() - mean.expand_as(means).flatten(1) * factor
        return (x * factor[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)

    yield "torch", lambda x: group_norm(x, 32, weight, bias)
    yield "by channel", by_channel
    if device == "cuda":  # a processor takes longer to compile than the part may take
        yield "by channel, compiled", torch.compile(by_channel)
        yield "torch, compiled", torch.compile(lambda x: group_norm(x, 32, weight, bias))


def epilogues(note: Note, target: str, work: Path) -> None:
    """Measures what follows a product, as a kernel of its own and within products of Triton's.

    These are compiled with timing of their tiles, which takes some seconds each. The forms compute the same:
    the largest difference from the first is noted.
    """
    import torch

    device = device_of(target)
    dtype = torch.float32 if device == "cpu" else torch.float16
    found: dict[str, Any] = {}
    for tokens, inputs, outputs in FOLLOWED:
        tokens, inputs, outputs = (smaller(target, size) for size in (tokens, inputs, outputs))
        torch._dynamo.reset()
        x = torch.randn(tokens, inputs, device=device, dtype=dtype)
        forms = joined(inputs, outputs, device, dtype)
        found[f"{tokens}×{inputs}×{outputs}"] = compared(forms, x, device)
        note(epilogues=found)
    note(headline=f"{len(found)} shapes")


def joined(inputs: int, outputs: int, device: str, dtype: torch.dtype) -> Iterator[Form]:
    """Yields forms of what a transformer block's layer does: a GEGLU, or what it adds to.

    The layer with more outputs than inputs is followed by the GEGLU. There the gate is a product of its own,
    because a tile of Triton's product can't read another tile of the same one.
    """
    import torch
    from torch.nn import functional as F

    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(outputs, inputs, device=device, generator=generator) * inputs**-0.5
    weight, bias = weight.to(dtype), torch.zeros(outputs, device=device, dtype=dtype)
    halves = [(w.contiguous(), b) for w, b in zip(weight.chunk(2), bias.chunk(2), strict=True)]

    def geglu(x: torch.Tensor) -> torch.Tensor:
        hidden, gate = F.linear(x, weight, bias).chunk(2, -1)
        return hidden * F.gelu(gate)

    def geglu_of_two(x: torch.Tensor) -> torch.Tensor:
        hidden, gate = (F.linear(x, *half) for half in halves)
        return hidden * F.gelu(gate)

    def residual(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight, bias) + x[:, :outputs]

    one, other = (geglu, geglu_of_two) if outputs > inputs else (residual, residual)
    if device == "cpu":  # a processor takes longer to compile than the part may take
        yield "cuBLAS' product, and a kernel", one
        yield "Triton's product", other
        return
    tuned = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "TRITON"}
    yield "cuBLAS' product, and a kernel", torch.compile(one)
    yield "Triton's product", torch.compile(other, options=tuned)  # type: ignore[arg-type]


def stages(note: Note, target: str, work: Path, folder: Path) -> None:
    """Measures each engine of a bundle, plain and as a CUDA graph, and compares it with its proof.

    The proof is what torch computed in fp32. Where the weights were left out, they are random: `parity`
    compares the engines with torch.
    """
    from lcm_compile.engines.scratch import Scratch
    from lcm_compile.pipeline.load import check_backend
    from lcm_compile.proof.parity import compare_calls
    from lcm_compile.proof.recording import read_calls

    bundle, is_random = opened(folder, target, work)
    manifest = bundle.manifest
    backend, device = check_backend(bundle), device_of(target)
    proven = not is_random and manifest.proof.shape == manifest.pipeline.shape
    scratch, found = Scratch(device), dict[str, Found]()
    for stage in manifest.stages:
        name = stage.contract.name
        start = time.perf_counter()
        with backend.load(
            bundle.path(stage.file), stage.contract, manifest.target, stage.precision
        ) as runner:
            runner.share_scratch(scratch)
            result: Found = {"load_s": round(time.perf_counter() - start, 2)}
            found[name] = result
            inputs = random_inputs(runner)
            result["ms"] = tried(milliseconds, partial(runner, inputs), device)
            note(stages=found)
            if proven:
                calls = read_calls(bundle.folder / "proof" / f"{name}.npz", stage.contract)
                result["db"] = round(compare_calls(runner, calls), 2)
            if reason := runner.cannot_capture():
                result["captured"] = reason
            else:
                result["captured_ms"] = tried(captured_milliseconds, runner, inputs, device)
            note(stages=found)
    headline = ", ".join(f"{name} {result['ms']} ms" for name, result in found.items())
    note(headline=headline)


def parity(note: Note, target: str, work: Path, folder: Path) -> None:
    """Compares each engine with torch in fp32, with the engine's weights and random inputs.

    That is for bundles whose weights were left out. The engines of others are compared with their proof.
    """
    import torch

    from lcm_compile.benchmarks.gpu.eager import eager_stages
    from lcm_compile.engines.tensors import without_tf32
    from lcm_compile.pipeline.load import check_backend
    from lcm_compile.proof.parity import output_db

    bundle, is_random = opened(folder, target, work)
    if not is_random:
        raise Missing(f"{folder} has its weights, and so its proof")
    manifest, device = bundle.manifest, device_of(target)
    files = {stage.contract.name: stage for stage in manifest.stages}
    found: dict[str, float] = {}
    for stage in eager_stages(bundle, device):
        file = files[stage.name]
        with check_backend(bundle).load(
            bundle.path(file.file), stage.contract, manifest.target, file.precision
        ) as runner:
            inputs = random_inputs(runner)
            outputs = {name: runner.to_host(array) for name, array in runner(inputs).items()}
            given = {name: runner.to_host(array) for name, array in inputs.items()}
        with torch.inference_mode(), without_tf32():
            tensors = (torch.from_numpy(given[spec.name]).to(device) for spec in stage.contract.inputs)
            expected = stage.module(*tensors)
        expected = expected if isinstance(expected, tuple) else (expected,)
        names = [spec.name for spec in stage.contract.outputs]
        call = given, {name: one.cpu().numpy() for name, one in zip(names, expected, strict=True)}
        found[stage.name] = min(
            round(output_db(stage.contract, call, name, outputs[name]), 2) for name in names
        )
        note(db=found)
    note(headline=", ".join(f"{name} {db:.0f} dB" for name, db in found.items()))


def random_inputs(runner: Runner) -> Mapping[str, Array]:
    """Returns inputs of a stage on its device: small token ids, and normal numbers otherwise."""
    random = np.random.default_rng(0)
    arrays = {
        s.name: random.integers(0, 8, s.shape).astype(s.dtype)
        if np.issubdtype(np.dtype(s.dtype), np.integer)
        else random.standard_normal(s.shape).astype(s.dtype)
        for s in runner.contract.inputs
    }
    return {name: runner.to_device(array) for name, array in arrays.items()}


def captured_milliseconds(runner: Runner, inputs: Mapping[str, Array], device: str) -> float:
    """Returns the milliseconds of a stage that is launched as a CUDA graph."""
    from lcm_compile.engines.capture import Capturer

    capturer = Capturer()
    capturer.warm_up(lambda: runner(inputs))
    launch, _ = capturer.capture(lambda: runner(inputs))
    return milliseconds(launch, device)


def pictures(note: Note, target: str, work: Path, name: str, folder: Path) -> None:
    """Measures whole pictures of a bundle with CUDA graphs and without, and in turn with diffusers.

    A bundle whose weights were left out draws noise, as does diffusers with random weights in its turn.
    """
    from lcm_compile.benchmarks.measure.bench import bench
    from lcm_compile.benchmarks.measure.summary import summarise

    bundle, is_random = opened(folder, target, work)
    take_turns(note, bundle, device_of(target), ["eager"] if is_random else [])
    if not is_random:
        report = bench(bundle, ("eager",), PICTURES, SECONDS, cold_starts=0)
        report.save(report_path(work, name))
        note(summary=summarise(report))


def against_compiled(note: Note, target: str, work: Path, name: str, folder: Path) -> None:
    """Does as `pictures`, in turn with what torch.compile makes of diffusers."""
    from lcm_compile.benchmarks.measure.bench import bench
    from lcm_compile.benchmarks.measure.summary import summarise

    if device_of(target) == "cpu":
        raise Missing("a processor takes longer to compile than the part may take")
    bundle, is_random = opened(folder, target, work)
    if is_random:
        take_turns(note, bundle, device_of(target), ["eager", "compile"])
        return
    report = bench(bundle, ("eager", "compile"), PICTURES, SECONDS, cold_starts=0)
    report.save(report_path(work, name))
    note(summary=summarise(report))


def take_turns(note: Note, bundle: EngineBundle, device: str, rivals: Sequence[str]) -> None:
    """Draws with a bundle with CUDA graphs and without, and with diffusers' pipelines of random weights."""
    from lcm_compile.benchmarks.gpu.eager import eager_drawers
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request

    prompt, batch = bundle.manifest.pipeline.sample_prompt, bundle.manifest.pipeline.shape.batch
    with load(bundle, prompt_cache=0) as pipeline:

        def draw(with_graphs: bool, seed: int) -> None:
            pipeline.cuda_graph = with_graphs
            drawn = pipeline.draw(Request(prompt, seed, num_images=batch))
            if with_graphs:
                note(cuda_graph=drawn.cuda_graph)

        ways: dict[str, Callable[[int], object]] = dict(eager_drawers(bundle, device, rivals))
        ways |= {"with graphs": partial(draw, True), "without graphs": partial(draw, False)}
        for _, way in product(range(WARM_UP), ways):
            ways[way](0)
        ms: dict[str, list[float]] = {way: [] for way in ways}
        start = time.perf_counter()
        for i in range(PICTURES):
            if i >= LEAST and time.perf_counter() - start > SECONDS:
                break
            for way in sorted(ways, reverse=bool(i % 2)):
                begun = time.perf_counter()
                ways[way](i)
                ms[way].append((time.perf_counter() - begun) * 1000)
            note(ms=ms)
    note(headline=", ".join(f"{way} {median(values):.1f} ms" for way, values in ms.items()))


def opened(folder: Path, target: str, work: Path) -> tuple[EngineBundle, bool]:
    """Returns a bundle, and whether its weights are random: a copy of it, where they had been left out.

    Raises Missing if the bundle is for another target.
    """
    from lcm_compile.bundles.bundle import open_bundle
    from lcm_compile.bundles.manifest import read_manifest

    held = read_manifest(folder)[0].target
    if held.is_cpu != TARGETS[target].is_cpu:
        raise Missing(f"{folder} is for {held.name}, and this run is for {target}")
    is_random = bool(kit.left_out(folder))
    if is_random:
        copy = work / "filled" / folder.name
        if not copy.exists():
            kit.fill(folder, copy)
        folder = copy
    return open_bundle(folder), is_random
