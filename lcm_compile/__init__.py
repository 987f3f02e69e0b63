"""Fuse an LCM-LoRA into Stable Diffusion, compile it into static engines, draw in four steps.

>>> from lcm_compile import BuildSpec, build, load
>>> bundle = build(BuildSpec(base="demo", gpu="cpu"))
>>> with load(bundle) as pipeline:
...     pipeline("a large red star on a striped pink background", seed=7)[0].save("star.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lcm_compile.version import __version__

if TYPE_CHECKING:
    from lcm_compile.builder.build import build
    from lcm_compile.pipeline.load import load
    from lcm_compile.pipeline.request import Request
    from lcm_compile.spec import BuildSpec, LoraSpec

__all__ = ["BuildSpec", "LoraSpec", "Request", "__version__", "build", "load"]

_HOMES = {
    "build": "builder.build",
    "load": "pipeline.load",
    "BuildSpec": "spec",
    "LoraSpec": "spec",
    "Request": "pipeline.request",
}


def __getattr__(name: str) -> Any:
    """Imports on use: `import lcm_compile` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
