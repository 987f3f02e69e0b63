"""Fuses an LCM-LoRA into Stable Diffusion, compiles it into static engines, and draws in four steps.

>>> from lcm_compile import BuildSpec, build, load
>>> bundle = build(BuildSpec(base="demo", gpu="cpu"))
>>> with load(bundle) as pipeline:
...     pipeline("a large red star on a striped pink background", seed=7)[0].save("star.png")

In the repository, the folders `export`, `engines` and `benchmarks` are next to this one. They are imported as
`lcm_compile.export`, `lcm_compile.engines` and `lcm_compile.benchmarks`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lcm_compile.version import __version__

if TYPE_CHECKING:
    from lcm_compile.builder.build import build
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request
    from lcm_compile.spec import BuildSpec, LoraSpec

__all__ = ["BuildSpec", "LoraSpec", "Request", "__version__", "build", "load"]

# Libraries read these when they are imported, in child processes too. By default ONNX Runtime writes a device
# id to the home folder and sends reports. What the user has set stays.
for _setting in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_setting] = os.environ.get(_setting) or "1"

# The module of each name, which is imported when the name is first used.
_HOMES = {
    "build": "builder.build",
    "load": "pipeline.load",
    "BuildSpec": "spec",
    "LoraSpec": "spec",
    "Request": "pipeline.request",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that `import lcm_compile` itself is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
