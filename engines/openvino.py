"""OpenVINO on x86 CPUs, from ONNX graphs; neither building nor running needs torch.

An engine is an .xml file in OpenVINO's own format, and a .bin file of weights that is mapped into memory. The
.xml file records the precision that the engine computes in. Kernels are compiled for this machine's processor
when the engine is loaded.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lcm_compile.engines import other_version
from lcm_compile.engines.import_openvino import HINTS, import_openvino
from lcm_compile.engines.runner import Array, Runner, as_numpy
from lcm_compile.errors import REBUILD, BackendError
from lcm_compile.graphs import ExportedGraph, StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.system.decimal_point import decimal_point
from lcm_compile.system.processor import instruction_set, threads
from lcm_compile.system.stopwatch import Report, silent
from lcm_compile.targets import GpuTarget

GRAPH_FORMAT = "onnx"
PACKAGES = ("openvino",)
# The instruction set extensions for each type; a processor needs one of them. Without any, OpenVINO would
# still accept bf16, and compute slowly or in fp32.
NEEDS = {
    "bf16": ("avx512_bf16", "amx_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
# Bytes of weights above which a model is large: the smallest of SD1.5 has 94 MB, and the demo's step 12 MB.
LARGE = 1 << 26
# The path of the precision in a model's runtime information, which the .xml file keeps.
LABEL = ["lcm_compile", "precision"]
# And that of the sha256 of the library that a model with Winograd convolutions needs, which is next to it.
LIBRARY_LABEL = ["lcm_compile", "library"]
LIBRARY = "winograd.so"


def cannot_build(target: GpuTarget, precision: Precision) -> str | None:
    """Returns why this machine can't build an engine for the target in that precision, or None."""
    return cannot_run(target) or cannot_compute(precision)


def cannot_run(target: GpuTarget) -> str | None:
    """Returns why this machine can't run engines for the target, or None."""
    if not target.is_cpu:
        return "builds for the CPU only"
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed; pip install 'lcm-compile[openvino]'"
    return None


def cannot_compute(precision: Precision) -> str | None:
    """Returns why this processor can't compute in a precision, or None."""
    for name in precision.types:
        needs = NEEDS.get(name, ())
        if needs and not set(needs) & set(instruction_set()):
            return f"this processor has neither {' nor '.join(needs)}, and {name} needs one of them; use fp32"
    return None


def cannot_load(built_with: str, options: Mapping[str, Any]) -> str | None:
    """Returns None unless the engine has Winograd convolutions, whose library needs one version.

    Any version that knows the file's operators opens another engine, and `load` raises otherwise.
    """
    return other_version(built_with, PACKAGES) if options.get("winograd") else None


def options(
    target: GpuTarget, precision: Precision, rewrites: Collection[str], report: Report = silent
) -> Mapping[str, Any]:
    """Returns what `build` keeps in fp32 (see purely_fp32_nodes), and the form of convolutions by size.

    The forms are measured if they are not known for this machine. Without a C++ compiler there are none.
    """
    from lcm_compile.engines.winograd import choice
    from lcm_compile.engines.winograd.library import cannot_compile

    forms: Mapping[str, str] = {}
    if "winograd" in rewrites and cannot_compile() is None:
        forms = choice.choose(precision, report)
    return {"sinusoids": "fp32", "winograd": dict(forms)}


def build(
    graph: ExportedGraph,
    target: GpuTarget,
    folder: Path,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Writes `folder/<stage>.xml` and its .bin file, and the library if there are Winograd convolutions.

    Raises BackendError if OpenVINO refuses the graph.
    """
    from lcm_compile.engines.winograd.layers import replace_convolutions
    from lcm_compile.engines.winograd.library import digest_of, library

    ov = import_openvino()
    path = folder / f"{graph.contract.name}.xml"
    try:
        model = ov.Core().read_model(graph.path)
        model.set_rt_info(graph.precision.value, LABEL)
        if replace_convolutions(model, options.get("winograd", {}), bf16=graph.precision.floats == "bf16"):
            kernels = folder / LIBRARY
            if not kernels.exists():  # another stage may have brought it, as a link to another bundle's
                shutil.copyfile(library(), kernels)
            model.set_rt_info(digest_of(kernels), LIBRARY_LABEL)
        kept = [unsqueeze_to_reshape(node) for node in list(purely_fp32_nodes(model))]
        with decimal_point():  # otherwise it would write numbers that it can't read
            ov.save_model(model, path, compress_to_fp16=False)
        keep_fp32(path, {node.get_friendly_name() for node in kept})
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO can't convert the {graph.contract.name} stage: {first_reason(error)}",
            "--backend auto chooses another",
        ) from error
    return path


def purely_fp32_nodes(model: Any) -> Iterator[Any]:
    """Yields the fp32 operations that depend on no half-precision value.

    In a half-precision graph these compute the sinusoids of timesteps. OpenVINO would compute them in bf16
    like the rest, and round their angles, which go up to 999, to 8 bits: the signal-to-noise ratio of an
    SD1.5 step at timestep 499 then fell to 19 dB. Constants and conversions are left out.
    """
    wide: dict[str, bool] = {}  # by name: whether neither the node nor its inputs are in half precision
    for node in model.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        types = {node.get_output_element_type(i).to_string() for i in range(node.get_output_size())}
        wide[name] = not types & {"bf16", "f16"} and all(
            wide[value.get_node().get_friendly_name()] for value in node.input_values()
        )
        if wide[name] and types == {"f32"} and kind not in ("Parameter", "Constant", "Convert", "Result"):
            yield node


def unsqueeze_to_reshape(node: Any) -> Any:
    """Returns the node, or replaces an Unsqueeze by an equal Reshape and returns that.

    OpenVINO itself would make this replacement at loading, and lose the mark that keep_fp32 sets.
    """
    if node.get_type_name() != "Unsqueeze":
        return node
    from openvino import opset13

    shape = np.array(node.get_output_shape(0), np.int64)
    reshape = opset13.reshape(node.input_value(0), shape, special_zero=False, name=node.get_friendly_name())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(reshape.output(0))
    return reshape


def keep_fp32(path: Path, names: set[str]) -> None:
    """Marks layers of an .xml file to stay in fp32. OpenVINO's Python API offers no other way to do so."""
    tree = ElementTree.parse(path)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name") in names:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.Element("rt_info")
                layer.insert(1 if layer.find("data") is not None else 0, info)
            ElementTree.SubElement(info, "attribute", name="precise", version="0")
    tree.write(path)


def load(
    path: Path, contract: StageContract, target: GpuTarget, precision: Precision = Precision.FP32
) -> Runner:
    """Loads an engine. Raises BackendError as OpenVinoRunner does."""
    return OpenVinoRunner(path, contract)


def add_kernels(core: Any, path: Path) -> None:
    """Adds the library next to an engine to OpenVINO, if the engine needs it.

    Raises BackendError if the library is not the one that was built with the engine, or if this processor
    can't run its kernels.
    """
    text = path.read_bytes()
    if b'type="WinogradConvolution"' not in text:
        return
    from lcm_compile.engines.winograd.library import cannot_run, digest_of

    if reason := cannot_run():
        raise BackendError(f"{path} has Winograd convolutions: {reason}", f"{REBUILD} --without winograd")
    file = path.with_name(LIBRARY)
    if not file.is_file() or digest_of(file).encode() not in text:
        raise BackendError(f"{file} is not the library that {path.name} was built with", REBUILD)
    core.add_extension(file)


def first_reason(error: Exception) -> str:
    """Returns the first line of an OpenVINO error that gives a reason; lines about its source come first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(("Exception from", "Check "))), lines[0])


class OpenVinoRunner(Runner):
    """One compiled model, and an inference request for each thread that calls it at the same time.

    Inputs are read in place if OpenVINO can share them. Each call returns new arrays.
    """

    def __init__(self, path: Path, contract: StageContract) -> None:
        """Loads an engine.

        Raises BackendError if OpenVINO can't open the file, if the file does not match the contract, or if
        this processor can't compute in the engine's precision.
        """
        super().__init__(contract)
        ov = import_openvino()
        core = ov.Core()
        try:
            if path.is_file():
                add_kernels(core, path)
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
                **work_stealing(core, path),
            }
            self._model = core.compile_model(model, "CPU", settings)
        except (RuntimeError, KeyError, ValueError) as error:
            version = ov.get_version()
            raise BackendError(
                f"OpenVINO {version} can't open {path}: {first_reason(error)}", REBUILD
            ) from error
        self._tensor = ov.Tensor
        self._idle: deque[Any] = deque()  # requests that no call uses

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        model = self.opened(self._model)
        held = [self.readable(spec, as_numpy(inputs[spec.name])) for spec in self.contract.inputs]
        outputs = {spec.name: np.empty(spec.shape, spec.dtype) for spec in self.contract.outputs}
        try:
            request = self._idle.pop()
        except IndexError:
            request = model.create_infer_request()
        for i, array in enumerate(held):
            request.set_input_tensor(i, self._tensor(array, shared_memory=True))
        for i, array in enumerate(outputs.values()):
            request.set_output_tensor(i, self._tensor(array, shared_memory=True))
        request.infer()
        if self._model is not None:  # another thread may have closed this meanwhile
            self._idle.append(request)
        return outputs

    def readable(self, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
        """Returns the array, or a copy if OpenVINO can't share it: another type, strided or read-only.

        Raises BackendError if its shape is not the contract's.
        """
        if array.shape != spec.shape:
            raise BackendError(
                f"the {self.contract.name} engine takes {spec.name} as {spec.shape}, not {array.shape}"
            )
        return np.require(array, spec.dtype, ["C", "W"])

    def close(self) -> None:
        """Frees the compiled model; arrays that it returned stay valid."""
        self._model = None
        self._idle.clear()


def work_stealing(core: Any, path: Path) -> dict[str, str]:
    """Returns the setting that lets a large model's threads take work from each other, if OpenVINO has it.

    By default each thread gets a fixed share of every layer, and all wait for the slowest: SD1.5's step took
    9 % longer that way on two cores, and 18 % longer on two busy ones. Work stealing costs a small model
    about 5 %.
    """
    supported = "TBB_PARTITIONER" in core.get_property("CPU", "SUPPORTED_PROPERTIES")
    if supported and path.with_suffix(".bin").stat().st_size > LARGE:
        return {"TBB_PARTITIONER": "AUTO"}
    return {}


def check_contract(path: Path, side: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Raises BackendError unless an engine's inputs or outputs have the contract's shapes and types.

    `side` is "inputs" or "outputs", `found` are the model's and `specs` the contract's.
    """
    has = [(list(port.partial_shape.get_max_shape()), port.element_type.to_dtype().name) for port in found]
    needs = [(list(spec.shape), spec.dtype) for spec in specs]
    if has != needs:
        raise BackendError(f"{path} has the {side} {has}; its contract says {needs}", REBUILD)
