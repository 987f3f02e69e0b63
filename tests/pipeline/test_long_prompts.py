"""Prompts of several chunks of 77 tokens, against chunks that transformers encodes one by one."""

from __future__ import annotations

import json
from dataclasses import replace

import factories
import pytest
import torch
from diffusers_reference import FLOOR, reference
from prompt_reference import encode, picture, psnr
from safetensors.torch import save_file

from lcm_compile import BuildSpec, load
from lcm_compile.builder.plan import make_plan
from lcm_compile.checkpoint.load import load_tokenizer
from lcm_compile.checkpoint.open import open_base
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.tokenizer import PromptTokenizer
from lcm_compile.spec import EmbeddingSpec

# Each word is one token of the tiny tokenizers.
WORDS = factories.WORDS
LONG = [WORDS[i * i % 10] for i in range(140)]
EMPTY = [("", 1.0)]


def chunks(*words_of_chunks):
    return [[(" ".join(own), 1.0)] for own in words_of_chunks]


@pytest.mark.parametrize("count", [1, 75, 76, 140])
def test_pictures_of_long_prompts(long, count):
    ours, theirs, room = long
    words = LONG[:count]
    own = [*chunks(words[:75], words[75:]), EMPTY][:room]
    expected = picture(theirs, encode(theirs, own))
    assert psnr(ours, " ".join(words), expected) >= FLOOR


def test_a_guided_picture_of_a_long_negative_prompt(long):
    ours, theirs, room = long
    states = [
        encode(theirs, [*own, EMPTY][:room]) for own in (chunks(LONG[:75], LONG[75:]), chunks(LONG[9:80], []))
    ]
    expected = picture(theirs, *states, guidance_scale=1.5)
    asked = {"negative_prompt": " ".join(LONG[9:80]), "guidance_scale": 1.5}
    assert psnr(ours, " ".join(LONG), expected, **asked) >= FLOOR


def test_the_end_that_does_not_fit_is_told(long):
    ours, _, room = long
    full = WORDS[:3] * (25 * room)
    assert ours.draw(Request(" ".join(full), 1)).cut == ""
    assert ours.draw(Request(" ".join([*full, "circle", "on"]), 1)).cut == "circle on"


def test_the_room_is_part_of_the_key_and_of_what_is_told(long, sdxl_checkpoint, command):
    ours, _, room = long
    spec = BuildSpec(str(sdxl_checkpoint), no_lcm=True, few_step="lcm", backend="onnxruntime")
    one, two = make_plan(spec), make_plan(replace(spec, prompt_tokens=154))
    assert two.key == {**one.key, "prompt tokens": "154"}
    assert (one.to_dict()["prompt_tokens"], two.to_dict()["prompt_tokens"]) == (77, 154)
    assert json.loads(command("inspect", ours.folder, "--json")[1])["prompt_tokens"] == 77 * room


@pytest.mark.parametrize("tokens", [0, 76, 100, 847, -77])
def test_room_that_is_no_number_of_chunks(refused, tokens):
    refused(
        2, ["multiple of 77", tokens], "build", "--base", "demo", "--gpu", "cpu", "--prompt-tokens", tokens
    )


def test_one_graph_for_a_batch_reads_long_prompts(sdxl_checkpoint, command, tmp_path):
    out = tmp_path / "bundle"
    words = ["--base", sdxl_checkpoint, "--gpu", "cpu", "--no-lcm", "--whole-loop", "--prompt-tokens", 231]
    code, _, err = command("build", *words, "--batch", 2, "--backend", "torchscript", "--out", out)
    assert code == 0, err
    theirs = reference(sdxl_checkpoint)
    expected = picture(theirs, encode(theirs, [*chunks(LONG[:75], LONG[75:]), EMPTY]))
    with load(out) as ours:
        assert psnr(ours, " ".join(LONG), expected) >= FLOOR


class TestVectors:
    """A textual inversion of several vectors is never split over two chunks."""

    @pytest.fixture(scope="class")
    def tokenizer_of(self, sd15_checkpoint, tmp_path_factory):
        folder = tmp_path_factory.mktemp("words")

        def make(count, chunks):
            save_file({"emb_params": torch.randn(count, 32)}, path := folder / f"{count}.safetensors")
            spec = BuildSpec(str(sd15_checkpoint), embeddings=(EmbeddingSpec(str(path), "<zed>"),))
            files = load_tokenizer(open_base(spec, half=False), "tokenizer")
            return PromptTokenizer(files.json, files.max_length, files.pad_token_id, chunks)

        return make

    @pytest.mark.parametrize(
        ("before", "first", "second"), [(70, 75, 0), (71, 71, 5), (75, 75, 5), (0, 5, 0)]
    )
    def test_it_moves_to_the_next_chunk(self, tokenizer_of, before, first, second):
        tokenizer = tokenizer_of(5, 2)
        read = tokenizer("red " * before + "<zed>")
        end = tokenizer("").ids[1]
        assert [list(row[1:]).index(end) for row in read.ids.reshape(2, 77)] == [first, second]
        plain = tokenizer("<zed>").ids[1:6]
        own = [row for row in read.ids.reshape(2, 77) if set(plain) <= set(row)]
        assert len(own) == 1 and read.cut == ""

    def test_the_rest_of_the_prompt_follows_it(self, tokenizer_of):
        tokenizer = tokenizer_of(5, 2)
        read = tokenizer("red " * 72 + "<zed> blue star")
        assert list(read.ids[77 + 6 : 77 + 8]) == list(tokenizer("blue star").ids[1:3])

    def test_in_the_last_chunk_those_vectors_are_used_that_fit(self, tokenizer_of):
        """As in diffusers, which cuts a prompt of one chunk within the word."""
        one, two = tokenizer_of(5, 1), tokenizer_of(5, 2)
        prompt = "red " * 72 + "<zed> star"
        assert list(one(prompt).ids[73:76]) == list(one("<zed>").ids[1:4])
        assert one(prompt).cut == "<zed> star"
        assert two("blue " * 75 + prompt).cut == "<zed> star"

    def test_all_of_them_have_the_weight_of_the_word(self, tokenizer_of):
        read = tokenizer_of(5, 2)("red " * 72 + "(<zed>:1.5) [star] ((<zed>))", "webui")
        weights = [*[1.0] * 77, 1.0, *[1.5] * 5, 1 / 1.1, *[1.21] * 5]
        assert read.weights.tolist() == pytest.approx([*weights, *[1.0] * (154 - len(weights))])

    def test_one_that_is_larger_than_a_chunk(self, tokenizer_of):
        tokenizer = tokenizer_of(77, 2)
        read = tokenizer("red <zed>")
        own = set(read.ids) - set(tokenizer("red").ids)
        assert len(own) == 77 and read.cut == ""
