"""How far bf16 pictures are from fp32's."""

from __future__ import annotations

from lcm_compile.benchmarks.quality.rounding import row


def test_the_mean_of_square_errors_is_ruled_by_the_worst_picture():
    """One of 40 dB and one of 20 dB have the mean square error 0.00505 of the peak's square: 22.97 dB."""
    assert row("ours", [40.0, 20.0]) == ("ours", "30.0", "21.0", "20.0", "23.0")
