"""Prompts in webui's syntax: its published grammar, and pictures of weighted text states."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers_reference import FLOOR, reference
from prompt_reference import encode, picture, psnr

from lcm_compile import load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.syntax import read_prompt

# What the documentation of webui's parser says of each prompt: its texts and their weights.
READ = {
    "normal text": [("normal text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *[("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55)],
        *[(", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)],
    ],
    "((word))": [("word", 1.21)],
    "[[word]]": [("word", 1 / 1.21)],
    "(word:0.25) (word : +1.5 )": [("word", 0.25), (" ", 1), ("word ", 1.5)],
    "(word:-1)": [("word", -1)],
    "(red:1.0) star": [("red star", 1)],
    "([star])": [("star", 1)],
    r"\\ \[a\] \x": [(r"\ [a] x", 1)],
    "a:1.2) b) c] : d": [("a:1.2) b) c] : d", 1)],
    "(a: b)": [("a: b", 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)],
    "": [],
    "()": [],
}


@pytest.mark.parametrize("prompt", READ)
def test_grammar(prompt):
    read = read_prompt(prompt, "webui")
    assert [piece.text for piece in read] == [text for text, _ in READ[prompt]]
    np.testing.assert_allclose([piece.weight for piece in read], [weight for _, weight in READ[prompt]])
    assert not any(piece.begins_chunk for piece in read)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a BREAK b", ["a", "b"]),
        ("a\nBREAK\n\nb BREAK c", ["a", "b", "c"]),
        ("BREAK a", ["", "a"]),
        ("a BREAK BREAK b", ["a", "", "b"]),
        ("a BREAK", ["a", ""]),
        ("a BREAKER break b", ["a BREAKER break b"]),
        ("a,BREAK,b", ["a,", ",b"]),
    ],
)
def test_break(prompt, chunks):
    read = ["", *read_prompt(prompt, "webui")]
    found = [""]
    for piece in read[1:]:
        found += [""] * piece.begins_chunk
        found[-1] += piece.text
    assert found == chunks


# Each prompt as chunks of texts and weights, which the reference multiplies.
WEIGHTED = {
    "a (red:1.4) star on ((white)) [background]": [
        [("a", 1), ("red", 1.4), ("star on", 1), ("white", 1.21), ("background", 1 / 1.1)]
    ],
    "(large:0.5) blue circle BREAK a (red:1.6) star": [
        [("large", 0.5), ("blue circle", 1)],
        [("a", 1), ("red", 1.6), ("star", 1)],
    ],
    "(a BREAK blue:1.3) star": [[("a", 1.3)], [("blue", 1.3), ("star", 1)]],
    "(" + "red " * 80 + ":1.2) star": [[("red " * 75, 1.2)], [("red " * 5, 1.2), ("star", 1)]],
    "a (star:0) (circle:-0.4)": [[("a", 1), ("star", 0), ("circle", -0.4)]],
    r"a \(red\) star": [[("a (red) star", 1)]],
}


@pytest.mark.parametrize("prompt", WEIGHTED, ids=lambda prompt: prompt[:30])
def test_pictures_of_weighted_prompts(long, prompt):
    ours, theirs, room = long
    expected = picture(theirs, encode(theirs, [*WEIGHTED[prompt], [], []][:room]))
    assert psnr(ours, prompt, expected, prompt_syntax="webui") >= FLOOR
    if "(" in prompt.replace(r"\(", ""):
        assert psnr(ours, prompt, expected) < FLOOR - 10


def test_a_guided_picture_of_a_weighted_negative_prompt(long):
    ours, theirs, room = long
    prompts = ("(red:1.3) star", "a (blue:1.5) circle")
    given = [[[("red", 1.3), ("star", 1)]], [[("a", 1), ("blue", 1.5), ("circle", 1)]]]
    states = [encode(theirs, [*chunks, [], []][:room]) for chunks in given]
    expected = picture(theirs, *states, guidance_scale=1.5)
    asked = {"negative_prompt": prompts[1], "guidance_scale": 1.5, "prompt_syntax": "webui"}
    assert psnr(ours, prompts[0], expected, **asked) >= FLOOR


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a (red:1) star, (blue:1.0) circle", "a red star, blue circle"),
        ("([red star])" + " circle" * 90, "red star" + " circle" * 90),
        (r"a \(red\) star", "a (red) star"),
    ],
)
def test_weights_of_one_are_plain_text_to_the_bit(long, prompt, plain):
    ours, *_ = long
    drawn = ours.draw(Request(prompt, 7, prompt_syntax="webui")).pictures
    np.testing.assert_array_equal(drawn, ours.draw(Request(plain, 7)).pictures)


def test_a_prompt_is_remembered_in_its_syntax(long):
    ours, *_ = long
    plain, webui = (Request("a (red:1.5) star", 7, prompt_syntax=s) for s in ("plain", "webui"))
    first = [ours.draw(request).pictures for request in (plain, webui)]
    assert not np.array_equal(*first)
    for request, pictures in zip((plain, webui), first, strict=True):
        np.testing.assert_array_equal(ours.draw(request).pictures, pictures)


def test_what_a_break_pushes_out_is_told(long):
    ours, _, room = long
    prompt = " BREAK ".join(["(red:1.2) star"] * room)
    assert ours.draw(Request(prompt, 1, prompt_syntax="webui")).cut == ""
    drawing = ours.draw(Request(prompt + " BREAK a (blue:1.2) circle", 1, prompt_syntax="webui"))
    assert drawing.cut == "a blue circle"


REFUSED = {
    "a star <lora:my style:0.6>": ["<lora:my style:0.6>", "build --lora 'my style.safetensors:0.6'"],
    "<lora:x>": ["build --lora x.safetensors:1"],
    "<lyco:x:0.5:0.7>": ["build --lora x.safetensors:0.7@text=0.5"],
    "<hypernet:x:1>": ["no hypernetworks"],
    "a cat AND a dog": ["AND", "one prompt"],
    "a [cat:dog:0.5]": ["[cat:dog:0.5]", "between steps"],
    "a [cat::10]": ["[cat::10]"],
    "a [cat|dog]": ["[cat|dog]"],
    "(a:1.2.3)": ["'1.2.3'", "no number"],
    "(a:.)": ["'.'"],
    "(a:10000)": ["10000", "1000 is the most"],
    "(" * 400 + "a": ["1000 is the most"],
}


@pytest.mark.parametrize("prompt", REFUSED, ids=lambda prompt: prompt[:30])
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_what_webui_alone_does_is_refused(prompt, field):
    with pytest.raises(UsageError) as refusal:
        Request(**{"prompt": "a", "seed": 0, "prompt_syntax": "webui", field: prompt})
    for told in REFUSED[prompt]:
        assert told in f"{refusal.value.message} {refusal.value.hint}"
    Request(prompt, 0)


def test_an_unknown_syntax():
    with pytest.raises(UsageError, match="webui"):
        Request("a", 0, prompt_syntax="compel")


def test_on_the_command_line(long, command, refused, tmp_path):
    ours, _, room = long
    words = ["run", "--bundle", ours.folder, "--seed", 3, "--out", tmp_path / "a.png"]
    code, _, err = command(*words, "a (red:1.3) star")
    assert code == 0, err
    assert err.count("hint: ") == 1 and "--prompt-syntax webui" in err
    assert "hint" not in command(*words, "a (red:1.3) star", "--quiet")[2]
    plain = (tmp_path / "a.png").read_bytes()
    code, _, err = command(*words, "a (red:1.3) star", "--prompt-syntax", "webui")
    assert code == 0 and "hint" not in err
    weighted = (tmp_path / "a.png").read_bytes()
    assert weighted != plain
    # The picture tells its syntax.
    code, _, err = command(
        "run", "--bundle", ours.folder, "--again", tmp_path / "a.png", "--out", tmp_path / "b.png"
    )
    assert code == 0 and (tmp_path / "b.png").read_bytes() == weighted
    code, _, err = command(*words, "red " * 300)
    assert code == 0 and f"build --prompt-tokens {77 * (room + 1)}" in err
    code, _, err = command(*words, "a star <lora:x:0.6>")
    assert code == 0 and err.count("hint: ") == 1 and "build --lora x.safetensors:0.6" in err
    refused(
        2,
        ["<lora:x:0.6>", "build --lora x.safetensors:0.6"],
        *words,
        "<lora:x:0.6>",
        "--prompt-syntax",
        "webui",
    )
    (tmp_path / "prompts.txt").write_text("a (red:1.3) star\n((blue)) star\na star\n")
    code, _, err = command(
        *words[:5], "--grid", f"prompt={tmp_path}/prompts.txt", "--out", tmp_path / "s.png"
    )
    assert code == 0 and err.count("hint: ") == 1


@pytest.mark.parametrize("prompt", ["a star", "a star (red)", "a [red] star, 2:1", "(a) (b)", "don't BREAKS"])
def test_a_plain_prompt_gets_no_hint(prompt):
    from lcm_compile.pipeline.syntax import hint_of

    assert hint_of(prompt) == ""


def test_one_graph_takes_breaks_and_refuses_weights(sdxl_checkpoint, command, refused, tmp_path):
    out = tmp_path / "bundle"
    words = ["--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--whole-loop", "--prompt-tokens", 154]
    code, _, err = command("build", *words, "--backend", "torchscript", "--out", out)
    assert code == 0, err
    theirs = reference(sdxl_checkpoint)
    expected = picture(theirs, encode(theirs, [[("a red star", 1)], [("blue circle", 1)]]))
    with load(out) as ours:
        assert psnr(ours, "a red star BREAK blue circle", expected, prompt_syntax="webui") >= FLOOR
        with pytest.raises(UsageError, match="takes no weights"):
            ours("a (red:1.2) star", prompt_syntax="webui")
    asked = ["run", "a (red:1.2) star", "--prompt-syntax", "webui", "--bundle", out]
    refused(2, ["one graph", "weights", "without --whole-loop"], *asked)
