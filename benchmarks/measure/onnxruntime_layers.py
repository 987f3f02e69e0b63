"""Times layers of SD1.5's size on ONNX Runtime's CPU provider, as exported and in the provider's forms.

`python -m lcm_compile.benchmarks.measure.onnxruntime_layers --save FILE`, whose result is in
benchmarks/results/onnxruntime-layers-cpu.json. engines/onnxruntime_forms.py has the forms. The sessions of a
layer are called in turn. Their memory is the most that a process takes more of while it calls one. It needs
the machine for itself.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lcm_compile.benchmarks.markdown import markdown_table
from lcm_compile.benchmarks.measure.environment import environment_of
from lcm_compile.benchmarks.measure.timing import in_turn, quantile, ratios
from lcm_compile.benchmarks.measure.worker import peak_memory
from lcm_compile.engines import onnxruntime
from lcm_compile.graphs import OUTPUT_SCALES, ExportedGraph, StageContract
from lcm_compile.precisions import Precision
from lcm_compile.system.dataclass_json import json_text
from lcm_compile.system.files import write_atomically
from lcm_compile.system.processor import threads
from lcm_compile.targets import TARGETS

CPU = TARGETS["cpu"]
OPSET, IR_VERSION = 23, 10
EXPORTED, FORM, FP32 = "as exported", "in its form", "in fp32"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """A layer as a graph of ONNX: shapes of its inputs and of what its nodes return, and its constants."""

    inputs: Shapes
    nodes: Sequence[onnx.NodeProto]
    shapes: Shapes
    constants: Mapping[str, np.ndarray]

    def save(self, path: Path) -> Path:
        """Writes the graph, whose output is that of the last node."""

        def values(shapes: Shapes) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(name, TensorProto.FLOAT, s) for name, s in shapes.items()]

        output = self.nodes[-1].output[0]
        graph = helper.make_graph(
            self.nodes,
            "layer",
            values(self.inputs),
            values({output: self.shapes[output]}),
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
            value_info=values({name: shape for name, shape in self.shapes.items() if name != output}),
        )
        opset = [helper.make_opsetid("", OPSET)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION), path)
        return path


def random(*shape: int) -> np.ndarray:
    """Returns normal values, always the same for one shape."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def attention(heads: int, tokens: int, width: int, others: int | None = None) -> Layer:
    """Returns self-attention of products (1, tokens, heads · width).

    With `others` it is attention to that many keys and values, which are given by heads.
    """
    whole, split = (1, tokens, heads * width), (1, tokens, heads, width)
    by_heads = (1, heads, others or tokens, width)
    node = helper.make_node
    nodes: list[onnx.NodeProto] = []
    shapes: dict[str, tuple[int, ...]] = {"q": (1, heads, tokens, width), "a": (1, heads, tokens, width)}
    shapes["y"] = whole
    inputs: dict[str, tuple[int, ...]] = {"x0": whole}
    for i, name in enumerate("qkv"):
        if name == "q" or others is None:
            inputs[f"x{i}"] = whole
            nodes.append(node("Reshape", [f"x{i}", "split"], [f"{name}s"]))
            nodes.append(node("Transpose", [f"{name}s"], [name], perm=(0, 2, 1, 3)))
            shapes |= {f"{name}s": split, name: (1, heads, tokens, width)}
        else:
            inputs[name] = by_heads
    nodes += [
        node("Attention", ["q", "k", "v"], ["a"]),
        node("Transpose", ["a"], ["t"], perm=(0, 2, 1, 3)),
        node("Reshape", ["t", "whole"], ["y"]),
    ]
    return Layer(inputs, nodes, shapes, {"split": np.array(split), "whole": np.array(whole)})


def group_normalization(channels: int, side: int) -> Layer:
    """Returns GroupNormalization of 32 groups."""
    shape = (1, channels, side, side)
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=32)
    return Layer({"x": shape}, [node], {"y": shape}, {"scale": random(channels), "bias": random(channels)})


def convolution(channels: int, side: int, in_8_bits: bool) -> Layer:
    """Returns a 3×3 convolution in fp32, or in 8 bits with the scales of its output."""
    shape = (1, channels, side, side)
    weight = random(channels, channels, 3, 3) * np.float32(channels**-0.5 / 3)
    constants = {"b": random(channels)}
    conv = helper.make_node("Conv", ["xf", "wf", "b"] if in_8_bits else ["x", "w", "b"], ["y"], pads=[1] * 4)
    if not in_8_bits:
        return Layer({"x": shape}, [conv], {"y": shape}, {"w": weight, **constants})
    note = conv.metadata_props.add()  # the largest outputs are about 5, plus the bias
    note.key, note.value = OUTPUT_SCALES, json.dumps(((np.abs(constants["b"]) + 5) / 127).tolist())
    nodes = [*rounding_nodes(weight, 0, constants), conv]
    return Layer({"x": shape}, nodes, {"y": shape}, constants)


def product(tokens: int, width: int, others: int, in_8_bits: bool) -> Layer:
    """Returns a matrix product (1, tokens, width) → (1, tokens, others) with a bias."""
    node = helper.make_node
    inputs, y = {"x": (1, tokens, width)}, (1, tokens, others)
    weight = random(width, others) * np.float32(width**-0.5)
    constants = {"w": weight, "b": random(others)}
    names = ["xf", "wf"] if in_8_bits else ["x", "w"]
    nodes = [node("MatMul", names, ["p"]), node("Add", ["p", "b"], ["y"])]
    if in_8_bits:
        nodes = rounding_nodes(weight, 1, constants) + nodes
    return Layer(inputs, nodes, {"p": y, "y": y}, constants)


def rounding_nodes(weight: np.ndarray, axis: int, constants: dict[str, np.ndarray]) -> list[onnx.NodeProto]:
    """Returns nodes that round `x` and the weight to 8 bits, as `xf` and `wf`, and adds their constants.

    The weights have a scale for each index of `axis`.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scales = np.abs(weight).max(others, keepdims=True) / 127
    constants |= {"w": np.rint(weight / scales).astype(np.int8), "ws": scales.reshape(-1)}
    constants["xs"] = np.array(4 / 127, np.float32)
    return [
        helper.make_node("QuantizeLinear", ["x", "xs"], ["x8"], output_dtype=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["x8", "xs"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wf"], axis=axis),
    ]


LAYERS = {
    "self-attention, 8 heads × 4096 × 40": {EXPORTED: attention(8, 4096, 40)},
    "attention to 77 tokens, 8 heads × 4096 × 40": {EXPORTED: attention(8, 4096, 40, 77)},
    "the VAE's attention, 1 head × 4096 × 512": {EXPORTED: attention(1, 4096, 512)},
    "GroupNorm, 320 @ 64²": {EXPORTED: group_normalization(320, 64)},
    "GroupNorm, 256 @ 256²": {EXPORTED: group_normalization(256, 256)},
    "int8 convolution 3×3, 320 → 320 @ 64²": {
        EXPORTED: convolution(320, 64, True),
        FP32: convolution(320, 64, False),
    },
    "int8 convolution 3×3, 1280 → 1280 @ 16²": {
        EXPORTED: convolution(1280, 16, True),
        FP32: convolution(1280, 16, False),
    },
    "int8 product with a bias, 4096 × 320 × 2560": {
        EXPORTED: product(4096, 320, 2560, True),
        FP32: product(4096, 320, 2560, False),
    },
}


def engines_of(layers: Mapping[str, Layer], folder: Path) -> dict[str, Path]:
    """Writes the graphs of a layer and the engine that is built from the exported one."""
    paths = {name: layer.save(folder / f"{name}.onnx") for name, layer in layers.items()}
    contract = StageContract(FORM, (), ())
    paths[FORM] = onnxruntime.build(ExportedGraph(paths[EXPORTED], Precision.FP32, contract), CPU, folder)
    return paths


def open_layer(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Returns a session of a graph, and values for its inputs."""
    session = onnxruntime.open_session(path, onnxruntime.sleeping_options(), [onnxruntime.CPU])
    return session, {x.name: random(*x.shape) for x in session.get_inputs()}


def memory_of(path: Path) -> int:
    """Returns how many bytes the peak of this process's memory grows by when it calls a graph."""
    session, feeds = open_layer(path)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what the process holds
    before = peak_memory("self")
    session.run(None, feeds)
    return (peak_memory("self") or 0) - (before or 0)


def measure(paths: Mapping[str, Path], rounds: int) -> dict[str, Any]:
    """Returns milliseconds of each session's calls, after one that warms up, and bytes of memory."""
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name, path in paths.items():
        with context.Pool(1) as pool:
            memory[name] = pool.apply(memory_of, (path,))
    sessions = {name: open_layer(path) for name, path in paths.items()}
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for i in range(rounds + 1):
        for name in in_turn(list(paths), i):
            session, feeds = sessions[name]
            start = time.perf_counter()
            session.run(None, feeds)
            samples[name].append(1000 * (time.perf_counter() - start))
    return {"ms": {name: values[1:] for name, values in samples.items()}, "memory_bytes": memory}


def row_of(name: str, measured: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a layer's row of the table."""
    ms, memory = measured["ms"], measured["memory_bytes"]

    def against(other: str) -> str:
        if other not in ms:
            return ""
        pairs = ratios(ms[FORM], ms[other])
        return f"{statistics.median(pairs):.2f} × ({quantile(pairs, 0.25):.2f}–{quantile(pairs, 0.75):.2f})"

    megabytes = " → ".join(f"{memory[one] / 1e6:.0f}" for one in (EXPORTED, FORM))
    return name, f"{statistics.median(ms[FORM]):.1f} ms", against(EXPORTED), against(FP32), megabytes


@click.command()
@click.option("--rounds", type=click.IntRange(2), default=20, show_default=True)
@click.option("--save", type=click.Path(path_type=Path), help="The JSON file for all samples.")
def main(rounds: int, save: Path | None) -> None:
    """Time layers in the forms for ONNX Runtime's CPU provider."""
    measured = {}
    for name, layers in LAYERS.items():
        with tempfile.TemporaryDirectory() as folder:
            measured[name] = measure(engines_of(layers, Path(folder)), rounds)
    if save is not None:
        environment = asdict(environment_of(CPU, threads(), {}))
        write_atomically(save, json_text({"environment": environment, "layers": measured}, indent=1) + "\n")
    header = ("layer", FORM, f"{EXPORTED}, over that", "fp32 over that", "memory, MB")
    print("\n".join(markdown_table(header, [row_of(*one) for one in measured.items()])))


if __name__ == "__main__":
    main()
