"""The model that draws whole pictures in Triton's Python backend, which starts a process for it.

The interface is that of github.com/triton-inference-server/python_backend. Only in such a process is there a
module `triton_python_backend_utils`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton
from PIL import Image

from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.errors import LcmCompileError, LoraError, UsageError
from lcm_compile.pipeline.check import check_request
from lcm_compile.pipeline.load import load
from lcm_compile.pipeline.request import Request, draw_seed, drawn_together
from lcm_compile.serving.triton import BUNDLE, picture_inputs


class TritonPythonModel:
    """A loaded bundle. Requests that Triton hands over together share the calls of engines of a batch."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the bundle on the device that Triton has given to this instance."""
        if args["model_instance_kind"] == "GPU":
            given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            device = args["model_instance_device_id"]
            os.environ["CUDA_VISIBLE_DEVICES"] = given[int(device)] if given else device
        self.bundle = open_bundle(Path(args["model_repository"], args["model_version"], BUNDLE))
        self.inputs = picture_inputs(self.bundle)
        self.pipeline = load(self.bundle)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Returns a response for each request: pictures, or why they can't be drawn."""
        asked: list[list[Request]] = []
        errors: dict[int, LcmCompileError] = {}
        together: dict[Any, list[tuple[int, int]]] = defaultdict(list)
        for i, request in enumerate(requests):
            asked.append([])
            try:
                asked[i] = self.requests_of(request)
            except LcmCompileError as error:
                errors[i] = error
            for row, own in enumerate(asked[i]):
                together[drawn_together(own)].append((i, row))
        shape = self.bundle.manifest.pipeline.shape
        pictures = [np.empty((len(own), shape.height, shape.width, 3), np.uint8) for own in asked]
        for places in together.values():
            try:
                drawn = self.pipeline.draw([asked[i][row] for i, row in places]).pictures
            except LcmCompileError as error:
                errors |= {i: error for i, _ in places}
                continue
            for (i, row), picture in zip(places, drawn, strict=True):
                pictures[i][row] = picture
        return [
            failed(errors[i])
            if i in errors
            else triton.InferenceResponse(
                [
                    triton.Tensor("IMAGE", own),
                    triton.Tensor("SEED", np.array([[r.seed] for r in asked[i]], np.uint64)),
                ]
            )
            for i, own in enumerate(pictures)
        ]

    def requests_of(self, request: Any) -> list[Request]:
        """Returns the pictures of Triton's request. Raises UsageError if one can't be drawn."""
        given = {own: triton.get_input_tensor_by_name(request, own.name) for own in self.inputs}
        rows = {own.field: tensor.as_numpy() for own, tensor in given.items() if tensor is not None}
        return [
            self.request_of({field: value_of(values[i]) for field, values in rows.items()})
            for i in range(len(rows["prompt"]))
        ]

    def request_of(self, fields: dict[str, Any]) -> Request:
        """Returns one picture. Raises UsageError if it can't be drawn."""
        names = ("sampler", "steps", "guidance_scale", "eta")
        drawing = self.bundle.manifest.pipeline.drawing(*(fields.pop(name, None) for name in names))
        for name in ("image", "mask"):
            if name in fields:
                fields[name] = Image.fromarray(fields[name])
        own = Request(**{"seed": draw_seed(), **drawing, **fields})
        check_request(self.bundle, own)
        return own

    def finalize(self) -> None:
        """Frees the engines."""
        self.pipeline.close()


def value_of(row: np.ndarray) -> Any:
    """Returns one picture's part of an input: a text, a number or a picture."""
    if row.ndim > 1:
        return row
    value = row[0]
    if not isinstance(value, bytes):
        return value.item()
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UsageError("a text is not UTF-8") from None


def failed(error: LcmCompileError) -> Any:
    """Returns the response that tells an error."""
    wrong = isinstance(error, UsageError | LoraError)
    text = f"{error.message} ({error.hint})" if error.hint else error.message
    code = triton.TritonError.INVALID_ARG if wrong else triton.TritonError.INTERNAL
    return triton.InferenceResponse(error=triton.TritonError(text, code))
