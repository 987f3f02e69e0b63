"""The second pass of a picture: what is drawn is enlarged, and drawn on at the larger size.

It is the image-to-image pass of a bundle's further size, begun at the enlarged latent, or at the enlarged
picture. This is what A1111's web UI calls "Hires. fix".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.bundles.sizes import first_of, folder_of_size
from lcm_compile.errors import UsageError
from lcm_compile.graphs import DRAW, ENCODE_IMAGE, StageContract
from lcm_compile.pipeline.drawing import Drawing
from lcm_compile.pipeline.image_start import takes_masked
from lcm_compile.pipeline.request import LANCZOS, LATENT, Request
from lcm_compile.pipeline.source_picture import SourcePicture, source_latent, source_picture
from lcm_compile.spec import BuildSpec, Shape


def enlarged(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns latents (n, c, h, w) at another height and width, interpolated bilinearly.

    They are those of torch's `interpolate(…, mode="bilinear", align_corners=False)`, which A1111's upscaler
    "Latent" is too.
    """
    down, across = (
        interpolation(size, new) for size, new in zip(latents.shape[2:], (height, width), strict=True)
    )
    return np.ascontiguousarray(down @ latents @ across.T)


def interpolation(size: int, new: int) -> np.ndarray:
    """Returns the matrix (new, size) that interpolates `size` values linearly at `new` places.

    The places are the middles of `new` equal parts; before the first value and after the last are these.
    """
    places = ((np.arange(new) + 0.5) * size / new - 0.5).clip(0, size - 1)
    return np.maximum(0, 1 - abs(places[:, None] - np.arange(size))).astype(np.float32)


def second_passes(pictures: Sequence[Request], first: Drawing, latent_shape: Sequence[int]) -> list[Request]:
    """Returns the second pass of each picture, of which `first` is the first.

    `latent_shape` (c, h, w) is that of the larger latents.
    """
    images: Iterable[SourcePicture]
    if pictures[0].upscaler == LATENT:
        assert first.latents is not None
        images = map(source_latent, enlarged(first.latents, *latent_shape[1:]))
    else:  # a picture to begin at is scaled to the size of the bundle by Lanczos' filter
        images = map(source_picture, first.pictures)
    return [picture.second_pass(image) for picture, image in zip(pictures, images, strict=True)]


def both(first: Drawing, second: Drawing) -> Drawing:
    """Returns the drawing of two passes: the pictures of the second, and the milliseconds of both."""
    ms: dict[str, Any] = {**first.ms}
    for stage, passed in second.ms.items():
        ms[stage] = ms[stage] + passed if stage in ms else passed
    graphs = {f"first pass {first.cuda_graph}": None, f"second pass {second.cuda_graph}": None}
    same = first.cuda_graph == second.cuda_graph
    return replace(second, ms=ms, cuda_graph=first.cuda_graph if same else "; ".join(graphs))


def larger_folder(bundle: Path, request: Request, shape: Shape) -> Path:
    """Returns the folder of the size of a bundle in which a request's second pass is drawn.

    `shape` is that of the first pass, which may be a further size itself. Raises UsageError if the bundle has
    no such size.
    """
    return folder_of_size(first_of(bundle), *request.size(shape))


def check_hires(request: Request, contracts: Iterable[StageContract], spec: BuildSpec | None = None) -> None:
    """Raises UsageError if a bundle of these stages can draw no second pass, whatever sizes it has.

    `spec` is what the bundle was built from, if that is known.
    """
    if request.hires is None:
        return
    stages = {contract.name: contract for contract in contracts}
    if DRAW in stages:
        raise UsageError("this bundle is one graph, which draws no second pass", "build without --whole-loop")
    if request.upscaler != LANCZOS:
        return
    without = "--hires-upscaler latent needs none"
    if ENCODE_IMAGE not in stages:
        builds = "build one with --image"
        if spec is not None:
            builds = f"{replace(spec, image=True).command()} builds one, and build --into adds its sizes"
        raise UsageError(
            "the upscaler lanczos needs a bundle that encodes an image, and this one has no such stage",
            f"{builds}; {without}",
        )
    if takes_masked(stages["step"]):
        raise UsageError("the upscaler lanczos needs a mask for an inpainting model", without)
