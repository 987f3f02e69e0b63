"""The store: what is listed, what is shared, and what is removed while others build and draw."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcm_compile import load
from lcm_compile.bundles import store
from lcm_compile.bundles.bundle import open_bundle, publishing
from lcm_compile.bundles.inventory import parse_size, prune
from lcm_compile.bundles.manifest import MANIFEST
from lcm_compile.errors import BundleError


@pytest.fixture
def shelf(own_home, tmp_path, monkeypatch):
    """The folder of a store's bundles, empty."""
    monkeypatch.chdir(tmp_path)
    folder = own_home / "bundles"
    folder.mkdir()
    return folder


def place(bundle, folder, day=None):
    """A copy of a bundle, built on a day of 2026 long past."""
    shutil.copytree(bundle, folder)
    if day is not None:
        data = json.loads((folder / MANIFEST).read_text())
        data["created"] = f"2026-01-{day:02d}T12:00:00+00:00"
        (folder / MANIFEST).write_text(json.dumps(data))
    return folder


def size_of(*folders):
    """As `du` counts: an inode once."""
    status = [path.stat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({s.st_ino: s.st_size for s in status}.values())


def listed(command):
    code, out, _ = command("bundles", "--json")
    assert code == 0
    return json.loads(out)


def names(data):
    return [Path(one["bundle"]).name for one in data["bundles"]]


def test_the_list(command, sdxl_bundle, shelf, tmp_path):
    assert command("bundles") == (0, "there is no bundle yet\n", "")
    place(sdxl_bundle, shelf / "b", day=2)
    place(sdxl_bundle, shelf / "a", day=1)
    store.remember(place(sdxl_bundle, tmp_path / "out", day=3))
    data = listed(command)
    assert names(data) == ["out", "b", "a"]
    assert [one["kind"] for one in data["bundles"]] == ["elsewhere", "store", "store"]
    manifest = open_bundle(sdxl_bundle).manifest
    for one in data["bundles"]:
        told = (one["base"], one["target"], one["backend"])
        assert told == (manifest.spec.base, "cpu", "onnxruntime")
        assert one["bytes"] == size_of(Path(one["bundle"]))
    assert data["bytes"] == size_of(shelf, tmp_path / "out")
    code, out, _ = command("bundles", "list")
    assert code == 0 and f"{tmp_path / 'out'} (elsewhere)" in out and "2026-01-02" in out
    assert json.loads(command("bundles", "list", "--json")[1]) == data


def test_show(command, refused, sdxl_bundle, shelf):
    place(sdxl_bundle, shelf / "a", day=1)
    by_name, by_path = (json.loads(command("bundles", "show", n, "--json")[1]) for n in ("a", shelf / "a"))
    assert by_name == by_path and by_name["digest"] == open_bundle(shelf / "a").digest
    assert by_name["used"].startswith("2026-01-01") and by_name["kind"] == "store"
    assert "onnxruntime" in command("bundles", "show", "a")[1]
    refused(1, "there is no bundle b", "bundles", "show", "b")


@pytest.mark.parametrize("way", ["run", "bare run", "verify", "load"])
def test_what_counts_as_a_use(command, sdxl_bundle, shelf, way):
    """A hit too: tests/test_keys.py and test_cli.py hold that `run` finds what was hit last."""
    for day, name in enumerate("abc", 1):
        place(sdxl_bundle, shelf / name, day)
    assert names(listed(command)) == ["c", "b", "a"]
    before = time.time()
    if way == "bare run":
        store.remember(shelf / "a")
    words = {"run": ("run", "--engine", shelf / "a"), "verify": ("verify", shelf / "a"), "bare run": ("run",)}
    if way == "load":
        load(shelf / "a").close()
    else:
        assert command(*words[way])[0] == 0
    assert names(listed(command)) == ["a", "c", "b"]
    assert before <= store.last_uses()[shelf / "a"] <= time.time()
    assert store.recent() == [shelf / "a"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("7", 7),
        ("7B", 7),
        ("2k", 2000),
        ("500MB", 500_000_000),
        ("50GB", 50 * 10**9),
        ("50 gb", 50 * 10**9),
        ("1.5GiB", 3 << 29),
        ("2Ti", 2 << 40),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "50XB", "nan", "1,5GB", "5 5"])
def test_no_sizes(refused, shelf, text):
    refused(2, "is no size", "bundles", "prune", f"--keep-under={text}")


def test_prune_removes_what_was_not_used_for_longest(command, sdxl_bundle, shelf, tmp_path):
    for day, name in enumerate("abcd", 1):
        place(sdxl_bundle, shelf / name, day)
    outside = place(sdxl_bundle, tmp_path / "out", day=1)
    store.remember(outside)
    store.remember(shelf / "a")
    limit = size_of(shelf / "a", shelf / "d")
    words = ("bundles", "prune", "--keep-under", limit)
    told = command(*words, "--dry-run")
    assert told[:2] == (0, f"{shelf / 'b'}\n{shelf / 'c'}\n") and "2 would be removed" in told[2]
    assert json.loads(command(*words, "--dry-run", "--json")[1])["bytes"] == limit
    assert sorted(p.name for p in shelf.iterdir()) == ["a", "b", "c", "d"]
    assert command(*words)[:2] == told[:2]
    assert sorted(p.name for p in shelf.iterdir()) == ["a", "d"]
    assert command(*words)[:2] == (0, "")
    assert names(listed(command)) == ["a", "out", "d"]
    command("bundles", "prune", "--keep-under", "0")
    assert list(shelf.iterdir()) == [] and open_bundle(outside)


def test_rm(command, refused, sdxl_bundle, shelf, tmp_path):
    for name in "ab":
        place(sdxl_bundle, shelf / name)
    outside = place(sdxl_bundle, tmp_path / "out")
    (tmp_path / "link").symlink_to(outside)
    refused(1, "there is no bundle c", "bundles", "rm", "a", "c")
    assert open_bundle(shelf / "a")  # all are found before one is removed
    code, out, err = command("bundles", "rm", "a", shelf / "b", "link")
    assert (code, out) == (0, "") and err.count("removed") == 3
    assert list(shelf.iterdir()) == [] and not outside.exists()


def test_rm_loses_nothing_that_is_no_bundles(refused, sdxl_bundle, shelf):
    folder = place(sdxl_bundle, shelf / "a")
    (folder / "engines" / "notes.txt").write_text("mine")
    told = [folder, "engines/notes.txt", "rm -r"]
    refused(1, told, "bundles", "rm", "a")
    assert len(prune(0).reasons) == 1
    (folder / "engines" / "notes.txt").unlink()
    (folder / MANIFEST).write_text("{")
    refused(1, [folder, MANIFEST, "rm -r"], "bundles", "rm", "a")
    (folder / MANIFEST).unlink()
    refused(1, "no bundle", "bundles", "rm", folder)
    assert (folder / "engines" / "step.onnx").is_file()


def test_what_a_killed_build_left(command, sdxl_bundle, shelf):
    place(sdxl_bundle, shelf / ".a.part")
    place(sdxl_bundle, shelf / ".b.old")  # killed between two renames: b is there no more
    (shelf / ".a.part" / MANIFEST).unlink()
    assert {one["kind"] for one in listed(command)["bundles"]} == {"unfinished"}
    assert command("bundles", "prune", "--keep-under", "1GB")[0] == 0
    assert [p.name for p in shelf.iterdir()] == ["b"] and open_bundle(shelf / "b")


def publish(bundle, folder):
    with publishing(folder) as part:
        shutil.copytree(bundle, part, dirs_exist_ok=True)


def test_equal_files_are_stored_once(command, sdxl_bundle, shelf, tmp_path):
    publish(sdxl_bundle, shelf / "a")
    publish(sdxl_bundle, shelf / "b")
    publish(sdxl_bundle, tmp_path / "out")
    files = open_bundle(shelf / "b").manifest.files
    assert all((shelf / "a" / name).samefile(shelf / "b" / name) for name in files)
    assert not any((shelf / "a" / name).samefile(tmp_path / "out" / name) for name in files)
    data = listed(command)
    assert data["bytes"] == size_of(shelf) < 1.2 * size_of(shelf / "a")
    assert "saved by sharing" in command("bundles")[1]
    # One can go without the other, and half the listed sizes is room enough for both.
    assert prune(data["bytes"]).removed == ()
    command("bundles", "rm", "a")
    assert open_bundle(shelf / "b")
    assert sorted(p.name for p in (shelf / "b" / "engines").iterdir()) == sorted(
        p.name for p in (sdxl_bundle / "engines").iterdir()
    )


def test_a_file_that_was_changed_is_not_shared(sdxl_bundle, shelf):
    publish(sdxl_bundle, shelf / "a")
    path = shelf / "a" / "engines" / "step.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (shelf / "a" / "tokenizers" / "tokenizer.json").unlink()
    publish(sdxl_bundle, shelf / "b")
    assert open_bundle(shelf / "b")
    assert (shelf / "a/engines/decode.onnx").samefile(shelf / "b/engines/decode.onnx")


def test_where_no_links_are_made_there_are_two_files(sdxl_bundle, shelf, monkeypatch):
    def refuse(*_):
        raise OSError

    publish(sdxl_bundle, shelf / "a")
    monkeypatch.setattr(os, "link", refuse)
    publish(sdxl_bundle, shelf / "b")
    assert size_of(shelf) == size_of(shelf / "a") + size_of(shelf / "b")
    assert open_bundle(shelf / "b")


def python(code, *words):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


DRAW = """
import sys
from lcm_compile import load
with load(sys.argv[1]) as pipeline:
    print("loaded", flush=True)
    sys.stdin.readline()
    pipeline("a star", seed=1)[0].save(sys.argv[2])
"""


def test_nothing_is_removed_while_a_process_draws_with_it(command, refused, sdxl_bundle, shelf, tmp_path):
    for day, name in enumerate("ab", 1):
        place(sdxl_bundle, shelf / name, day)
    process = python(DRAW, shelf / "a", tmp_path / "star.png")
    assert process.stdout.readline() == "loaded\n"
    store.remember(shelf / "b")  # a is the next to go
    for more in (("--dry-run",), ()):
        code, out, err = command("bundles", "prune", "--keep-under", "0", *more)
        assert (code, out) == (0, f"{shelf / 'b'}\n") and f"{shelf / 'a'} is kept" in err
    refused(1, [shelf / "a", "a process draws with it"], "bundles", "rm", "a")
    process.communicate("\n", timeout=60)
    assert process.returncode == 0 and (tmp_path / "star.png").is_file()
    assert command("bundles", "rm", "a")[0] == 0


LOAD = """
import sys, time
from pathlib import Path
from lcm_compile import load
from lcm_compile.errors import BundleError
folder, loaded = Path(sys.argv[1]), 0
while True:
    try:
        with load(folder) as pipeline:
            pipeline("a star", seed=1, steps=1)
        loaded += 1
        print("loaded", flush=True)
    except BundleError as error:
        print(error, flush=True)
        assert not loaded or not folder.exists(), error
        break
"""


def test_a_run_that_is_loading_wins_or_is_told(sdxl_bundle, shelf):
    """One process loads the bundle again and again while this one tries to remove it at any moment."""
    kept = 0
    for _ in range(3):
        place(sdxl_bundle, shelf / "a")
        process = python(LOAD, shelf / "a")
        assert process.stdout.readline() == "loaded\n"
        while not (pruned := prune(0)).removed:
            kept += len(pruned.reasons)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err  # nothing but a BundleError ended it
        assert "no bundle at" in out or "just been removed" in out or "is not a bundle" in out, out
        assert list(shelf.iterdir()) == []
    assert kept


def test_load_of_a_bundle_that_was_removed_since_it_was_opened(sdxl_bundle, shelf):
    bundle = open_bundle(place(sdxl_bundle, shelf / "a"))
    prune(0)
    with pytest.raises(BundleError, match="removed"):
        load(bundle)


def test_builds_of_different_targets_at_once_and_a_prune(command, sd15_checkpoint, shelf):
    """One builds for two equal GPUs, once; the other waits for one of them and builds its own for a third."""
    pytest.importorskip("tensorrt_rtx")
    words = ["build", "--base", str(sd15_checkpoint), "--no-lcm", "--json", "--gpu"]
    start = [sys.executable, "-m", "lcm_compile", *words, "a10", "--gpu", "a10g"]
    said = ""
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        while "export text" not in said:
            line = one.stderr.readline()
            assert line, said
            said += line
        pruned = prune(0)  # both of one's are being built
        assert pruned.removed == () and len(pruned.reasons) == 2
        assert all("being built" in reason for reason in pruned.reasons)
        code, two, err = command(*words, "a10g", "--gpu", "3060")
        out, rest = one.communicate(timeout=120)
    assert (code, one.returncode) == (0, 0), (err, rest)
    told = [json.loads(out), json.loads(two)]
    assert [[bundle["hit"] for bundle in bundles] for bundles in told] == [[False, False], [True, False]]
    assert "hit: another process built it" in err
    said += rest
    assert "build step for a10 " in said and "build step for a10g" not in said
    a10, a10g, third = (Path(bundle["bundle"]) for bundle in (*told[0], told[1][1]))
    manifests = [open_bundle(folder).manifest for folder in (a10, a10g, third)]
    assert [manifest.target.name for manifest in manifests] == ["a10", "a10g", "3060"]
    assert all((a10 / name).samefile(a10g / name) for name in manifests[0].files)
    shared = [name for name in manifests[2].files if name.startswith("tokenizers/")]
    assert shared and all((a10 / name).samefile(third / name) for name in shared)
    assert size_of(shelf) < 0.75 * sum(size_of(folder) for folder in (a10, a10g, third))
