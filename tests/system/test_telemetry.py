"""Libraries that would report what they do: no file in the home folder, and no connection."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

DRAW = """
import os, sys
from lcm_compile import load
with load({bundle!r}) as pipeline:
    pipeline("a red star")
    for file in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink("/proc/self/fd/" + file)
        except OSError:
            continue
        if "socket:" in name or "onnxruntime" in name:
            print(name)
"""
# Each of these starts processes of its own, or uses other libraries that import ONNX Runtime.
BENCH = """
import sys
from lcm_compile.cli import main
sys.argv[1:] = ["bench", {bundle!r}, "--runs", "2"]
main()
"""
BUILD = """
from lcm_compile import BuildSpec, build
from lcm_compile.system.child_process import call_in_child
call_in_child(build, BuildSpec(base={base!r}, no_lcm=True, few_step="lcm", backend="onnxruntime"), {out!r})
"""


def run(script, home, cache, **settings):
    """What a new process prints, of a user with an empty home folder, and the files that it leaves there."""
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k and not k.startswith("XDG_")}
    environment |= {"HOME": str(home), "LCM_COMPILE_HOME": str(cache), **settings}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]


def test_drawing_reports_nothing(sdxl_bundle, tmp_path):
    assert run(DRAW.format(bundle=str(sdxl_bundle)), tmp_path / "home", tmp_path / "cache") == ("", [])


@pytest.mark.parametrize("script", [BENCH, BUILD], ids=["bench", "build in a child"])
def test_child_processes_report_nothing(sdxl_bundle, sdxl_checkpoint, tmp_path, script):
    words = {"bundle": str(sdxl_bundle), "base": str(sdxl_checkpoint), "out": str(tmp_path / "bundle")}
    _, files = run(script.format(**words), tmp_path / "home", tmp_path / "cache")
    assert not [name for name in files if "onnxruntime" in name or "Microsoft" in name]


def test_the_users_own_setting_wins(sdxl_bundle, tmp_path):
    script = "import os, lcm_compile; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(script, tmp_path / "home", tmp_path / "cache", ORT_DISABLE_TELEMETRY="0") == ("0\n", [])
