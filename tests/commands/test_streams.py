"""Standard streams that are closed, full or cut short, and Ctrl-C: what was saved is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lcm_compile.builder import build as build_module
from lcm_compile.output.picture_settings import read_origin

LCM = f"{sys.executable} -m lcm_compile"


def shell(line, unbuffered=""):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("words", ["bundles", "targets --json", "--help", "inspect B"])
def test_closed_and_full_streams(sdxl_bundle, words):
    line = f"{LCM} {words}".replace("B", str(sdxl_bundle))
    done = shell(f"{line} >&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert shell(f"{line} >&- 2>&- <&-").returncode == 0
    for unbuffered in ("", "1"):
        done = shell(f"{line} > /dev/full", unbuffered)
        error, hint = done.stderr.splitlines()
        assert (done.returncode, error) == (1, "error: No space left on device") and "stdout" in hint
    assert shell(f"{line} | true").stderr == ""


@pytest.mark.parametrize("coding", ["ascii", "latin-1"])
def test_a_path_is_printed_whatever_stdout_can_encode(sdxl_bundle, tmp_path, coding):
    words = ["-m", "lcm_compile", "run", "赤い star", "--engine", sdxl_bundle, "--steps", "1", "--seed", "1"]
    env = {**os.environ, "PYTHONIOENCODING": coding}
    done = subprocess.run([sys.executable, *words], capture_output=True, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout.decode()) == (0, "赤い-star-1.png\n"), done.stderr
    assert (tmp_path / "赤い-star-1.png").is_file()


def test_an_error_that_cannot_be_printed_keeps_its_exit_code():
    assert shell(f"{LCM} run --stepz 4 2> /dev/full").returncode == 2
    assert shell(f"{LCM} inspect no/such/bundle 2> /dev/full").returncode == 1


def test_a_picture_is_saved_whatever_is_printed(sdxl_bundle, tmp_path):
    """With stdout closed, nothing that is printed may land in the picture."""
    line = f"{LCM} run 'a star' --engine {sdxl_bundle} --steps 1 --seed 1"
    for name, streams, code in [
        ("a", ">&-", 0),
        ("b", ">&- 2>&- <&-", 0),
        ("c", "> /dev/full", 1),
        ("d", "2> /dev/full", 0),
        ("e", "--json > /dev/full", 1),
    ]:
        done = shell(f"{line} --out {tmp_path / name}.png {streams}")
        assert done.returncode == code and "Traceback" not in done.stderr
        assert read_origin(tmp_path / f"{name}.png").request.seed == 1
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture).shape == (64, 64, 3)


def test_stdin_that_is_closed_holds_no_prompt(sdxl_bundle, tmp_path):
    done = shell(f"{LCM} run --stdin --engine {sdxl_bundle} --out {tmp_path} <&-")
    assert done.returncode == 0 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_prompts_in_another_encoding(sdxl_bundle, tmp_path):
    """What came before is drawn, and what can't be read is not."""
    done = subprocess.run(
        [*LCM.split(), "run", "--stdin", "--engine", sdxl_bundle, "--steps", "1", "--out", tmp_path],
        input="a star\ngröße\na ring\n".encode("latin-1"),
        capture_output=True,
    )
    assert done.returncode == 1 and b"stdin is not UTF-8 text: line 2" in done.stderr
    assert b"1 picture was saved" in done.stderr
    assert [path.name.startswith("a-star") for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize("way", ["stdin", "several"])
def test_ctrl_c_tells_what_was_saved(sdxl_bundle, tmp_path, way):
    words = [*LCM.split(), "run", "--engine", sdxl_bundle, "--steps", "1", "--seed", "3", "--out", tmp_path]
    if way == "several":
        process = subprocess.Popen(
            [*words, "a star", "--num-images", "5000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        while len(list(tmp_path.glob("*.png"))) < 3:  # each is there as soon as it is drawn
            assert process.poll() is None
    else:
        process = subprocess.Popen(
            [*words, "--stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdin.write(b"a star\n" * 5000)
        process.stdin.flush()
        for _ in range(3):
            process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    saved = sorted(tmp_path.iterdir())
    assert process.returncode == 130 and b"Traceback" not in err
    assert f"interrupted; {len(saved)} pictures were saved, the last as {tmp_path}".encode() in err
    for path in saved:
        with Image.open(path) as picture:
            picture.load()


def test_an_error_after_some_pictures_tells_what_was_saved(command, sdxl_bundle, tmp_path):
    (tmp_path / "001.png").mkdir()
    code, out, err = command(
        *("run", "a star", "--engine", sdxl_bundle, "--num-images", 3, "--steps", 1, "--out", tmp_path)
    )
    assert (code, out) == (1, "") and "1 picture was saved" in err and "001.png" in err, err


def test_json_of_a_picture_of_one_colour(command, sdxl_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("lcm_compile.pipeline.drawing.is_of_one_colour", lambda picture: True)
    words = ("run", "a black wall", "--engine", sdxl_bundle, "--steps", 1, "--out", tmp_path / "a.png")
    code, out, err = command(*words, "--json", "--quiet")
    assert code == 0 and "of one colour" in err and json.loads(out, parse_constant=pytest.fail)["images"]


def test_ctrl_c_in_a_second_build_tells_the_first_bundle(command, sdxl_checkpoint, tmp_path, monkeypatch):
    first, real = [], build_module.build_group

    def interrupted(*words):
        if first:
            raise KeyboardInterrupt
        first.append(real(*words))
        return first[0]

    monkeypatch.setattr(build_module, "build_group", interrupted)
    monkeypatch.setattr(
        build_module, "group_by_graphs", lambda plans: [[plan] for plan in plans if not plan.hit]
    )
    pytest.importorskip("tensorrt_rtx")
    words = (
        "build",
        "--base",
        sdxl_checkpoint,
        "--no-lcm",
        "--gpu",
        "cpu",
        "--gpu",
        "a10",
        "--out",
        tmp_path,
    )
    code, out, err = command(*words)
    assert (code, out) == (130, "") and f"these bundles are complete: {tmp_path / 'cpu'}\n" in err
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["cpu"]


def test_ctrl_c_within_an_import_leaves_no_lock_behind():
    """The signal comes while the main thread waits for the lock of imports, as while engines load."""
    script = """
import _imp, os, signal, threading, time
from lcm_compile import cli

def import_slowly():
    _imp.acquire_lock()
    holds.set()
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.3)
    _imp.release_lock()

signal.signal(signal.SIGINT, cli.interrupt)
holds = threading.Event()
threading.Thread(target=import_slowly).start()
holds.wait()
try:
    import wave
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted", _imp.lock_held())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "interrupted False\n"
