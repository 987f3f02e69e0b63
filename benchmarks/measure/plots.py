"""Sets up matplotlib in this project's style, for the charts of benchmarks and of the proof."""

from __future__ import annotations

from typing import Any

INK = "#333333"


def plots() -> Any:
    """Returns matplotlib.pyplot in this project's style. It draws to files and needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#999999",
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    return plt
