"""Requests that can't be met: each a plain message that names the thing and the next command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lcm_compile import cli, load
from lcm_compile.output.picture_settings import read_origin


@pytest.fixture
def build(sdxl_checkpoint):
    """The words of a build of the tiny SDXL, for the CPU unless a target is given; what comes last wins."""

    def words_of(*words):
        target = () if "--gpu" in words else ("--gpu", "cpu")
        return "build", "--base", sdxl_checkpoint, *target, "--no-lcm", *words

    return words_of


@pytest.mark.parametrize(
    ("option", "name", "told"),
    [
        ("--base", "sdlx", "Did you mean 'sdxl'?"),
        ("--base", "no/such/folder", ["'no/such/folder'", "demo, sdxl"]),
        ("--base", "~nobody/model", "'~nobody/model'"),
        ("--gpu", "a10q", ["Did you mean 'a10'?", "lcm-compile targets"]),
        ("--gpu", "", "Known: cpu, t4"),
        ("--gpu", "mac", ["Apple's GPUs", "--gpu cpu"]),
        ("--gpu", "MPS", ["Apple's GPUs", "--gpu cpu"]),
        ("--backend", "tensorrt-rxt", ["Did you mean 'tensorrt-rtx'?", "lcm-compile doctor"]),
        ("--precision", "fp61", "Did you mean 'fp16'?"),
        ("--height", 0, "height must be a positive multiple of 8, not 0"),
        ("--height", -64, "not -64"),
        ("--width", 100, "width must be a positive multiple of 8, not 100"),
        ("--width", "wide", "'wide' is not a valid integer"),
        ("--batch", 0, "batch must be 1 or more, not 0"),
        ("--lora", "x.safetensors:nan", ["nan", "x.safetensors", "PATH:0.8"]),
        ("--lora", "x.safetensors:-inf", ["-inf", "x.safetensors"]),
        ("--lora", "x.safetensors:strong", "'strong' in 'x.safetensors:strong' is not a number"),
        ("--lora", "x.safetensors:", "is not a number"),
        ("--lora", ":0.5", "no path"),
        ("--lora", "", "no path"),
        ("--lcm-lora", "x.safetensors:1", "--no-lcm"),
    ],
)
def test_build_options(refused, build, option, name, told):
    refused(2, told, *build(option, name))


@pytest.mark.parametrize(("gpu", "told"), [("h100", "lcm-compile doctor"), ("cpu", "torchscript")])
def test_nothing_builds_that_here(refused, build, gpu, told):
    """auto tells every candidate's reason."""
    shutil.which("nvidia-smi") and pytest.skip("there may be a GPU here")
    refused(1, [gpu, told], *build("--gpu", gpu, "--backend", "onnxruntime", "--precision", "bf16"))


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--steps", 0, "steps must be from 1 to 50, not 0"),
        ("--steps", 51, "steps must be from 1 to 50, not 51"),
        ("--seed", -1, "seed must be from 0"),
        ("--seed", 2**64, "seed must be from 0"),
        ("--seed", "seven", "'seven' is not a valid integer"),
        ("--guidance-scale", "nan", "guidance scale must be from 0 to 1000000, not nan"),
        ("--guidance-scale", "inf", "not inf"),
        ("--guidance-scale", -1, "not -1"),
        ("--num-images", 0, "number of images must be from 1 to 10000, not 0"),
        ("--num-images", 10**12, "not 1000000000000"),
        ("--out", "picture.gif", [".png", "picture.gif"]),
        ("--out", "/dev/null/picture.png", "/dev/null"),
        ("--engine", "no/such/bundle", ["there is no bundle at no/such/bundle", "lcm-compile build"]),
        ("--base", "demo", "--base and --gpu go together"),
    ],
)
def test_run_options(refused, sdxl_bundle, tmp_path, monkeypatch, option, value, told):
    monkeypatch.chdir(tmp_path)
    engine = () if option in ("--base", "--engine") else ("--engine", sdxl_bundle)
    refused(1 if option == "--engine" else 2, told, "run", "a star", *engine, option, value)
    assert list(tmp_path.iterdir()) == []


def test_several_pictures_need_a_folder(refused, sdxl_bundle, tmp_path):
    words = ("run", "a star", "--engine", sdxl_bundle, "--num-images", 2, "--out")
    refused(2, "need a folder", *words, tmp_path / "star.png")
    (tmp_path / "file").write_text("mine")
    refused(2, "need a folder", *words, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", ["run", "verify", "inspect"])
def test_a_folder_that_is_no_bundle(refused, tmp_path, verb):
    words = ("run", "a star", "--engine") if verb == "run" else (verb,)
    refused(1, "manifest.json", *words, tmp_path)


@pytest.mark.parametrize("words", [("bulid",), ("build",), ("run", "a", "b"), ("run", "--stepz", "4")])
def test_usage(refused, words):
    refused(2, "", *words)


def test_no_bundle_of_that_base_and_target(refused, sdxl_checkpoint):
    refused(2, "Did you mean 't4'?", "run", "--base", sdxl_checkpoint, "--gpu", "t5")
    words = ["--base", sdxl_checkpoint, "--gpu", "t4"]
    refused(1, f"lcm-compile build {' '.join(map(str, words))}", "run", *words)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (PermissionError(13, "Permission denied", "x/y"), "Permission denied: x/y"),
        (ValueError("odd"), "internal error: ValueError: odd"),
    ],
)
def test_whatever_else_goes_wrong(command, monkeypatch, error, told):
    """No traceback, unless it is asked for."""

    def fails(**_):
        raise error

    monkeypatch.setattr(cli.cli, "main", fails)
    code, out, err = command("run")
    assert (code, out) == (1, "") and told in err and "\n  try: " in err and "Traceback" not in err
    monkeypatch.setenv("LCM_COMPILE_DEBUG", "1")
    assert "Traceback" in command("run")[2]


@pytest.mark.parametrize("place", ["file", "/dev/null/bundle", "dir", "web", "mine", "mount", "long"])
def test_out_is_never_written_over(refused, build, bundle, tmp_path, place):
    """A file, a place under a file, folders with other things in them (one a web app's), a disk's root."""
    out = {
        "file": tmp_path / "file",
        "dir": tmp_path / "dir",
        "web": tmp_path / "web",
        "mine": bundle,
        "long": tmp_path / ("x" * 300),
        "mount": Path("/dev/shm" if Path("/dev/shm").is_mount() else "/"),
    }.get(place, tmp_path / place)
    (tmp_path / "file").write_text("mine")
    for name in ("dir/deep/notes.txt", "web/manifest.json", "bundle/engines/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"name": "mine"}')
    before = snapshot(tmp_path)
    err = refused(1 if place == "long" else 2, out.name[:20], *build("--out", out, "--width", 32))
    assert place == "long" or "--out" in err
    assert snapshot(tmp_path) == before


def snapshot(folder):
    """Every path below `folder` with what it holds."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_out_that_may_not_be_written(refused, build, tmp_path):
    out = tmp_path / "locked" / "bundle"
    out.parent.mkdir(mode=0o500)
    if os.access(out.parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    refused(2, [out, "can't be written"], *build("--out", out))


def test_out_through_a_link(command, build, tmp_path):
    """The bundle goes where the link points, again and again, and the link stays."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    words = build("--backend", "torchscript", "--out", tmp_path / "link")
    assert command(*words)[0] == command(*words, "--width", 32)[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("home", ["/dev/null/home", "file"])
def test_a_home_that_is_no_folder(refused, build, tmp_path, monkeypatch, home):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("LCM_COMPILE_HOME", str(tmp_path / home))
    refused(1, ["LCM_COMPILE_HOME", Path(home).name], *build())
    assert (tmp_path / "file").read_text() == "mine"


def test_broken_notes_in_the_store_only_cost_time(command, build, own_home):
    for text in ("", "{", "5", "[5]", '{"a": 5}', "[" * 100_000):
        for name in ("recent.json", "digests.json"):
            (own_home / name).write_text(text)
        assert command(*build("--dry-run"))[0] == 0
        code, _, err = command("run")
        assert code == 1 and "there is no bundle yet" in err


def test_a_base_of_no_known_family_names_both_ways_out(refused, sdxl_checkpoint):
    refused(
        1, [sdxl_checkpoint, "--lcm-lora", "--no-lcm"], "build", "--base", sdxl_checkpoint, "--gpu", "cpu"
    )


PROMPTS = {
    "empty": "",
    "spaces": "   ",
    "newlines": "a\nred\r\n\tstar",
    "emoji": "🦀👩‍👩‍👧‍👦🇫🇷 ★",
    "right to left": "نجمة حمراء \u202e rats",
    "combining": "e\u0301\u0301\u0301 Zalgo\u0489",
    "control": "a \x01\x1b[31m star\x7f",
    "like a path": "../../etc/passwd",
    "special tokens": "<|endoftext|> <|startoftext|>",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_odd_prompts_draw(command, sdxl_bundle, tmp_path, monkeypatch, prompt):
    monkeypatch.chdir(tmp_path)
    words = ("run", prompt, "--engine", sdxl_bundle, "--seed", 0, "--steps", 1, "--json")
    code, out, err = command(*words)
    assert (code, err) == (0, "")
    path = Path(json.loads(out)["images"][0]["path"])
    assert path.parent == Path() and [p.name for p in tmp_path.iterdir()] == [path.name]
    picture = Image.open(path)
    assert read_origin(path).request.prompt == prompt
    command(*words)
    assert Image.open(path).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("star " * 10_000, "star star star"),
        ("🦀" * 100, "🦀"),
        ("red " * 74 + "star on white", "'on white'"),
        ("x" * 5_000, "xxx"),
    ],
)
def test_long_prompts_draw_and_show_what_was_cut(command, sdxl_bundle, tmp_path, prompt, shown):
    words = ("run", prompt, "--engine", sdxl_bundle, "--steps", 1, "--out", tmp_path / "a.png", "--quiet")
    code, _, err = command(*words)
    assert code == 0 and (tmp_path / "a.png").is_file()
    assert "77 tokens" in err and shown in err and len(err) < 400


def test_a_prompt_with_a_nul(sdxl_bundle):
    """No command line can hold one; Python can."""
    with load(sdxl_bundle) as pipeline:
        assert pipeline("a\0star", seed=1, steps=1)[0].size == (64, 64)


def test_bytes_that_are_no_text(sdxl_bundle, tmp_path):
    """Paths as the shell hands them over; what comes out names the very same file. A prompt is text."""
    out = os.fsencode(tmp_path) + b"/b\xff.png"
    words = [sys.executable, "-m", "lcm_compile", "run", "a star", "--engine", sdxl_bundle]
    done = subprocess.run([*words, "--seed", "1", "--out", out], capture_output=True)
    assert (done.returncode, done.stdout) == (0, out + b"\n"), done.stderr
    done = subprocess.run([*words, "--seed", "1", "--out", out, "--json"], capture_output=True)
    assert os.fsencode(json.loads(done.stdout)["images"][0]["path"]) == out
    for option in ([], ["a star", "--negative-prompt"]):
        latin = "größe".encode("latin-1")
        done = subprocess.run([*words[:4], "--engine", sdxl_bundle, *option, latin], capture_output=True)
        assert (done.returncode, done.stdout) == (2, b"") and b"is not Unicode text" in done.stderr
    assert Path(os.fsdecode(out)).stat().st_size > 1000


def test_out_that_no_engine_could_be_read_from(build, tmp_path):
    """The libraries that read engines take text for a path: said before the build, not after it."""
    out = os.fsencode(tmp_path) + b"/b\xff"
    words = [sys.executable, "-m", "lcm_compile", *build("--out", out)]
    done = subprocess.run(words, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"") and b"not UTF-8" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []
