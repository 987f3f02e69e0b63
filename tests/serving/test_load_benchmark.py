"""The benchmark of load, small: what it draws, and the memory that it reads."""

from __future__ import annotations

import subprocess
import sys

from lcm_compile.benchmarks.measure.load_test import measure
from lcm_compile.system.stopwatch import own_memory, tree_memory

MIB = 1 << 20
# A process that holds 40 MiB, and its child, which holds 90.
HOLDERS = """
import subprocess, sys
held = b"x" * (40 << 20)
child = subprocess.Popen([sys.executable, "-c", "held = b'x' * (90 << 20); print(flush=True); input()"])
child.wait()
"""


def test_rounds_time_both_ways_and_read_the_memory(small):
    *_, samples = measure(small, rounds=2, minutes=0, count=4, clients=2)
    assert len(samples.pictures_per_second) == len(samples.memory_bytes) == 2
    assert all(one["bare"] > 0 and one["served"] > 0 for one in samples.pictures_per_second)
    assert len(samples.single_ms["bare"]) == len(samples.single_ms["served"])
    assert all(min(one.values()) > 10 * MIB for one in samples.memory_bytes)  # Python and its libraries
    assert set(samples.summary()) == {"throughput_share", "added_ms"}


def test_memory_is_a_processs_own_or_that_of_its_children_too():
    command = [sys.executable, "-c", HOLDERS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()  # of the child: it holds its memory now
        own, tree = own_memory(parent.pid), tree_memory(parent.pid)
        parent.stdin.close()
    assert 40 * MIB < own < 80 * MIB and own + 90 * MIB < tree < own + 130 * MIB
    assert own_memory(parent.pid) == tree_memory(parent.pid) == 0
