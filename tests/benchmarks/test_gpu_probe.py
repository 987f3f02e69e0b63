"""The probe of a GPU, tried on a processor: its parts, and the kit in which it travels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from torch import nn

from lcm_compile import BuildSpec, build
from lcm_compile.benchmarks.gpu import eager, kit, probe, probe_items
from lcm_compile.benchmarks.gpu.items import Missing
from lcm_compile.bundles.bundle import list_files, open_bundle
from lcm_compile.bundles.manifest import StageFile, read_manifest
from lcm_compile.engines.weights_file import write_weights
from lcm_compile.errors import UsageError
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import snr_db
from lcm_compile.stages.quantize import choose_scales, install_layers, quantize_layers
from lcm_compile.stages.stage import Stage


@pytest.fixture
def noted(monkeypatch):
    """What a part notes; each measurement takes no longer than it must."""
    monkeypatch.setattr(probe_items, "EACH", 0.0)
    found = {}
    return found, lambda **results: found.update(results)


@pytest.fixture
def weighty(sdxl_bundle, tmp_path):
    """A bundle with weights in a file of their own, and these."""
    folder = shutil.copytree(sdxl_bundle, tmp_path / "bundle")
    weights = {
        "layer": np.ones((600, 512), np.float32),
        "vector": np.ones(4096, np.float32),
        "half": np.full((64, 64), 7, np.float16),
        "count": np.arange(3, dtype=np.int64),
        "counts": np.ones(2048, np.int64),
    }
    save_file(weights, folder / "engines" / "step.safetensors", {"of": "step"})
    manifest, _ = read_manifest(folder)
    replace(manifest, files=list_files(folder)).write(folder)
    return folder, weights


def test_facts(noted, tmp_path):
    found, note = noted
    probe_items.facts(note, "cpu", tmp_path)
    assert found["cannot_run"]["torchscript"] is None
    assert "NVIDIA GPUs only" in found["cannot_run"]["tensorrt-rtx"]
    assert found["compiler"] == shutil.which("g++") and found["headline"]


def test_ceilings(noted, tmp_path):
    found, note = noted
    probe_items.ceilings(note, "cpu", tmp_path)
    assert len(found["tflop_s"]) == 8 and found["copy_gb_s"] > 0
    for figures in found["tflop_s"].values():
        assert figures["bf16"] > 0 and figures.keys() == {"fp16", "bf16", "fp8", "int8"}


def test_what_one_form_of_attention_can_not_do_ends_no_other(noted, tmp_path):
    found, note = noted
    probe_items.attention(note, "cpu", tmp_path)
    assert len(found["attention_ms"]) == 5
    for figures in found["attention_ms"].values():
        assert isinstance(figures["CUDNN_ATTENTION"], str) and figures["written out"] > 0


def test_all_forms_compute_the_same(noted, tmp_path, monkeypatch):
    found, note = noted
    monkeypatch.setattr(probe_items, "MAPS", ((32, 128),))
    monkeypatch.setattr(probe_items, "NORMALIZED", ((64, 128),))
    probe_items.forms(note, "cpu", tmp_path)
    assert all(len(forms) == 4 for forms in found["doubling"].values()) and len(found["doubling"]) == 2
    for forms in (*found["doubling"].values(), *found["normalization"].values()):
        assert all(form["ms"] > 0 and form["differs"] < 1e-4 for form in forms.values()), forms


def test_engines_are_timed_and_held_to_their_proof(noted, sdxl_bundle, tmp_path):
    found, note = noted
    probe_items.stages(note, "cpu", tmp_path, sdxl_bundle)
    assert found["stages"].keys() == {"encode", "context", "step", "decode"}
    for result in found["stages"].values():
        assert result["ms"] > 0 and result["db"] > 80 and result["captured"] == "it computes on the processor"
    with pytest.raises(Missing, match="is for cpu, and this run is for h100"):
        probe_items.stages(note, "h100", tmp_path, sdxl_bundle)


def test_what_follows_a_product_is_the_same_within_it(noted, tmp_path):
    found, note = noted
    probe_items.epilogues(note, "cpu", tmp_path)
    assert len(found["epilogues"]) == 4
    for forms in found["epilogues"].values():
        assert len(forms) == 2 and all(form["ms"] > 0 and form["differs"] < 1e-5 for form in forms.values())


def test_a_bundle_travels_without_its_weights_and_gets_random_ones(noted, weighty, tmp_path):
    folder, weights = weighty
    kit.strip(folder, tmp_path / "kit" / "bundle")
    travelled = tmp_path / "kit" / "bundle"
    assert not list(travelled.rglob("*.safetensors")) and len(kit.left_out(travelled)) == 1
    saved = sum(array.nbytes for name, array in weights.items() if name not in ("half", "count"))
    calls = sum(path.stat().st_size for path in folder.glob("proof/*.npz"))
    sizes = [sum(p.stat().st_size for p in one.rglob("*") if p.is_file()) for one in (folder, travelled)]
    assert sizes[0] - sizes[1] == saved + calls and calls
    found, note = noted
    probe_items.stages(note, "cpu", tmp_path / "work", travelled)
    assert found["stages"]["step"]["ms"] > 0 and "db" not in found["stages"]["step"]
    pipe = eager.eager_pipeline(open_bundle(folder), "cpu", torch.bfloat16)
    assert pipe.unet.dtype == pipe.vae.dtype == torch.bfloat16 and not pipe.vae.config.force_upcast
    probe_items.pictures(note, "cpu", tmp_path / "work", "pictures", travelled)
    assert found["ms"].keys() == {"with graphs", "without graphs", "eager"}
    assert all(len(samples) >= 3 and min(samples) > 0 for samples in found["ms"].values())
    filled = tmp_path / "work" / "filled" / "bundle"
    open_bundle(filled).manifest.check_files(filled)
    assert not list(filled.rglob("*.header")) and not list(filled.rglob("*.small"))
    made = load_file(filled / "engines" / "step.safetensors")
    assert {n: (a.dtype, a.shape) for n, a in made.items()} == {
        n: (a.dtype, a.shape) for n, a in weights.items()
    }
    assert made["layer"].std() == pytest.approx(512**-0.5, rel=0.02) and abs(made["layer"].mean()) < 1e-3
    assert made["vector"].std() == pytest.approx(kit.SCALE, rel=0.05) and not made["counts"].any()
    assert np.array_equal(made["half"], weights["half"]) and np.array_equal(made["count"], weights["count"])
    # The header, with what it tells besides, is the original's.
    originals, copies = (one / "engines" / "step.safetensors" for one in (folder, filled))
    size = len(originals.read_bytes()) - sum(array.nbytes for array in weights.values())
    assert originals.read_bytes()[:size] == copies.read_bytes()[:size]


def test_random_weights_of_products_in_fp8_are_as_large_as_their_scale_expects(tmp_path):
    arrays = {"weight": torch.ones(640, 640).to(torch.float8_e4m3fn), "scale": torch.tensor(0.25)}
    save_torch(arrays, tmp_path / "plain.safetensors")
    header, _ = kit.read_header(tmp_path / "plain.safetensors")
    (tmp_path / "header").write_bytes(header)
    (tmp_path / "small").write_bytes(np.float32(0.25).tobytes())
    kit.write_random(tmp_path / "header", tmp_path / "small", tmp_path / "random.safetensors")
    made = load_torch(tmp_path / "random.safetensors")
    assert made["scale"] == 0.25 and made["weight"].dtype == torch.float8_e4m3fn
    assert float(made["weight"].float().abs().max()) == torch.finfo(torch.float8_e4m3fn).max


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(32), nn.Linear(32, 16)
        self.register_buffer("shift", torch.randn(16), persistent=False)

    def forward(self, x):
        return (self.layer(self.norm(x.to(self.norm.weight.dtype))) + self.shift).float()


@pytest.mark.parametrize(("product", "db"), [("fp16", 55), ("fp8", 35)])
def test_torchs_module_gets_the_weights_of_an_engine(tmp_path, product, db):
    """Also those in 8 bits, with their scales: it then computes what the engine should, but for rounding."""
    exported, other, x, names = Layers().eval(), Layers().eval(), torch.randn(8, 32), ()
    if product == "fp8":
        scales = choose_scales(exported, Precision.FP8_FP16, *[lambda: exported(x)] * 2)
        layers = quantize_layers(exported, scales, Precision.FP8_FP16, scaled_mm=True)
        install_layers(exported.half(), layers)
        names = tuple(layers)
    else:
        exported.half()
    held = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
    path = tmp_path / "small.safetensors"
    write_weights(path, {f"module.{name}": weight for name, weight in held.items()})
    contract = StageContract("small", (TensorSpec("x", (8, 32), "float32", ""),), ())
    file = StageFile(contract, "small.pt2", Precision.of(product, "fp16"), quantized_layers=names)
    eager.give_weights(Stage(contract, other), file, path, "cpu")
    with torch.inference_mode():
        assert snr_db(exported(x).numpy(), other(x).numpy()) > db
    assert {weight.dtype for weight in other.parameters()} == {torch.float32}
    write_weights(path, {"module.unknown": torch.zeros(3)})
    with pytest.raises(Missing, match="unknown"):
        eager.give_weights(Stage(contract, Layers()), file, path, "cpu")


def needed_by(*names):
    """The packages that these need here, themselves among them, by what they say of themselves."""
    found, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name not in found:
            found.add(name)
            wanted = [Requirement(line) for line in distribution(name).requires or ()]
            left += [w.name for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


def test_what_diffusers_and_the_probe_need_is_in_the_kit_or_there():
    there = needed_by("torch", "transformers", "pillow")
    wanted = needed_by("diffusers", "click", "rich", "platformdirs") - there
    assert wanted <= {canonicalize_name(name) for name in ("diffusers", *kit.SMALL)}


def test_a_kit_that_is_too_large_names_the_largest_file(weighty, tmp_path, monkeypatch):
    """Without what it downloads."""
    folder, _ = weighty
    monkeypatch.setattr(kit.subprocess, "run", lambda *_, **__: None)
    kit.pack(tmp_path / "kit.tar.gz", (folder,))
    assert (tmp_path / "kit.tar.gz").stat().st_size < 60e6
    monkeypatch.setattr(kit, "MOST_BYTES", 1000)
    with pytest.raises(UsageError) as caught:
        kit.pack(tmp_path / "large.tar.gz", (folder,))
    assert "bundles/bundle/engines/" in (caught.value.hint or "") and not (tmp_path / "large.tar.gz").exists()


def test_parts_are_in_the_order_of_their_worth_each_with_a_limit(tmp_path):
    parts = probe.parts_of((tmp_path / "a", tmp_path / "b"))
    assert [part.name for part in parts] == [
        *("facts", "ceilings", "attention", "forms"),
        *("stages-a", "parity-a", "stages-b", "parity-b"),
        *("pictures-a", "pictures-b", "compiled-a", "compiled-b", "epilogues"),
    ]
    assert all(part.most <= 240 for part in parts)


def probed(folder, tmp_path):
    """The report of the command for a bundle, written where it is asked for, and the outcome of each part."""
    words = ["--device", "cpu", "--results", tmp_path / "results", "--bundle", folder, "--budget", "400"]
    command = [sys.executable, "-m", "lcm_compile.benchmarks.gpu.probe", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("gpu_probe-cpu.json")
    items = json.loads((tmp_path / "results" / "gpu_probe-cpu.json").read_text())["items"]
    return items, {name.removesuffix(f"-{folder.name}"): item["outcome"] for name, item in items.items()}


@pytest.mark.slow
def test_a_bundle_with_weights_is_held_to_its_proof_and_to_diffusers(sdxl_bundle, tmp_path):
    items, outcomes = probed(sdxl_bundle, tmp_path)
    missing = {name for name, outcome in outcomes.items() if outcome == "missing"}
    assert missing == {"parity", "compiled"}, items
    assert {outcomes[name] for name in outcomes.keys() - missing} == {"ok"}, items
    assert items[f"pictures-{sdxl_bundle.name}"]["summary"]
    assert items[f"stages-{sdxl_bundle.name}"]["stages"]["step"]["db"] > 80


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_bundle_without_weights_is_held_to_torch_with_those_that_it_gets(tmp_path):
    """Compiled for this processor, it travels as one for a GPU does."""
    spec = BuildSpec("demo", gpu="cpu", backend="aotinductor", precision="fp32")
    build(spec, tmp_path / "made")
    kit.strip(tmp_path / "made", tmp_path / "demo")
    assert kit.left_out(tmp_path / "demo")
    items, outcomes = probed(tmp_path / "demo", tmp_path)
    assert outcomes.pop("compiled") == "missing" and set(outcomes.values()) == {"ok"}, items
    figures = items["parity-demo"]["db"]
    assert figures.keys() == {"encode", "context", "step", "decode"} and min(figures.values()) > 80, figures
    assert items["pictures-demo"]["ms"]["eager"]
