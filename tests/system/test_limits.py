"""Limits of containers, from trees of files as the kernel writes them, and from a group of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lcm_compile.system.limits import available_memory, cpu_quota

V1 = "{id} 25 0:30 {top} {point} rw,nosuid shared:9 - cgroup cgroup rw,{controller}\n"
V2 = "31 25 0:27 {top} {point} rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
OTHER = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n"
UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


def machine(root, cgroup, mountinfo, files, available=16 << 30):
    """A root folder with this /proc and these files."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(OTHER + mountinfo)
    (root / "proc/meminfo").write_text(f"MemTotal:       99999999 kB\nMemAvailable:   {available >> 10} kB\n")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("own", "above", "quota"),
    [
        ("150000 100000", "max 100000", 1.5),
        ("max 100000", "200000 100000", 2),
        ("400000 100000", "50000 100000", 0.5),
        ("max 100000", "max 100000", None),
    ],
)
def test_the_least_quota_of_version_2_counts(tmp_path, own, above, quota):
    files = {
        "sys/fs/cgroup/cgroup.controllers": "cpu memory",  # the root has no cpu.max
        "sys/fs/cgroup/pod.slice/cpu.max": above,
        "sys/fs/cgroup/pod.slice/one.scope/cpu.max": own,
        "sys/fs/cgroup/pod.slice/another.scope/cpu.max": "1000 100000",
    }
    mounts = V2.format(top="/", point="/sys/fs/cgroup")
    assert cpu_quota(machine(tmp_path, "0::/pod.slice/one.scope\n", mounts, files)) == quota


@pytest.mark.parametrize(("own", "above", "quota"), [(-1, -1, None), (250000, -1, 2.5), (-1, 100000, 1)])
def test_the_least_quota_of_version_1_counts(tmp_path, own, above, quota):
    folder = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{folder}/cpu.cfs_quota_us": -1, f"{folder}/cpu.cfs_period_us": 100000}
    files |= {f"{folder}/a/cpu.cfs_quota_us": above, f"{folder}/a/cpu.cfs_period_us": 100000}
    files |= {f"{folder}/a/b/cpu.cfs_quota_us": own, f"{folder}/a/b/cpu.cfs_period_us": 100000}
    cgroup = "12:memory:/\n4:cpu,cpuacct:/a/b\n1:name=systemd:/a/b\n0::/\n"
    mounts = V1.format(id=33, top="/", point=f"/{folder}", controller="cpu,cpuacct")
    mounts += V1.format(id=34, top="/", point="/sys/fs/cgroup/cpuset", controller="cpuset")
    mounts += V2.format(top="/", point="/sys/fs/cgroup/unified")
    assert cpu_quota(machine(tmp_path, cgroup, mounts, files)) == quota


@pytest.mark.parametrize(
    ("path", "top"),
    [
        ("/docker/abc", "/docker/abc"),  # the container's own part is mounted, under its full name
        ("/", "/"),  # a namespace of its own
        ("/../other", "/"),  # a process of another namespace
        ("/elsewhere", "/docker/abc"),
    ],
)
@pytest.mark.parametrize("point", ["/sys/fs/cgroup", "/mnt/c group"])
def test_a_container_sees_a_part_of_the_tree(tmp_path, path, top, point):
    files = {f"{point.lstrip('/')}/cpu.max": "300000 200000"}
    mounts = V2.format(top=top, point=point.replace(" ", "\\040"))
    assert cpu_quota(machine(tmp_path, f"0::{path}\n", mounts, files)) == 1.5


def test_without_groups_there_is_no_limit(tmp_path):
    assert cpu_quota(tmp_path) is None and available_memory(tmp_path) is None
    assert cpu_quota(machine(tmp_path, "0::/\n", "", {})) is None


def test_memory_of_version_2(tmp_path):
    mounts = V2.format(top="/", point="/sys/fs/cgroup")
    files = {
        "sys/fs/cgroup/a/memory.max": 4 << 30,
        "sys/fs/cgroup/a/memory.current": 3 << 30,
        "sys/fs/cgroup/a/memory.stat": f"anon {2 << 30}\nfile {1 << 30}\ninactive_file {1 << 29}\nslab 5",
        "sys/fs/cgroup/a/b/memory.max": "max",
        "sys/fs/cgroup/a/b/memory.current": 1 << 30,
        "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0",
    }
    root = machine(tmp_path, "0::/a/b\n", mounts, files)
    assert available_memory(root) == (1 << 30) + (1 << 29)
    (root / "proc/meminfo").write_text("MemAvailable: 1024 kB\n")
    assert available_memory(root) == 1 << 20


@pytest.mark.parametrize(("limit", "left"), [(UNLIMITED, 16 << 30), (2 << 30, 1 << 30), (1 << 29, 0)])
def test_memory_of_version_1(tmp_path, limit, left):
    folder = "sys/fs/cgroup/memory"
    files = {
        f"{folder}/memory.limit_in_bytes": UNLIMITED,
        f"{folder}/memory.usage_in_bytes": 8 << 30,
        f"{folder}/a/memory.limit_in_bytes": limit,
        f"{folder}/a/memory.usage_in_bytes": (1 << 30) + 4096,
        f"{folder}/a/memory.stat": "cache 1\ninactive_file 9\ntotal_inactive_file 4096",
    }
    mounts = V1.format(id=35, top="/", point=f"/{folder}", controller="memory")
    assert available_memory(machine(tmp_path, "4:memory:/a\n0::/\n", mounts, files)) == left


@pytest.fixture
def group():
    """A group of this machine for processors, in version 1 or 2."""
    for parent, name, text in (
        ("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", "50000"),
        ("/sys/fs/cgroup", "cpu.max", "50000 100000"),
    ):
        folder = Path(parent) / "lcm-compile-test"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / name).write_text(text)
            yield folder
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("no group can be made here")


def test_a_real_group_limits_the_threads(group):
    script = f"""
import os
open("{group}/cgroup.procs", "w").write(str(os.getpid()))
from lcm_compile.system.limits import cpu_quota
from lcm_compile.system.processor import threads
os.environ.pop("OMP_NUM_THREADS", None)
print(cpu_quota(), threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "0.5 1\n", done.stderr
