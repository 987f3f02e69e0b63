"""The names of pictures: from any script, none given twice, and none that a system refuses."""

from __future__ import annotations

import io
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from lcm_compile.output.images import Names, slug
from lcm_compile.output.picture_settings import read_origin

BEST = "masterpiece, best quality, highly detailed, sharp focus, "


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A large RED star!", "a-large-red-star"),
        ("赤い大きな星", "赤い大きな星"),
        ("große Straße, zwei Türen", "große-straße-zwei-türen"),
        ("große Straße", unicodedata.normalize("NFC", "große-straße")),
        ("красная звезда", "красная-звезда"),
        ("نجمة حمراء", "نجمة-حمراء"),
        ("लाल तारा", "लाल-तारा"),
        ("빨간 별", "빨간-별"),
        ("../../etc/passwd", "etc-passwd"),
        ("-rf .hidden", "rf-hidden"),
        ("a:b|c?d*e\\f/g\n\x01h\x00i", "a-b-c-d-e-f-g-h-i"),
        ("🦀 ★", "picture"),
        ("\u0301", "picture"),
        ("", "picture"),
    ],
)
def test_a_name_has_the_letters_of_its_prompt(prompt, stem):
    assert slug(prompt) == stem
    assert slug(unicodedata.normalize("NFD", prompt)) == stem


def test_names_of_long_prompts_differ_and_fit():
    for letters in ("a", "赤", "𒀀", "\U0001e900", "ü", "क्षि"):
        prompts = [letters * 200 + end for end in ("", "1", "2")]
        assert len(set(map(slug, prompts))) == 3
        assert len(f".{slug(prompts[0])}-{2**64}-1000000.png.4194304-140737488355328.part".encode()) <= 255
    stems = {slug(BEST + one) for one in ("a large red star", "a small blue ring", "a green cross")}
    assert len(stems) == 3 and all(stem.startswith("masterpiece-best-quality") for stem in stems)


def test_no_name_is_given_twice():
    names = Names()
    asked = [("a red star", 7), ("a red star!", 7), ("a red star", 8), ("a  red  star", 7)]
    assert [names.name(*one) for one in asked] == [
        "a-red-star-7",
        "a-red-star-7-2",
        "a-red-star-8",
        "a-red-star-7-3",
    ]
    # The number of one is the seed of another.
    assert names.name("a red star 7", 2) == "a-red-star-7-2-2"
    assert len({names.name("★", 1) for _ in range(3000)}) == 3000


@pytest.mark.parametrize("count", [1, 2])
def test_every_prompt_of_a_command_keeps_its_picture(command, sdxl_bundle, tmp_path, monkeypatch, count):
    prompts = [
        BEST + "a red star",
        BEST + "a ring",
        "赤い大きな星",
        "小さな青い輪",
        "★",
        "🦀",
        "a star",
        "a star!",
        "a star",
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
    words = ("run", "--stdin", "--engine", sdxl_bundle, "--steps", 1, "--seed", 7, "--num-images", count)
    code, out, err = command(*words, "--out", tmp_path)
    paths = out.splitlines()
    assert code == 0 and len(set(paths)) == len(prompts) * count, err
    assert sorted(paths) == sorted(str(path) for path in tmp_path.rglob("*.png"))
    assert [read_origin(path).request.prompt for path in paths] == [p for p in prompts for _ in range(count)]


@pytest.mark.parametrize("coding", ["iso-8859-1", "ascii"])
def test_names_where_the_system_has_few_letters(tmp_path, coding):
    """The encoding of file names is the locale's there, and letters that it lacks are left out."""
    script = f"""
import sys; sys.getfilesystemencoding = lambda: {coding!r}
from lcm_compile.output.images import slug
print(ascii(slug("ein Gruß 赤い")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii("ein-gruß" if coding == "iso-8859-1" else "ein-gru")


def test_two_processes_that_write_one_file(tmp_path):
    """At every moment the file is a whole picture of one of them."""
    script = """
import sys
import numpy as np
from PIL import Image
from pathlib import Path
from lcm_compile.output.images import save_picture
pixels = np.random.default_rng(int(sys.argv[2])).integers(0, 256, (256, 256, 3), np.uint8)
for _ in range(60):
    save_picture(Image.fromarray(pixels), Path(sys.argv[1]), {})
"""
    out = tmp_path / "one.png"
    running = [subprocess.Popen([sys.executable, "-c", script, out, str(seed)]) for seed in (0, 1)]
    seen = set()
    while any(process.poll() is None for process in running):
        if out.exists():
            with Image.open(out) as picture:
                seen.add(np.asarray(picture).tobytes())
    assert [process.returncode for process in running] == [0, 0]
    drawn = [
        np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8).tobytes() for seed in (0, 1)
    ]
    assert seen == set(drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]
