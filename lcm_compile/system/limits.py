"""Reads what the control groups of this process allow: containers limit processors and memory by these."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


@dataclass(frozen=True)
class Group:
    """A folder of one control group, and the version of the kernel's interface to it, 1 or 2."""

    folder: Path
    version: int

    def read(self, name: str) -> list[str]:
        """Returns the words of a file, or an empty list if the group has no such file."""
        with contextlib.suppress(OSError):
            return (self.folder / name).read_text().split()
        return []


def cpu_quota(root: Path = ROOT) -> float | None:
    """Returns the processors that all threads may use together, such as 1.5, or None without a limit.

    It is the least quota of the process's own group and those above it.
    """
    quotas = []
    for group in groups("cpu", root):
        if group.version == 2:
            words = group.read("cpu.max")
        else:
            words = [*group.read("cpu.cfs_quota_us"), *group.read("cpu.cfs_period_us")]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def available_memory(root: Path = ROOT) -> int | None:
    """Returns the bytes that this process can still take, or None if the system does not say.

    It is the least of the machine's available memory and of what each group's limit leaves. Pages of files
    that a group has not used lately do not count as used, because the system takes them back.
    """
    left = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    for group in groups("memory", root):
        names = ("memory.max", "memory.current", "inactive_file")
        if group.version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used, statistics = group.read(names[0]), group.read(names[1]), group.read("memory.stat")
        if limit and used and limit != ["max"]:
            pairs = dict(zip(statistics[::2], statistics[1::2], strict=False))
            left.append(int(limit[0]) - int(used[0]) + int(pairs.get(names[2], 0)))
    return max(0, min(left)) if left else None


def groups(controller: str, root: Path = ROOT) -> Iterator[Group]:
    """Yields this process's group for a controller and then each group above it that is mounted here.

    `/proc/self/cgroup` names the group, and `/proc/self/mountinfo` where the tree of groups is, of which a
    container often sees a part only.
    """
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in own:
        _, names, path = line.split(":", 2)
        version = 1 if names else 2
        if version == 1 and controller not in names.split(","):
            continue
        for mount in mounts:
            fields, _, kind = mount.partition(" - ")
            top, point = (unescape(field) for field in fields.split()[3:5])
            filesystem, *_, options = kind.split()
            if filesystem != ("cgroup2" if version == 2 else "cgroup"):
                continue
            if version == 1 and controller not in options.split(","):
                continue
            mounted = root / point.lstrip("/")
            inside = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
            folder = mounted if ".." in inside.parts else mounted / inside
            yield Group(folder, version)
            while folder != mounted:
                folder = folder.parent
                yield Group(folder, version)


def unescape(field: str) -> str:
    """Returns a field of mountinfo, in which the kernel writes spaces and the like as octal numbers."""
    for character in " \t\n\\":
        field = field.replace(f"\\{ord(character):03o}", character)
    return field
