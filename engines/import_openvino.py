"""Imports OpenVINO without its telemetry, and names types as it does."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

# OpenVINO's names of the types that its kernels compute in.
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_importing = Lock()  # held while the telemetry is hidden: engines are loaded in several threads


def import_openvino() -> Any:
    """Imports openvino without its telemetry, which would report the import over the network."""
    name = "openvino_telemetry"
    with _importing:
        before = sys.modules.get(name)
        sys.modules[name] = None  # type: ignore[assignment]  # makes its import fail, as if not installed
        try:
            import openvino
        finally:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return openvino
