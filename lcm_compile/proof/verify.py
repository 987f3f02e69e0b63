"""Replays a bundle's proof on its engines on this machine."""

from __future__ import annotations

from lcm_compile.bundles.bundle import EngineBundle
from lcm_compile.bundles.manifest import Parity
from lcm_compile.errors import REBUILD, BundleError, ParityError
from lcm_compile.graphs import IP_IMAGE
from lcm_compile.pipeline.load import load
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import FLAT, compare_calls, picture_floor, psnr_db, stage_floor
from lcm_compile.proof.recording import read_arrays, read_calls, with_sample


def verify(bundle: EngineBundle) -> dict[str, Parity]:
    """Returns the parity of each stage and of the complete picture, on this machine, by name.

    The proof of a large model is that of a twin: the same model for one smaller picture, which torch draws
    faster. Only the stages that depend on neither size nor batch can then be compared. The picture is drawn
    in any case. Raises ParityError if it is flat, and BundleError if the bundle or its proof is damaged.
    """
    manifest = bundle.manifest
    stages = {stage.contract.name: stage for stage in manifest.stages}
    proof = manifest.proof
    same_shape = proof.shape == manifest.pipeline.shape
    same_batch = proof.shape.batch == manifest.pipeline.shape.batch
    figures = {}
    with load(bundle) as pipeline:
        for name, runner in pipeline.runners.items():
            if same_shape or (name == "encode" and same_batch) or name == IP_IMAGE:
                db = compare_calls(runner, read_calls(bundle.path(f"proof/{name}.npz"), runner.contract))
                figures[name] = Parity(db, stage_floor(stages[name]), "engine")
        pipeline.prompts.loras.proof_factors = True
        request = Request(proof.prompt, proof.seed, steps=proof.steps)
        picture = pipeline.draw(with_sample(request, manifest.pipeline)).pictures[0]
        if float(picture.std()) < FLAT:
            raise ParityError(
                f"the engines draw a flat picture (standard deviation {picture.std():.1f} of 255)", REBUILD
            )
        if same_shape:
            reference = read_arrays(bundle.path("proof/picture.npz")).get("picture")
            if reference is None or reference.shape != picture.shape:
                raise BundleError(f"{bundle.folder}/proof/picture.npz is no picture of this bundle", REBUILD)
            db = psnr_db(reference, picture)
            floor = picture_floor(stage.precision for stage in manifest.stages)
            figures["picture"] = Parity(db, floor, "engine")
    return figures
