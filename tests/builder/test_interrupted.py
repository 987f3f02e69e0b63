"""Builds that end early: Ctrl-C, kill -9 at any moment, a full disk. What was there stays, whole."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lcm_compile.bundles import bundle as bundles
from lcm_compile.bundles.bundle import open_bundle, publishing, reporting_full_disk
from lcm_compile.errors import BackendError, LoraError
from lcm_compile.output import images


@pytest.fixture
def words(sdxl_checkpoint, bundle):
    """A build that would replace `bundle`."""
    return (
        *("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--backend", "torchscript"),
        *("--out", bundle),
    )


def started(words, until):
    """The command in a process of its own, which has just reported `until`; and what it said so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lcm_compile", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while until not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return process


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# While modules are loaded, while the step is exported, and while engines are built.
MOMENTS = ["miss: ", "export text", "export vae"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c(words, bundle, moment):
    before = open_bundle(bundle).digest
    process = started(words, moment)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted" in err and "Traceback" not in err
    assert open_bundle(bundle).digest == before
    assert hidden(bundle.parent) == []


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_kill(words, bundle, command, moment):
    before = open_bundle(bundle).digest
    process = started(words, moment)
    process.kill()
    process.communicate(timeout=60)
    assert open_bundle(bundle).digest == before
    assert hidden(bundle.parent) == [f".{bundle.name}.part"]
    code, out, err = command(*words)
    assert (code, out) == (0, f"{bundle}\n"), err
    assert open_bundle(bundle).manifest.backend == "torchscript"
    assert hidden(bundle.parent) == []


PUBLISH = """
import os, signal, sys
from pathlib import Path
from lcm_compile.bundles import bundle
moment, calls, real = int(sys.argv[1]), [], {"rename": Path.rename, "fsync": os.fsync}

def counted(name):
    def call(*arguments):
        calls.append(name)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*arguments)
    return call

Path.rename, os.fsync = counted("rename"), counted("fsync")
with bundle.publishing(Path(sys.argv[2])) as part:
    (part / "manifest.json").write_text("new")
print(len(calls))
"""


@pytest.mark.parametrize("old", [True, False], ids=["over an old one", "anew"])
def test_kill_at_every_moment_of_publishing(tmp_path, old):
    """Before each call that puts files on the disk or renames: the old bundle, the new one, or none."""
    seen, moment, last = [], 0, False
    while not last:
        moment += 1
        folder = tmp_path / str(moment) / "bundle"
        if old:
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("old")
        done = subprocess.run([sys.executable, "-c", PUBLISH, str(moment), str(folder)], capture_output=True)
        last = done.returncode == 0
        assert last or done.returncode == -signal.SIGKILL, done.stderr
        found = (folder / "manifest.json").read_text() if folder.exists() else "none"
        seen.append(found)
        with publishing(folder):
            pass  # the next build, which ends without a bundle: an old one that was put aside is back
        after = (folder / "manifest.json").read_text() if folder.exists() else "none"
        assert after == ("old" if old and found == "none" else found)
        assert hidden(folder.parent) == []
    # Two syncs (file, folder), two renames or one, and the run that nothing ended.
    assert seen == (["old", "old", "old", "none", "new"] if old else ["none", "none", "none", "new"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_between_the_renames_brings_the_old_one_back(tmp_path, monkeypatch, error):
    folder, rename = tmp_path / "bundle", Path.rename
    folder.mkdir()
    (folder / "manifest.json").write_text("old")

    def fails(path, target):
        if path.name.endswith(".part"):
            raise error
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(Path, "rename", fails)
        with publishing(folder) as part:
            (part / "manifest.json").write_text("new")
    assert (folder / "manifest.json").read_text() == "old"
    assert hidden(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A function that mounts a disk of so many KiB and returns its folder.

    It was larger when builds looked for room: something else has filled it since.
    """
    monkeypatch.setattr("lcm_compile.builder.build.check_space", lambda *_: None)
    mounted = []

    def mount(kib):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True
        )
        if made.returncode:
            pytest.skip("no disk can be mounted here")
        mounted.append(folder)
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root mounts disks")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("backend", "kib"), [("onnxruntime", 8), ("onnxruntime", 64), ("onnxruntime", 800), ("torchscript", 64)]
)
def test_a_full_disk(refused, sdxl_checkpoint, small_disk, backend, kib):
    """Full while tokenizers, graph or engine are written, whatever library meets it."""
    disk = small_disk(kib)
    words = ("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--backend", backend)
    refused(1, ["No space left on device", disk, "free some room"], *words, "--out", disk / "bundle")
    assert list(disk.iterdir()) == []


def test_a_full_disk_leaves_the_old_bundle(refused, command, sdxl_checkpoint, sdxl_bundle, small_disk):
    disk = small_disk(12 * 1024)
    old = shutil.copytree(sdxl_bundle, disk / "bundle")
    words = ("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--backend", "torchscript")
    refused(1, "No space left on device", *words, "--out", old)
    assert [p.name for p in disk.iterdir()] == ["bundle"]
    assert open_bundle(old).digest == open_bundle(sdxl_bundle).digest


def test_a_full_disk_leaves_the_old_picture(refused, sdxl_bundle, small_disk):
    picture = small_disk(8) / "star.png"
    picture.write_bytes(b"an old picture" * 300)
    refused(1, [picture, "No space left"], "run", "a star", "--engine", sdxl_bundle, "--out", picture)
    assert picture.read_bytes() == b"an old picture" * 300
    assert [p.name for p in picture.parent.iterdir()] == ["star.png"]


def test_a_full_home(refused, sdxl_checkpoint, small_disk, monkeypatch):
    home = small_disk(4)
    (home / "full").write_bytes(bytes(4096))
    monkeypatch.setenv("LCM_COMPILE_HOME", str(home))
    words = ("build", "--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm")
    refused(1, ["No space left", home], *words)


def test_whose_errors_a_full_disk_explains(tmp_path, monkeypatch):
    """A backend's and a library's, not those that have a cause of their own; and none while there is room."""
    for free, error, told in (
        (10, BackendError("protobuf failed"), True),
        (10, RuntimeError("unexpected pos"), True),
        (10, LoraError("NaN"), False),
        (1 << 40, BackendError("protobuf failed"), False),
        (1 << 40, OSError(errno.ENOSPC, "No space left on device"), True),
    ):
        monkeypatch.setattr(bundles.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(Exception) as caught, reporting_full_disk(tmp_path):
            raise error
        assert (getattr(caught.value, "filename", None) == str(tmp_path)) == told


def test_a_picture_is_whole_or_not_there(tmp_path, monkeypatch):
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    path = tmp_path / "a.png"
    images.save_picture(image, path, {})
    before = path.read_bytes()

    def cut_short(part, **_):
        Path(part).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(image, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        images.save_picture(image, path, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
