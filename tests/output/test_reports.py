"""What commands print of a build."""

from __future__ import annotations

from lcm_compile.bundles.manifest import Parity
from lcm_compile.output.reports import parity_line


def test_what_was_compared_is_told_once():
    graph, twin = "graph, on a processor", "graph, on a processor, of a twin of 1×256×256"
    figures = {
        "encode": Parity(59.4, 45.0, f"{graph}; not yet run"),
        "step": Parity(60.1, 45.0, f"{twin}; not yet run"),
        "picture": Parity(61.0, 40.0, f"{twin}; not yet run"),
    }
    assert parity_line(figures) == (
        f"parity with torch ({twin}; not yet run): encode 59 dB, step 60 dB, picture 61 dB"
    )
