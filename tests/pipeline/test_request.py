"""Requests from Python: numbers of any library are taken, and all else is refused with what is wrong."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch

from lcm_compile import load
from lcm_compile.errors import UsageError
from lcm_compile.pipeline.pipeline import Pipeline
from lcm_compile.pipeline.request import Request


def test_each_field_is_described():
    described = inspect.getdoc(Request).splitlines()
    for field in fields(Request):
        assert any(line.startswith(f"{field.name}: ") for line in described), field.name
    described = inspect.getdoc(Pipeline.__call__).splitlines()
    for name in list(inspect.signature(Pipeline.__call__).parameters)[1:]:
        assert any(line.startswith(f"{name}: ") for line in described), name


def test_numbers_of_other_libraries():
    plain = Request("a", 7, None, 4, 1.5, 2, 1)
    for number in (np.int64, np.uint8, torch.tensor):
        assert Request("a", number(7), None, number(4), np.float64(1.5), number(2), number(1)) == plain
    found = Request("a", np.int32(7), steps=np.int16(4), guidance_scale=2)
    assert [type(value) for value in (found.seed, found.steps, found.guidance_scale)] == [int, int, float]
    assert Request("a", 7, guidance_scale=np.float32(1.5)).guidance_scale == 1.5


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *(
            ({name: value}, f"must be a whole number, not {value!r}")
            for name in ("seed", "steps", "num_images")
            for value in (7.0, True, "7", np.float32(7), [7.0], b"7")
        ),
        ({"lora_weights": 0.5}, "weights of LoRAs must be a mapping"),
        ({"lora_weights": [("style", 0.5)]}, "weights of LoRAs must be a mapping"),
        ({"lora_weights": {"style": "strong"}}, "the weight of LoRA style must be a number, not 'strong'"),
        ({"loras": 7}, "LoRAs must be a list of files"),
        ({"loras": [None]}, "LoRAs must be a list of files"),
        ({"num_images": None}, "number of images must be a whole number"),
        ({"index": 1.0}, "index of a picture must be a whole number"),
        ({"index": 1}, "picture 1 is not one of 0 to 0"),
        ({"guidance_scale": None}, "guidance scale must be a number, not None"),
        ({"guidance_scale": "1"}, "guidance scale must be a number, not '1'"),
        ({"guidance_scale": True}, "guidance scale must be a number"),
        ({"guidance_scale": 1j}, "guidance scale must be a number"),
        ({"guidance_scale": float("nan")}, "not nan"),
        ({"guidance_scale": np.float64("inf")}, "not inf"),
        ({"guidance_scale": 1e39}, "not 1e+39"),
        ({"num_images": 10**12}, "from 1 to 10000, not 1000000000000"),
        ({"prompt": None}, "prompt must be text, a str, not None"),
        ({"prompt": b"a star"}, "prompt must be text, a str, not b'a star'"),
        ({"prompt": 7}, "not 7 (int)"),
        ({"prompt": ["a", 7]}, "the prompt must be text, a str, not ['a', 7]"),
        ({"prompt": "a \ud83e star"}, "its character 3 is '\\ud83e'"),
        ({"negative_prompt": "gr\udcf6"}, "negative prompt is not Unicode text"),
        ({"negative_prompt": b"no"}, "negative prompt must be text"),
        ({"negative_prompt": ["no"]}, "negative prompt must be text"),
    ],
)
def test_what_is_wrong_is_told(sdxl_bundle, given, told):
    words = {"prompt": "a star", "seed": 7, **given}
    with pytest.raises(UsageError) as caught:
        Request(**words)
    assert told in caught.value.message
    # Without a guidance scale the pipeline takes the bundle's.
    if "index" not in given and given != {"guidance_scale": None}:
        with load(sdxl_bundle) as pipeline, pytest.raises(UsageError):
            pipeline(words.pop("prompt"), **words)
