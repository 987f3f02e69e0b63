"""`verify --bisect` names the layer that was damaged, on real engines."""

from __future__ import annotations

import json
import shutil
import sys

import factories
import numpy as np
import onnx
import pytest

from lcm_compile import BuildSpec
from lcm_compile.builder import plan
from lcm_compile.builder.export import export
from lcm_compile.bundles.bundle import list_files, open_bundle
from lcm_compile.bundles.export_manifest import open_export
from lcm_compile.bundles.manifest import MANIFEST
from lcm_compile.engines import openvino
from lcm_compile.export import onnx_graph
from lcm_compile.proof import bisect as module
from lcm_compile.proof.bisect import bisect


@pytest.fixture(scope="module")
def half_graphs(sdxl_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("graphs") / "fp16"
    export(BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", precision="fp16"), out)
    return out


def damage(path, op, where=0.5):
    """Makes the weights of one layer in the middle of a graph 1 % larger; returns the layer's output."""
    model = onnx.load(path)
    used = [name for node in model.graph.node for name in node.input]
    weights = {w.name: w for w in model.graph.initializer if len(w.dims) > 1 and used.count(w.name) == 1}
    layers = [n for n in model.graph.node if n.op_type == op and n.input[1] in weights]
    layer = layers[int(len(layers) * where)]
    weight = weights[layer.input[1]]
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values * values.dtype.type(1.01), weight.name))
    onnx.save(model, path)
    return layer.output[0]


def damaged(bundle, op="Conv"):
    """Damages a bundle's step, puts its digest right, and returns the damaged layer's output."""
    tensor = damage(bundle / "engines/step.onnx", op)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"] = list_files(bundle)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    return tensor


def known_name(tensor, engine, nodes):
    """The name in `nodes` of an engine's result: a fused layer may end with a Reshape that has its name."""
    while tensor not in nodes:
        tensor = next(node.output[0] for node in engine.graph.node if tensor in node.input)
    return tensor


def unwrapped(out):
    """What is printed, with a line for each stage."""
    return out.replace("\n  ", " ")


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_the_damaged_layer_is_named(bundle, sdxl_graphs, command, op):
    exported = onnx.load(sdxl_graphs / "graphs/step.onnx")
    nodes = {name: node for node in exported.graph.node for name in node.output}
    tensor = known_name(damaged(bundle, op), onnx.load(bundle / "engines/step.onnx"), nodes)
    node = nodes[tensor]
    code, out, err = command("verify", bundle, "--bisect", "--graphs", sdxl_graphs, "--json")
    stages = json.loads(out)["bisected"]
    assert code == 3 and ": step\n" in err and "--force" in err
    first = stages["step"]["first"]
    assert (first["node"], first["op"], first["tensor"]) == (node.name, node.op_type, tensor)
    assert stages["step"]["worst"]["db"] <= first["db"] < 80
    assert all(found["first"] is None for name, found in stages.items() if name != "step")


def test_the_layer_is_printed(bundle, sdxl_graphs, command):
    tensor = damaged(bundle)
    code, out, _ = command("verify", bundle, "--bisect", "--graphs", sdxl_graphs)
    line = next(line for line in unwrapped(out).splitlines() if line.startswith("step: "))
    assert code == 3 and "below 80 dB is" in line and f"(Conv), whose output {tensor} has" in line


@pytest.mark.parametrize("given", [True, False])
def test_of_a_sound_bundle_nothing_differs(sdxl_bundle, sdxl_graphs, command, given):
    code, out, _ = command("verify", sdxl_bundle, "--bisect", *(["--graphs", sdxl_graphs] if given else []))
    assert code == 0
    assert max(map(len, out.splitlines())) < 80
    lines = unwrapped(out).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["encode", "context", "step", "decode"]
    assert all(": none of " in line and "torch" not in line for line in lines)


def test_a_bundle_that_is_compared_with_itself_is_compared_with_torch_too(bundle, command):
    """Its own file is damaged, so no layer differs from the file: the line says that the file is wrong."""
    damaged(bundle)
    code, out, _ = command("verify", bundle, "--bisect")
    line = next(line for line in unwrapped(out).splitlines() if line.startswith("step: "))
    assert code == 3 and "none of" in line and "but the graph itself is" in line


def test_layers_that_are_run_in_parts_give_the_same(bundle, sdxl_graphs, monkeypatch):
    damaged(bundle)
    once = dict(bisect(open_bundle(bundle), open_export(sdxl_graphs)))
    opened = []
    real = module.open_plain
    monkeypatch.setattr(module, "open_plain", lambda path: opened.append(path) or real(path))
    monkeypatch.setattr(module, "RUN_BYTES", 1_000_000)
    in_parts = dict(bisect(open_bundle(bundle), open_export(sdxl_graphs)))
    assert len(opened) > len(once)
    assert {n: (b.layers, b.first and b.first.node) for n, b in in_parts.items()} == {
        n: (b.layers, b.first and b.first.node) for n, b in once.items()
    }


def test_a_part_holds_no_more_than_its_limit(monkeypatch):
    monkeypatch.setattr(module, "RUN_BYTES", 100)
    shapes = {"a": (10,), "b": (15,), "c": (), "d": (200,), "e": (1,)}
    assert list(module.parts(shapes)) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_layer_that_openvino_computes_wrongly_is_named(sdxl_graphs, command, monkeypatch, tmp_path):
    _, built = factories.build_from(sdxl_graphs, "cpu", "openvino", tmp_path / "b")
    real, tensors = openvino.build, {"encode": None, "context": None, "decode": None}

    def build(graph, target, folder, options):
        if graph.contract.name == "step":
            tensors["step"] = damage(graph.path, "Conv")
        return real(graph, target, folder, options)

    code, out, _ = command("verify", built.folder, "--bisect", "--graphs", sdxl_graphs)
    assert code == 0 and unwrapped(out).count(": none of ") == 4
    monkeypatch.setattr(openvino, "build", build)
    code, out, _ = command("verify", built.folder, "--bisect", "--graphs", sdxl_graphs, "--json")
    data = json.loads(out)
    assert {name: s["first"] and s["first"]["tensor"] for name, s in data["bisected"].items()} == tensors
    assert data["passed"] and code == 0  # the bundle's own engine, which was built before, is sound


def test_half_precision_is_compared_with_fp32(half_graphs, tmp_path):
    _, built = factories.build_from(half_graphs, "cpu", "onnxruntime", tmp_path / "b")
    found = dict(bisect(built, open_export(half_graphs)))
    # What fp16 rounds shows, so the reference is not in fp16 too; and that is within fp16's floor.
    assert all(45 <= b.worst.db < 100 for name, b in found.items() if name in ("step", "decode"))
    assert not any(b.first for b in found.values())


def test_the_reference_computes_everything_in_fp32(half_graphs, tmp_path):
    source = half_graphs / "graphs/step.onnx"
    graph = onnx.load(source).graph
    floats = {value.name for value in graph.value_info if module.is_float(value)}
    names = [name for node in graph.node for name in node.output if name in floats]
    outputs = [value.name for value in graph.output]
    assert {value.type.tensor_type.elem_type for value in graph.value_info} & set(module.HALVES)
    with module.open_plain(module.write_marked(source, tmp_path / "g", outputs, names, True)) as runner:
        found = {output.name: output.type for output in runner.sess.get_outputs()}
    assert list(found) == outputs + names and set(found.values()) == {"tensor(float)"}


def test_what_the_layers_say_beside_what_the_outputs_say():
    bad, good = module.Layer("n", "Conv", "t", 20.0), module.Layer("n", "Conv", "t", 120.0)
    texts = [
        (
            None,
            120,
            120,
            "none of 9 layers is below 80 dB; the worst is n (Conv), whose output t has 120.0 dB",
        ),
        (bad, 20, 120, "the first of 9 layers below 80 dB is n (Conv), whose output t has 20.0 dB"),
        (bad, 90, 120, "but the stage's own outputs have 90.0 dB, which pass"),
        (None, 20, 20, "but the graph itself is 20.0 dB from torch"),
        (None, 20, 120, "so the fault is in layers that are fused if none is returned"),
    ]
    for first, engine_db, graph_db, text in texts:
        found = module.Bisection(9, 80, first, first or good, engine_db, graph_db)
        assert text in str(found) and found.passed == (engine_db >= 80)


def test_a_mask_is_no_error_and_nan_is():
    mask = np.array([1.0, -np.inf], np.float32)
    assert module.finite_snr_db(mask, mask) == 200
    assert module.finite_snr_db(np.ones(2, np.float32), np.array([1, np.nan], np.float32)) == -200


def test_a_twin_stands_in_for_a_large_model(sdxl_checkpoint, monkeypatch, tmp_path):
    """The proof of a large model is of a smaller picture, and so are the graphs that are compared."""
    monkeypatch.setattr(plan, "LARGE_BYTES", 0)
    monkeypatch.setattr(plan, "TWIN_LATENT", 8)
    monkeypatch.setattr(onnx_graph, "INLINE_LIMIT", 1000)
    monkeypatch.setattr("lcm_compile.builder.schedule.ForkServer", factories.InThisProcess)
    export(
        BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", precision="fp32"),
        tmp_path / "graphs",
    )
    _, built = factories.build_from(tmp_path / "graphs", "cpu", "onnxruntime", tmp_path / "b")
    assert built.manifest.proof.shape.height == 32
    assert [name for name, _ in bisect(built)] == ["encode"]
    found = dict(bisect(built, open_export(tmp_path / "graphs")))
    assert list(found) == ["encode", "context", "step", "decode"]
    assert not any(b.first for b in found.values()) and all(b.graph_db >= b.floor for b in found.values())


def test_without_polygraphy_the_extra_is_named(sdxl_bundle, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    refused(
        1, ["polygraphy", "pip install 'lcm-compile[bisect]'"], "verify", sdxl_bundle, "--bisect", "--quiet"
    )


def test_what_can_not_be_bisected_is_refused(sdxl_bundle, sdxl_graphs, half_graphs, refused, tmp_path):
    refused(2, "--graphs needs --bisect", "verify", sdxl_bundle, "--graphs", sdxl_graphs)
    refused(1, "not an export", "verify", sdxl_bundle, "--bisect", "--graphs", tmp_path)
    refused(1, ["precision of", "is fp16"], "verify", sdxl_bundle, "--bisect", "--graphs", half_graphs)
    _, built = factories.build_from(sdxl_graphs, "cpu", "openvino", tmp_path / "openvino")
    refused(1, ["no ONNX graph", "--graphs DIR"], "verify", built.folder, "--bisect")
    other = shutil.copytree(sdxl_bundle, tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps({**manifest, "backend": "torchscript"}))
    refused(1, ["torchscript", "--backend onnxruntime"], "verify", other, "--bisect")
