"""What an engine in half precision is held to if the model itself is sensitive to rounding."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import load_file, save_file

from lcm_compile import BuildSpec, build
from lcm_compile.bundles.manifest import StageFile
from lcm_compile.errors import ParityError
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.proof.parity import stage_floor
from lcm_compile.proof.verify import verify


def sensitive(checkpoint, folder, factor):
    """Returns a copy of a checkpoint whose attention turns small errors into large ones."""
    base = shutil.copytree(checkpoint, folder)
    path = base / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in weights:
        if ".attn" in name and (".to_q." in name or ".to_k." in name):
            weights[name] = weights[name] * factor
    save_file(weights, path)
    return BuildSpec(str(base), gpu="cpu", backend="torchscript", precision="bf16", no_lcm=True)


def test_an_engine_is_held_to_what_torch_reaches_in_its_precision(sdxl_checkpoint, tmp_path):
    bundle = build(sensitive(sdxl_checkpoint, tmp_path / "base", 1.4), tmp_path / "b")
    torch_db = {stage.contract.name: stage.torch_db for stage in bundle.manifest.stages}
    step = bundle.manifest.parity["step"]
    # The engine is torch's own, so it reaches what torch does.
    assert 20 < torch_db["step"] < 30 and step.db == pytest.approx(torch_db["step"], abs=0.5)
    assert step.floor == pytest.approx(torch_db["step"] - 3, abs=0.06)
    assert bundle.manifest.parity["decode"].floor == 30
    assert verify(bundle)["step"].floor == step.floor


def test_what_torch_itself_gets_wrong_is_refused(sdxl_checkpoint, tmp_path):
    with pytest.raises(ParityError, match=r"step \d+\.\d dB, needs 20 "):
        build(sensitive(sdxl_checkpoint, tmp_path / "base", 2.0), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("precision", "torch_db", "floor"),
    [
        ("bf16", None, 30), ("bf16", 45.0, 30), ("bf16", 33.0, 30), ("bf16", 28.6, 25.6), ("bf16", 12.0, 20),
        ("fp16", 60.0, 45), ("fp16", 46.0, 43), ("fp16", 12.0, 35),
    ],
)  # fmt: skip
def test_the_floor_is_three_decibels_below_torch_within_limits(precision, torch_db, floor):
    latent = (TensorSpec("latent", (1, 4, 8, 8), "float32", ""),)
    contract = StageContract("step", latent, latent)
    assert stage_floor(StageFile(contract, "step", Precision(precision), torch_db=torch_db)) == floor
