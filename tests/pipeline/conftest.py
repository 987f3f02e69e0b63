"""The bundles that several tests of prompts share."""

from __future__ import annotations

import pytest
from diffusers_reference import reference

from lcm_compile import BuildSpec, load


@pytest.fixture(scope="session", params=[("sdxl", "onnxruntime", 154), ("sd15", "torchscript", 231)], ids=str)
def long(request, sdxl_checkpoint, sd15_checkpoint, shared_bundle):
    """A bundle with room for several chunks, diffusers' pipeline, and the number of chunks."""
    family, backend, tokens = request.param
    base = {"sdxl": sdxl_checkpoint, "sd15": sd15_checkpoint}[family]
    spec = BuildSpec(
        str(base), no_lcm=True, few_step="lcm", backend=backend, prompt_tokens=tokens, height=64, width=64
    )
    bundle = shared_bundle(spec, f"long-{family}")
    with load(bundle) as ours:
        ours.folder = bundle.folder
        yield ours, reference(base), tokens // 77
