"""OpenVINO on x86 CPUs, from ONNX graphs; neither building nor running needs torch.

An engine is OpenVINO's own .xml with a .bin of weights, which is mapped into memory; the kernels are made for
the processor at hand when it is loaded. The .xml says in which precision it computes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lcm_compile.engines.runner import Array, Runner, as_numpy
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.system.processor import instruction_set, threads
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "onnx"
PACKAGES = ("openvino",)
# What its kernels compute in, and the extensions of which they need one to do so. It would take bf16 without
# them too, and compute slowly or in fp32.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
NEEDS = {
    "bf16": ("avx512_bf16", "amx_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
# Bytes of weights that make a model large: the smallest of SD1.5 has 94 MB, the demo's step 12.
LARGE = 1 << 26
# Where the .xml keeps the precision.
LABEL = ["lcm_compile", "precision"]


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    return cannot_run(target) or cannot_compute(precision)


def cannot_run(target: GpuTarget) -> str | None:
    if not target.is_cpu:
        return "builds for the CPU only"
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed; pip install 'lcm-compile[openvino]'"
    return None


def cannot_compute(precision: Precision) -> str | None:
    """Why this processor can't compute in a precision, or None."""
    for name in precision.types:
        needs = NEEDS.get(name, ())
        if needs and not set(needs) & set(instruction_set()):
            return (
                f"this processor has neither {' nor '.join(needs)}, which it computes {name} with; use fp32"
            )
    return None


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Its files open in any version that knows their operators; opening them tells."""
    return None


def options(target: GpuTarget) -> Mapping[str, Any]:
    return {"sinusoids": "fp32"}


def build(graph: ExportedGraph, target: GpuTarget, folder: Path) -> Path:
    ov = import_openvino()
    path = folder / f"{graph.contract.name}.xml"
    try:
        model = ov.Core().read_model(graph.path)
        model.set_rt_info(graph.precision.value, LABEL)
        kept = [plain_reshape(node) for node in list(fp32_from_the_start(model))]
        ov.save_model(model, path, compress_to_fp16=False)
        keep_fp32(path, {node.get_friendly_name() for node in kept})
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO can't convert the {graph.contract.name} stage: {first_reason(error)}",
            "--backend auto chooses another",
        ) from error
    return path


def fp32_from_the_start(model: Any) -> Iterator[Any]:
    """The fp32 operations that only fp32 ones lead to: of a half-precision graph the sinusoids of timesteps.

    Told to compute in bf16, OpenVINO rounds their angles, which go up to 999, to 8 bits: 19 dB were left of
    an SD1.5 step at timestep 499. Constants and what narrows are no part of this.
    """
    wide: dict[str, bool] = {}
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        types = {node.get_output_element_type(i).to_string() for i in range(node.get_output_size())}
        wide[name] = not types & {"bf16", "f16"} and all(
            wide[value.get_node().get_friendly_name()] for value in node.input_values()
        )
        if wide[name] and types == {"f32"} and kind not in ("Parameter", "Constant", "Convert", "Result"):
            yield node


def plain_reshape(node: Any) -> Any:
    """The node, or for an Unsqueeze the Reshape that it would become, losing its mark, when it is loaded."""
    if node.get_type_name() != "Unsqueeze":
        return node
    from openvino import opset13

    shape = np.array(node.get_output_shape(0), np.int64)
    reshape = opset13.reshape(node.input_value(0), shape, special_zero=False, name=node.get_friendly_name())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(reshape.output(0))
    return reshape


def keep_fp32(path: Path, names: set[str]) -> None:
    """Marks layers of an .xml as not to be narrowed; OpenVINO's Python interface has no other way."""
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") in names:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path)


def load(path: Path, contract: StageContract, target: GpuTarget) -> Runner:
    return OpenVinoRunner(path, contract)


def import_openvino() -> Any:
    """The package, kept from reporting its import to its makers over the network."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]  # to Python: not installed
    try:
        import openvino
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
    return openvino


def first_reason(error: Exception) -> str:
    """OpenVINO's errors begin with the lines of its source that they passed through."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(("Exception from", "Check "))), lines[0])


class OpenVinoRunner(Runner):
    """One compiled graph with one request.

    Inputs are read where they lie; outputs are the same arrays at every call.
    """

    def __init__(self, path: Path, contract: StageContract) -> None:
        super().__init__(contract)
        ov = import_openvino()
        core = ov.Core()
        try:
            model = core.read_model(path)
            check_contract(path, "inputs", model.inputs, contract.inputs)
            check_contract(path, "outputs", model.outputs, contract.outputs)
            precision = Precision(model.get_rt_info(LABEL).value)
            if reason := cannot_compute(precision):
                raise BackendError(f"{path} computes in {precision}: {reason}", REBUILD)
            settings = {
                "INFERENCE_PRECISION_HINT": HINTS[precision.floats],
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads(),
                **shared_work(core, path),
            }
            self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        except (RuntimeError, KeyError, ValueError) as error:
            version = ov.get_version()
            raise BackendError(
                f"OpenVINO {version} can't open {path}: {first_reason(error)}", REBUILD
            ) from error
        self._tensor = ov.Tensor
        self._outputs = {s.name: np.empty(s.shape, s.dtype) for s in contract.outputs}
        for i, array in enumerate(self._outputs.values()):
            self._request.set_output_tensor(i, ov.Tensor(array, shared_memory=True))

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        held = [self.readable(spec, as_numpy(inputs[spec.name])) for spec in self.contract.inputs]
        for i, array in enumerate(held):
            self._request.set_input_tensor(i, self._tensor(array, shared_memory=True))
        self._request.infer()
        return dict(self._outputs)

    def readable(self, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
        """The array itself, or a copy where OpenVINO can't share it: of another type, strided, read-only."""
        if array.shape != spec.shape:
            raise BackendError(
                f"the {self.contract.name} engine takes {spec.name} as {spec.shape}, not {array.shape}"
            )
        return np.require(array, spec.dtype, ["C", "W"])

    def close(self) -> None:
        self._request = None
        self._outputs = {}


def shared_work(core: Any, path: Path) -> dict[str, str]:
    """Lets a large model's threads take work from each other, where this OpenVINO can.

    By default each is given its share of a layer beforehand, and all wait for the last: SD1.5's step took 9 %
    longer so on two cores, and 18 % on busy ones. The taking costs a small model some 5 %.
    """
    able = "TBB_PARTITIONER" in core.get_property("CPU", "SUPPORTED_PROPERTIES")
    return {"TBB_PARTITIONER": "AUTO"} if able and path.with_suffix(".bin").stat().st_size > LARGE else {}


def check_contract(path: Path, side: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """BackendError unless the engine takes and gives arrays of the contract's shapes and types."""
    has = [(list(port.partial_shape.get_max_shape()), port.element_type.to_dtype().name) for port in found]
    needs = [(list(spec.shape), spec.dtype) for spec in specs]
    if has != needs:
        raise BackendError(f"{path} has the {side} {has}; its contract says {needs}", REBUILD)
