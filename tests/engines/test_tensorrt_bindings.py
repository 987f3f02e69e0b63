"""Every call of TensorRT and of TensorRT for RTX, and the stand-in for them, held to both real bindings.

The bindings are asked in a process of their own. Those of TensorRT are installed without its libraries, which
are not on PyPI: small ones that export the same names take their place, and compute nothing.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import stand_in_tensorrt as stand_in

from lcm_compile.engines import tensorrt, tensorrt_rtx

ENGINES = Path(tensorrt.__file__).parent
# The classes that our code has objects of.
CLASSES = (
    *(
        "Builder",
        "INetworkDefinition",
        "IBuilderConfig",
        "ITimingCache",
        "OnnxParser",
        "Runtime",
        "ICudaEngine",
    ),
    *("IExecutionContext", "EngineInspector", "IRuntimeConfig", "IRuntimeCache", "ILogger", "ILayer"),
)
TELL = """
import inspect, json, sys
from importlib import import_module
trt = import_module(sys.argv[1])
told = {}
for name, owner in inspect.getmembers(trt, inspect.isclass):
    members = {key: getattr(getattr(owner, key, None), "__doc__", None) or "" for key in dir(owner)}
    told[name] = {**members, "__init__": owner.__init__.__doc__ or ""}
print(json.dumps(told))
"""
# What the bindings of TensorRT need of its libraries, by the library.
EXPORTS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
# What TensorRT for RTX alone has, of all that our code uses. TensorRT's engines meet none of it.
RTX_ONLY = {"create_runtime_cache", "set_runtime_cache", "deserialize", "set_compute_capability"}
# Of these names Python's own types have methods too; OWN_CALLS has the bindings'.
OWN = {"log"}


def told_by(package, libraries=None):
    """What a package's classes have, by name: the text that says what each member takes."""
    command = [sys.executable, "-c", TELL, package]
    environment = {**os.environ, **({"LD_LIBRARY_PATH": str(libraries)} if libraries else {})}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.fixture(scope="module", params=["tensorrt", "tensorrt_rtx"])
def bindings(request, tmp_path_factory):
    """The name of a package, and what its bindings have."""
    if request.param == "tensorrt_rtx":
        pytest.importorskip("tensorrt_rtx")
        return request.param, told_by("tensorrt_rtx")
    if find_spec("tensorrt_bindings") is None or shutil.which("cc") is None:
        pytest.skip("needs tensorrt_cu13_bindings and a C compiler")
    folder = tmp_path_factory.mktemp("libraries")
    for name, exports in EXPORTS.items():
        source = "".join(f"void *{export}() {{ return 0; }}" for export in exports)
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / f"lib{name}.so.11")]
        subprocess.run(command, input=source, text=True, check=True)
    return request.param, told_by("tensorrt_bindings", folder)


def calls_in(path):
    """(method, positional arguments, names of others) of every call of a method in a source file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            yield node.func.attr, None if starred else len(node.args), {k.arg for k in node.keywords}


def overloads(name, text):
    """The names of a method's arguments, and of those without a default, for each of its overloads."""
    for arguments in re.findall(rf"(?:^|\d\. ){name}\(self: (.*?)\) -> ", text, re.MULTILINE):
        found = re.findall(r", (\w+): ([^,]*)", arguments)
        yield [a for a, _ in found], [a for a, told in found if " = " not in told]


def takes(classes, method):
    """Every way in which a method of that name may be called, whatever class has it."""
    owners = [classes[name] for name in CLASSES if method in classes.get(name, ())]
    return [signature for owner in owners for signature in overloads(method, owner[method])]


EXPECTED = {
    "tensorrt.py": {
        *("create_network", "parse_from_file", "get_error", "build_serialized_network", "clear_flag"),
        *("deserialize_cuda_engine", "create_execution_context", "get_tensor_name", "get_tensor_mode"),
        *("get_tensor_dtype", "get_tensor_shape", "set_device_memory", "create_runtime_config"),
        *("set_tensor_address", "execute_async_v3", "get_engine_information"),
        *("set_execution_context_allocation_strategy", "create_engine_inspector"),
    },
    "tensorrt_network.py": {
        *("get_layer", "get_input", "get_output", "set_input", "add_deconvolution_nd"),
    },
    "tensorrt_rtx.py": {"set_compute_capability", "get_engine_validity", "set_flag"},
    "tensorrt_caches.py": {
        *("create_timing_cache", "set_timing_cache", "serialize"),
        *("create_runtime_cache", "set_runtime_cache", "deserialize"),
    },
}


@pytest.mark.parametrize("file", EXPECTED)
def test_every_call_fits_the_real_bindings(bindings, file):
    package, classes = bindings
    if (file, package) == ("tensorrt_rtx.py", "tensorrt"):
        pytest.skip("it calls TensorRT for RTX alone")
    checked = set()
    for method, count, keywords in calls_in(ENGINES / file):
        signatures = takes(classes, method)
        if not signatures or method.startswith("__") or method in OWN:
            continue
        assert any(
            (count is None or len(needed) <= count + len(keywords) <= len(names)) and keywords <= set(names)
            for names, needed in signatures
        ), f"{method} takes {signatures}, not {count} and {keywords}"
        checked.add(method)
    assert checked >= EXPECTED[file] - (RTX_ONLY if package == "tensorrt" else set())


def test_the_reader_of_signatures_sees_what_would_not_fit(bindings):
    _, classes = bindings
    assert takes(classes, "set_tensor_address") == [(["name", "memory"],) * 2]
    assert takes(classes, "create_network") == [(["flags"], [])]
    assert (["runtime_config"], []) in takes(classes, "create_execution_context")


def test_attributes_and_what_is_called_by_other_names(bindings):
    """Properties, constants, and constructors, which are no calls of methods."""
    package, classes = bindings
    names = {
        "ICudaEngine": ["num_io_tensors", "num_layers", "device_memory_size_v2"],
        "IBuilderConfig": ["builder_optimization_level", "profiling_verbosity"],
        "INetworkDefinition": ["num_layers"],
        "IAttentionInputLayer": ["attention"],
        "IAttention": ["decomposable"],
        "ILayer": ["type", "name", "num_inputs", "num_outputs"],
        "IConcatenationLayer": ["axis"],
        "IConvolutionLayer": [
            *("kernel_size_nd", "stride_nd", "dilation_nd", "pre_padding", "post_padding", "num_groups"),
            *("num_output_maps", "kernel", "bias"),
        ],
        "IShuffleLayer": ["first_transpose", "second_transpose"],
        "IDeconvolutionLayer": ["stride_nd", "padding_nd"],
        "OnnxParser": ["num_errors"],
        "LayerInformationFormat": ["JSON"],
        "ProfilingVerbosity": ["DETAILED"],
        "TensorIOMode": ["INPUT", "OUTPUT"],
        "LayerType": ["ATTENTION_INPUT", "CONCATENATION", "CONVOLUTION", "SHUFFLE"],
        "BuilderFlag": ["TF32"],
        "DataType": list(tensorrt.DTYPES),
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    }
    if package == "tensorrt_rtx":
        names["Runtime"] = ["engine_header_size"]
        names["IBuilderConfig"].append("num_compute_capabilities")
        names["IRuntimeConfig"] = ["cuda_graph_strategy"]
        names["BuilderFlag"].append("REQUIRE_USER_ALLOCATION")
        names["CudaGraphStrategy"] = ["DISABLED", "WHOLE_GRAPH_CAPTURE"]
        names["ComputeCapability"] = [f"SM{c.replace('.', '')}" for c in tensorrt_rtx.CAPABILITIES]
        assert takes(classes, "is_stream_capturable") == [(["stream"],) * 2]
    else:  # so the runner asks before it uses them
        assert "CudaGraphStrategy" not in classes and not takes(classes, "is_stream_capturable")
    for owner, members in names.items():
        assert set(members) <= set(classes[owner]), owner
    for owner, arguments in {
        "Runtime": ["logger"],
        "Builder": ["logger"],
        "OnnxParser": ["network", "logger"],
        "ILogger": [],
    }.items():
        assert re.findall(r", (\w+): ", classes[owner]["__init__"].splitlines()[0]) == arguments
    assert takes(classes, "log") == [(["severity", "msg"],) * 2]


def test_the_stand_in_has_the_bindings_own_signatures(bindings):
    _, classes = bindings
    compared = set()
    for name in CLASSES:
        own = getattr(stand_in, name, None)
        for method, function in vars(own).items() if own else ():
            if (
                not inspect.isfunction(function)
                or method.startswith("__")
                or method not in classes.get(name, ())
            ):
                continue
            names = list(inspect.signature(function).parameters)[1:]
            assert names in [told for told, _ in overloads(method, classes[name][method])], (name, method)
            compared.add(method)
    assert compared >= {
        *("set_tensor_address", "execute_async_v3", "set_device_memory", "deserialize_cuda_engine"),
        *("get_tensor_name", "get_tensor_dtype", "create_execution_context", "create_runtime_config"),
    }
