"""Texts that are read right or not at all, and files that are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from lcm_compile.errors import LcmCompileError
from lcm_compile.system.files import read_lines, replacing, replacing_output, text_lines, write_atomically

LINES = ["a red star", "", "größe ਊ 赤い\u2028大きな星 🦀", "  a\x0cb\x85c ", "the last"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        *(("", "utf-8"), ("\ufeff", "utf-8")),
        *(("\ufeff", f"utf-{bits}-{order}") for bits in (16, 32) for order in ("le", "be")),
    ],
)
def test_a_text_of_any_unicode_encoding_and_system(tmp_path, mark, encoding, end):
    path = tmp_path / "p.txt"
    for closed in (True, False):
        path.write_bytes((mark + end.join(LINES) + end * closed).encode(encoding))
        assert read_lines(path) == LINES
    path.write_bytes(mark.encode(encoding))
    assert read_lines(path) == []


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("a star\ngröße\n".encode("latin-1"), ["UTF-8", "line 2", "0xf6"]),
        ("größe".encode("cp437"), ["UTF-8", "line 1"]),
        ("a star\n星\n".encode("shift_jis"), ["UTF-8", "line 2"]),
        ("a star\nb\n".encode("utf-16-le"), ["UTF-8", "line 1", "0x00"]),
        ("\ufeffa\nb\n".encode("utf-16-le")[:-1], ["UTF-16", "line 2"]),
        (b"\xff\xfea\0\x00\xd8b\0", ["UTF-16", "line 1"]),
        (b"a\0b\n", ["UTF-8", "line 1", "0x00"]),
    ],
)
def test_a_text_in_another_encoding_is_refused_by_name(tmp_path, data, told):
    path = tmp_path / "p.txt"
    path.write_bytes(data)
    with pytest.raises(LcmCompileError) as caught:
        read_lines(path)
    assert caught.value.hint
    for word in (str(path), *told):
        assert word in caught.value.message


def test_each_line_comes_before_the_next_is_written():
    """A program that writes a prompt waits for its picture before it writes another."""
    read = []

    def written():
        yield "\ufeffein".encode("utf-16-le")
        yield "s\n".encode("utf-16-le")
        assert read == ["eins"]
        yield "zwei\n".encode("utf-16-le")

    for line in text_lines(written(), "stdin"):
        read.append(line)
    assert read == ["eins", "zwei"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as partial:
        partial.write_text("half of the n")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_threads_that_write_one_file_leave_one_of_their_texts(tmp_path):
    """Each writes under a name of its own: none finds another's half, or loses it."""
    path, failed = tmp_path / "a.txt", []
    texts = [f"{i}" * 100_000 for i in range(8)]

    def write(text):
        try:
            for _ in range(20):
                write_atomically(path, text)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_goes_and_a_running_ones_stays(tmp_path):
    path = tmp_path / "folder"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".folder.{ended.pid}-1.part"
    running = tmp_path / f".folder.{os.getppid()}-1.part"
    for leftover in (left, running):
        leftover.mkdir()
    with replacing(path) as partial:
        partial.mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [running.name, "folder"]


@pytest.mark.parametrize("name", ["n" * 251 + ".png", "赤" * 83 + ".x.png"])
def test_the_longest_names_can_be_written(tmp_path, name):
    assert len(os.fsencode(name)) == 255
    write_atomically(tmp_path / name, "text")
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "text"


def test_files_have_the_permissions_that_the_user_gives(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "new" / "a.txt", b"text")
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a.txt").stat().st_mode & 0o777 == 0o644


def test_an_output_that_cannot_be_written_names_the_next_step(tmp_path):
    path = tmp_path / "missing" / "a.png"
    with pytest.raises(LcmCompileError, match="can't be written") as found, replacing_output(path) as partial:
        partial.write_text("a picture")
    assert "--out" in found.value.hint
