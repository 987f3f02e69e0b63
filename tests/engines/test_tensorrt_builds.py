"""What TensorRT for RTX's own builder is asked for, and what it builds, by its own log: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from lcm_compile.engines import tensorrt, tensorrt_rtx
from lcm_compile.export import export_stage
from lcm_compile.graphs import StageContract, TensorSpec
from lcm_compile.precisions import Precision
from lcm_compile.stages.half_precision import to_precision
from lcm_compile.stages.stage import Stage
from lcm_compile.targets import find_target

trt = pytest.importorskip("tensorrt_rtx")


class Small(torch.nn.Module):
    """A convolution, whose weights are random."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)).float()


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Exports that convolution in a precision."""

    def exported(precision):
        precision = Precision(precision)
        spec = TensorSpec("x", (1, 8, 16, 16), "float32", "input")
        contract = StageContract("small", (spec,), (TensorSpec("y", (1, 8, 16, 16), "float32", "output"),))
        stage = Stage(contract, to_precision(Small().eval().requires_grad_(False), precision.floats))
        return export_stage(stage, tensorrt.GRAPH_FORMAT, precision, tmp_path_factory.mktemp("graph"))

    return exported


@pytest.fixture
def configs(monkeypatch):
    """The configs of all builds."""
    made, create = [], trt.Builder.create_builder_config
    monkeypatch.setattr(
        trt.Builder, "create_builder_config", lambda self: made.append(create(self)) or made[-1]
    )
    return made


def test_an_engine_allocates_nothing_while_it_runs(graph, configs, tmp_path):
    """Otherwise its calls can't be captured."""
    assert tensorrt_rtx.build(graph("fp16"), find_target("a10"), tmp_path).stat().st_size > 0
    assert configs[0].get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert tensorrt_rtx.options(find_target("a10"))["user_allocation"]


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("fp16", True), ("bf16", True)])
def test_a_stage_in_fp32_does_not_round_to_tf32(graph, configs, tmp_path, precision, allowed):
    """The builder allows it unless it is told otherwise; 10 bits of mantissa are no fp32."""
    tensorrt_rtx.build(graph(precision), find_target("a10"), tmp_path)
    [config] = configs
    assert config.get_flag(trt.BuilderFlag.TF32) == allowed
