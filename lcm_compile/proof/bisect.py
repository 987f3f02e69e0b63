"""Finds the first layer of an engine whose result differs from what its graph computes in fp32.

The reference is the stage's ONNX graph, with all its floats in fp32 and without any optimisation, on ONNX
Runtime's CPU provider. The engine and the reference get the inputs that were recorded in the bundle, and
return the result of every layer, a part of the layers at a time.

A bundle for ONNX Runtime holds ONNX files, so its own engine is examined. Of any other backend, a second
engine is built from the export's graph, because an engine returns only the outputs that it was built with.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.export_manifest import Export
from lcm_compile.bundles.manifest import StageFile
from lcm_compile.engines import find_backend
from lcm_compile.engines.onnxruntime import CPU, open_session, quiet_options
from lcm_compile.engines.runner import Runner
from lcm_compile.errors import BackendError, BundleError
from lcm_compile.graphs import ExportedGraph, StageContract, TensorSpec
from lcm_compile.pipeline.load import check_backend
from lcm_compile.proof.parity import compare_calls, output_db, snr_db, stage_floor
from lcm_compile.proof.recording import read_calls

# Bytes of layers' results that one run may return. The engine's and the reference's are held at a time.
RUN_BYTES = 1 << 30
# ONNX's numbers of the types float, float16 and bfloat16.
FLOAT, HALVES = 1, (10, 16)
# The attributes of operators that name a type.
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")
# The ending of an engine's outputs that are the results of layers.
RESULT = ".fp32"


@dataclass(frozen=True)
class Layer:
    """A node of a graph, one of its output tensors, and the signal-to-noise ratio of that tensor in dB."""

    node: str
    op: str
    tensor: str
    db: float

    def __str__(self) -> str:
        return f"{self.node} ({self.op}), whose output {self.tensor} has {self.db:.1f} dB"


@dataclass(frozen=True)
class Bisection:
    """What was found in a stage: how many layers were compared, the first one below the floor, the worst one.

    `engine_db` and `graph_db` are the ratios of the outputs of the bundle's own engine and of the reference,
    compared with torch's.
    """

    layers: int
    floor: float
    first: Layer | None
    worst: Layer
    engine_db: float
    graph_db: float

    @property
    def passed(self) -> bool:
        """Whether the stage's outputs are as `verify` wants them, whatever its layers do."""
        return self.engine_db >= self.floor

    def __str__(self) -> str:
        limit, own = f"{self.floor:g} dB", f"the stage's own outputs have {self.engine_db:.1f} dB"
        if self.first is None:
            text = f"none of {self.layers} layers is below {limit}; the worst is {self.worst}"
            if self.passed:
                return text
            if self.graph_db < self.floor:
                return f"{text}; but the graph itself is {self.graph_db:.1f} dB from torch, as the engine is"
            return f"{text}; but {own}, so the fault is in layers that are fused if none is returned"
        text = f"the first of {self.layers} layers below {limit} is {self.first}; the worst is {self.worst}"
        return f"{text}; but {own}, which pass" if self.passed else text


def bisect(bundle: EngineBundle, export: Export | None = None) -> Iterator[tuple[str, Bisection]]:
    """Compares every stage's layers, and yields each stage's name and what was found.

    The reference is the graph of `export`, or the bundle's own if it holds ONNX files. If the proof is of a
    smaller picture, only stages that do not depend on its size and those with a twin in the export are
    compared. Raises BackendError if polygraphy is missing or the backend's graphs are not ONNX graphs, and
    BundleError if the export is another model's or if there is no graph to compare with.
    """
    if importlib.util.find_spec("polygraphy") is None:
        raise BackendError(
            "--bisect needs polygraphy, which is not installed", "pip install 'lcm-compile[bisect]'"
        )
    manifest = bundle.manifest
    backend = check_backend(bundle)
    if backend.GRAPH_FORMAT != "onnx":
        raise BackendError(
            f"{manifest.backend} builds engines from {backend.GRAPH_FORMAT} graphs, and only layers of ONNX "
            "graphs can be compared",
            "build the same model with --backend onnxruntime, and bisect that bundle",
        )
    if export is not None:
        check_same_model(bundle, export)
    elif manifest.backend != "onnxruntime":
        raise BundleError(
            f"{bundle.folder} holds engines of {manifest.backend}, and no ONNX graph to compare them with",
            "lcm-compile export --out DIR, with the options of the build, and then --graphs DIR",
        )
    compared = 0
    for stage in manifest.stages:
        if found := find_graph(bundle, export, stage):
            yield stage.contract.name, bisect_stage(bundle, stage, *found)
            compared += 1
    if not compared:
        raise BundleError(
            f"the proof of {bundle.folder} is of a picture of {manifest.proof.shape}, and there is no graph "
            "for that",
            "lcm-compile export --out DIR, with the options of the build, and then --graphs DIR",
        )


def check_same_model(bundle: EngineBundle, export: Export) -> None:
    """Raises BundleError unless an export holds ONNX graphs of the model that the bundle was built from."""
    key = bundle.manifest.key
    for name, value in export.manifest.key.items():
        if key.get(name) != value and not name.endswith("version") and name != "lcm-compile":
            raise BundleError(
                f"{export.folder} is not what {bundle.folder} was built from: its {name} is {value}, the "
                f"bundle's {key.get(name, 'none')}",
                "lcm-compile export --out DIR, with the options of the build (and its --precision)",
            )


def find_graph(bundle: EngineBundle, export: Export | None, stage: StageFile) -> tuple[Path, bool] | None:
    """Returns a stage's graph for pictures of the proof's shape, and whether it is a twin; None if none."""
    manifest, name = bundle.manifest, stage.contract.name
    shape, proof = manifest.pipeline.shape, manifest.proof.shape
    same = proof == shape or (name == "encode" and proof.batch == shape.batch)
    if export is None:
        return (bundle.path(stage.file), False) if same else None
    path = next(export.folder / s.file for s in export.manifest.stages if s.contract.name == name)
    twin = path.parent / "twin" / path.name
    if same:
        return path, False
    return (twin, True) if twin.relative_to(export.folder).as_posix() in export.manifest.files else None


def bisect_stage(bundle: EngineBundle, stage: StageFile, reference: Path, is_twin: bool) -> Bisection:
    """Compares an engine's layers with those of its reference graph, on the recorded calls.

    The layers are the nodes of the reference graph whose results are floats that the engine's graph has too.
    """
    import onnx

    graph = onnx.load(reference, load_external_data=False).graph
    contract = contract_of(stage.contract, graph)
    calls = read_calls(bundle.path(f"proof/{stage.contract.name}.npz"), contract)
    shapes = {value.name: shape_of(value) for value in graph.value_info if is_float(value)}
    own = None if is_twin else bundle.path(stage.file)
    examined = reference
    if own is not None and bundle.manifest.backend == "onnxruntime":
        examined = own
        nodes_of_own = onnx.load(own, load_external_data=False).graph.node
        known = {name for node in nodes_of_own for name in node.output}
        shapes = {name: shape for name, shape in shapes.items() if name in known}
    nodes = {name: node for node in graph.node for name in node.output if name in shapes}  # in their order
    outputs = [value.name for value in graph.output]
    found: dict[str, float] = {}
    graph_db = math.inf
    with open_engine(bundle, stage, reference, own, contract) as runner:
        engine_db = compare_calls(runner, calls)
    for names in parts({name: shapes[name] for name in nodes}):
        results = tuple(TensorSpec(n + RESULT, shapes[n], "float32", "a layer's result") for n in names)
        extended = replace(contract, outputs=(*contract.outputs, *results))
        with tempfile.TemporaryDirectory(prefix="bisect-") as folder, ExitStack() as stack:
            plain = write_marked(reference, Path(folder) / "reference", outputs, names, in_fp32=True)
            marked = write_marked(examined, Path(folder) / "marked", outputs, names)
            ready = marked if examined == own else None
            runner = stack.enter_context(open_engine(bundle, stage, marked, ready, extended))
            session = stack.enter_context(open_plain(plain))
            for inputs, expected in calls:
                right = session.infer(inputs)
                actual = runner({name: runner.to_device(array) for name, array in inputs.items()})
                for name in names:
                    db = finite_snr_db(right[name], runner.to_host(actual[name + RESULT]))
                    found[name] = min(db, found.get(name, db))
                for name, own_name in zip(outputs, expected, strict=True):
                    db = output_db(contract, (inputs, expected), own_name, right[name])
                    graph_db = min(graph_db, db)
    floor = stage_floor(stage)
    layers = [Layer(nodes[n].name or n, nodes[n].op_type, n, db) for n, db in found.items()]
    first = next((layer for layer in layers if layer.db < floor), None)
    return Bisection(len(layers), floor, first, min(layers, key=lambda layer: layer.db), engine_db, graph_db)


@contextmanager
def open_engine(
    bundle: EngineBundle, stage: StageFile, graph: Path, engine: Path | None, contract: StageContract
) -> Iterator[Runner]:
    """Opens an engine by the bundle's backend; if `engine` is None, one that is built from the graph."""
    target, backend = bundle.manifest.target, find_backend(bundle.manifest.backend)
    with tempfile.TemporaryDirectory(prefix="bisect-") as folder:
        if engine is None:
            options = json.loads(bundle.manifest.key["builder options"])
            part = ExportedGraph(graph, stage.precision, contract)
            engine = backend.build(part, target, Path(folder), options)
        with backend.load(engine, contract, target, stage.precision) as runner:
            yield runner


def write_marked(
    source: Path, folder: Path, outputs: Iterable[str], names: Iterable[str], in_fp32: bool = False
) -> Path:
    """Writes a graph that also returns the results of layers, and returns its path in a new `folder`.

    With `in_fp32` all floats are fp32, and results keep their `names`. Otherwise the graph computes as
    before, and the results are cast to fp32 and get the ending RESULT.
    """
    import onnx
    from polygraphy.backend.onnx import modify_outputs

    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    shapes = {value.name: shape_of(value) for value in graph.value_info}
    if in_fp32:
        widen(graph)
        names = list(names)
    else:
        pairs = {name: name + RESULT for name in names}
        graph.node.extend(onnx.helper.make_node("Cast", [a], [b], to=FLOAT) for a, b in pairs.items())
        graph.value_info.extend(
            onnx.helper.make_tensor_value_info(b, FLOAT, shapes.get(a)) for a, b in pairs.items()
        )
        names = list(pairs.values())
    graph.value_info.extend(graph.output)
    modify_outputs(model, outputs=[*outputs, *names])
    folder.mkdir()
    path = folder / source.name
    onnx.save(model, path)
    weights = source.with_name(f"{source.name}.data")
    if weights.exists():
        try:
            (folder / weights.name).hardlink_to(weights)
        except OSError:  # the folder is on another disk
            shutil.copyfile(weights, folder / weights.name)
    return path


def widen(graph: Any) -> None:
    """Changes a graph so that whatever it computes in half precision is computed in fp32.

    Its weights stay as they are in the file, and are cast when the graph runs.
    """
    import onnx

    wide = {w.name: w.name + RESULT for w in graph.initializer if w.data_type in HALVES}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = wide.get(name, name)
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES and attribute.i in HALVES:
                attribute.i = FLOAT
            elif attribute.t.data_type in HALVES:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
    nodes = [onnx.helper.make_node("Cast", [a], [b], to=FLOAT) for a, b in wide.items()] + list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    for value in graph.value_info:
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = FLOAT


def open_plain(path: Path) -> Any:
    """Returns polygraphy's runner of a graph on ONNX Runtime's CPU provider, without optimisation."""
    import onnxruntime as ort
    from polygraphy.backend.onnxrt import OnnxrtRunner

    options = quiet_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxrtRunner(open_session(path, options, [CPU]))


def parts(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yields the names of results in groups whose arrays, in fp32, have at most RUN_BYTES in total."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if group and size + 4 * math.prod(shape) > RUN_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += 4 * math.prod(shape)
    if group:
        yield group


def finite_snr_db(reference: np.ndarray, actual: np.ndarray) -> float:
    """Returns snr_db where the reference is finite: a mask's −∞ are no error, but a NaN of the engine is."""
    finite = np.isfinite(reference)
    return snr_db(reference[finite], actual[finite])


def contract_of(contract: StageContract, graph: Any) -> StageContract:
    """Returns a stage's contract with the shapes of a graph: a twin's differ from the bundle's."""

    def shaped(specs: tuple[TensorSpec, ...], values: Any) -> tuple[TensorSpec, ...]:
        return tuple(replace(s, shape=shape_of(v)) for s, v in zip(specs, values, strict=True))

    return replace(
        contract, inputs=shaped(contract.inputs, graph.input), outputs=shaped(contract.outputs, graph.output)
    )


def is_float(value: Any) -> bool:
    """Returns whether a tensor has one of the float types that stages compute in, and a known shape."""
    kind = value.type.tensor_type
    return kind.elem_type in (FLOAT, *HALVES) and all(d.HasField("dim_value") for d in kind.shape.dim)


def shape_of(value: Any) -> tuple[int, ...]:
    """Returns the shape that a graph states for a tensor."""
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
