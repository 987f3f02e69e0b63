"""Large models, made small: a process for each stage, and a twin where no engine of the target runs here."""

from __future__ import annotations

import os
import subprocess
import sys

import factories
import numpy as np
import pytest

from lcm_compile import BuildSpec, build
from lcm_compile.benchmarks.gpu.gpu_items import build_quickly
from lcm_compile.builder import plan
from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import BundleError, LcmCompileError
from lcm_compile.export import onnx_graph
from lcm_compile.proof.parity import STAGE_FLOORS
from lcm_compile.proof.verify import verify
from lcm_compile.spec import IpAdapterSpec, Shape
from lcm_compile.system.child_process import call_in_child


@pytest.fixture
def large(monkeypatch):
    """Every model counts as large; weights lie beside the graph; a twin draws 32×32."""
    monkeypatch.setattr(plan, "LARGE_BYTES", 0)
    monkeypatch.setattr(plan, "TWIN_LATENT", 8)
    monkeypatch.setattr(onnx_graph, "INLINE_LIMIT", 1000)
    monkeypatch.setattr("lcm_compile.builder.schedule.ForkServer", factories.InThisProcess)


def test_a_twin_proves_engines_that_do_not_run_here(large, sdxl_checkpoint, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    adapter = factories.write_ip_adapter(sdxl_checkpoint, tmp_path / "adapter.safetensors", "plus")
    factories.write_image_encoder(tmp_path / "image_encoder")
    added = {"image": True, "ip_adapter": IpAdapterSpec(str(adapter))}
    spec = BuildSpec(base=str(sdxl_checkpoint), gpu="a10", no_lcm=True, few_step="lcm", **added)
    manifest = build(spec, tmp_path / "b").manifest
    assert manifest.pipeline.shape.height == 64 and manifest.proof.shape.height == 32
    told = {name: "of a twin of 1×32×32" in figure.checked for name, figure in manifest.parity.items()}
    of_the_twin = ("context", "step", "decode", "encode-image", "picture")
    assert told == {"encode": False, "ip-image": False, **dict.fromkeys(of_the_twin, True)}
    assert all(figure.db >= STAGE_FLOORS["fp16"] for figure in manifest.parity.values())


def test_the_twin_reads_the_very_weights_of_the_graph(large, sdxl_checkpoint, tmp_path, monkeypatch):
    """A weight that is changed in the graph's file shows in the twin, and the engine is refused."""
    from lcm_compile.builder import prepare
    from lcm_compile.errors import ParityError

    real, seen = prepare.export_twin, {}

    def export_twin(stage, graph):
        twin = real(stage, graph)
        weights = np.memmap(graph.weights, np.float16, "r+")
        weights[: len(weights) // 2] *= np.float16(1.1)
        weights.flush()
        seen[stage.name] = twin.path.stat().st_size / graph.weights.stat().st_size
        return twin

    monkeypatch.setattr(prepare, "export_twin", export_twin)
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ParityError, match=r"step.*twin"):
        build(BuildSpec(base=str(sdxl_checkpoint), gpu="a10", no_lcm=True, few_step="lcm"), tmp_path / "b")
    assert seen["step"] < 0.5
    assert not (tmp_path / "b").exists()


def test_stages_made_in_processes_of_their_own_are_the_same(
    sdxl_checkpoint, sdxl_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "LARGE_BYTES", 0)
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime")
    bundle = build(spec, tmp_path / "b")
    before, _ = read_manifest(sdxl_bundle)
    files = {name: bundle.manifest.files[name] for name in before.files if not name.startswith("proof/")}
    assert files == {name: digest for name, digest in before.files.items() if name in files}


def test_what_is_computed_apart_comes_back():
    assert call_in_child(sorted, [3, 1, 2]) == [1, 2, 3]
    assert call_in_child(os.getpid) != os.getpid()


def test_errors_cross_over():
    with pytest.raises(BundleError, match="there is no bundle at nowhere") as caught:
        call_in_child(read_manifest, plan.Path("nowhere"))
    assert caught.value.hint
    with pytest.raises(ZeroDivisionError):
        call_in_child(divmod, 1, 0)


def test_a_process_that_is_killed_is_told():
    with pytest.raises(LcmCompileError, match=r"_exit ended without a result \(exit code 7\)"):
        call_in_child(os._exit, 7)
    with pytest.raises(LcmCompileError, match="memory ran out"):
        call_in_child(exec, "import os; os.kill(os.getpid(), 9)")


@pytest.mark.parametrize("batch, replayed", [(1, {"encode"}), (2, set())])
def test_a_small_proof_of_engines_that_run_here(large, command, sdxl_checkpoint, tmp_path, batch, replayed):
    """What is of another size or number than the engines take is not replayed; the picture is drawn."""
    spec = BuildSpec(base=str(sdxl_checkpoint), no_lcm=True, few_step="lcm", batch=batch)
    bundle = build_quickly(spec, tmp_path / "b", lambda **found: None)
    assert bundle.manifest.proof.shape == Shape(1, 32, 32)
    assert verify(bundle).keys() == replayed
    code, _, err = command("verify", bundle.folder)
    assert code == 0 and ("nothing was compared" in err) == (not replayed)


def test_the_process_that_builds_a_large_model_itself_needs_no_torch(sd15_checkpoint, tmp_path):
    """Torch's own memory would add to that of each model that is prepared."""
    code = (
        "import sys\n"
        "from lcm_compile import BuildSpec, build\n"
        "from lcm_compile.builder import plan\n"
        "plan.LARGE_BYTES = 0\n"
        f"spec = BuildSpec({str(sd15_checkpoint)!r}, few_step='lcm', no_lcm=True, backend='onnxruntime')\n"
        f"assert build(spec, {str(tmp_path / 'b')!r}).manifest.parity['picture'].db > 60\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_of_a_large_model_are_compared_where_its_graphs_can_not_run(large, sd15_checkpoint, tmp_path):
    """ONNX Runtime computes no bf16 on a processor. Each model is compared with what those before it gave."""
    pytest.importorskip("tensorrt_rtx")
    spec = BuildSpec(str(sd15_checkpoint), gpu="a10", precision="bf16", no_lcm=True, few_step="lcm")
    parity = build(spec, tmp_path / "b").manifest.parity
    assert parity.keys() == {"encode", "context", "step", "decode", "picture"}
    assert all(figure.passed and "torch module" in figure.checked for figure in parity.values())
