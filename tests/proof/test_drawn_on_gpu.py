"""The proof that torch draws on the GPU which the engines are for. A processor stands in for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lcm_compile import BuildSpec
from lcm_compile.builder.export import export_into
from lcm_compile.builder.plan import ENGINE, make_plan, plan_graphs
from lcm_compile.builder.schedule import scheduling
from lcm_compile.engines import find_backend
from lcm_compile.proof import cuda_rehearsal
from lcm_compile.proof.recording import read_calls
from lcm_compile.stages.contracts import make_contracts
from lcm_compile.system.stopwatch import silent


@pytest.fixture
def moves(monkeypatch):
    """Where modules were moved, with a GPU whose free memory is given to what this returns."""
    told, move = [], cuda_rehearsal.move

    def watched(module, device):
        told.append(device)
        move(module, "cpu")

    monkeypatch.setattr(cuda_rehearsal, "DEVICE", "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # which is put back
    monkeypatch.setattr(cuda_rehearsal, "move", watched)

    def free(size):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (size, size))
        return told

    return free


def small(base, gpu):
    return BuildSpec(str(base), gpu=gpu, no_lcm=True, few_step="lcm", precision="fp32", height=64, width=64)


def test_each_stage_is_recorded_there_and_brought_back(sdxl_checkpoint, moves, tmp_path):
    plan = plan_graphs(small(sdxl_checkpoint, "a10"), "torchscript")
    plan = replace(plan, checked=ENGINE)
    calls = []
    # Of every stage, and of the models before they were rewritten; then where nothing fits.
    for free, moved in ((1 << 40, 2 * (4 + 3)), (0, 0)):
        told = moves(free)
        told.clear()
        folder = tmp_path / str(free)
        folder.mkdir()
        with scheduling(False, 0, ()) as schedule:
            export_into(folder, plan, schedule, silent)
        assert len(told) == moved, told
        contracts = make_contracts(plan.checkpoint, plan.shape, plan.spec.rewrites)
        calls.append(read_calls(folder / "proof" / "step.npz", contracts["step"]))
    for (_, here), (_, there) in zip(*calls, strict=True):
        for name in here:
            np.testing.assert_array_equal(here[name], there[name])


def test_it_is_drawn_there_only_for_engines_that_run_there(sdxl_checkpoint, monkeypatch):
    rtx = find_backend("tensorrt-rtx")
    assert not make_plan(small(sdxl_checkpoint, "cpu")).export.draws_on_gpu
    monkeypatch.setattr(rtx, "cannot_build", lambda *_: None)
    for reason in (None, "no GPU here"):
        monkeypatch.setattr(rtx, "cannot_run", lambda _, reason=reason: reason)
        plan = make_plan(replace(small(sdxl_checkpoint, "a10"), backend="tensorrt-rtx"))
        assert plan.export.draws_on_gpu == (reason is None)
