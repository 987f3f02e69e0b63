"""Items that test_gpu_suite.py runs, each in a process of its own: so this module imports next to nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from lcm_compile.errors import BackendError
from lcm_compile.system.child_process import call_in_child


def is_known(note, target, work):
    """What an item that describes the machine notes at the least."""
    note(target=target, versions={"torch": "2.0"})


def ends(note, target, work):
    note(figure=1, target=target, at=time.time_ns())


def raises(note, target, work):
    note(figure=2)
    raise ValueError("the first line\nand the second")


def crashes(note, target, work):
    note(figure=3)
    os.write(2, b"the library's last words")
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(note, target, work):
    note(figure=4, parts={"export step": {"seconds": 1}, "build step": None})
    note(below=subprocess.Popen(["sleep", "600"]).pid)
    time.sleep(600)


def lacks(note, target, work):
    import a_backend_that_is_nowhere  # noqa: F401


def reads(note, target, work, path):
    note(read=json.loads(Path(path).read_text()))


def compiles(graph):
    raise BackendError("can't compile") from ValueError("line 2 of what the compiler said")


def builds_apart(note, target, work):
    call_in_child(compiles, None)
