"""Hints on how a bundle is meant to draw, for a request that asks for something else."""

from __future__ import annotations

from lcm_compile.bundles.manifest import BundleManifest
from lcm_compile.pipeline.request import Request

# The guidance scale up to which few-step weights that are made without guidance draw well.
MOST_GUIDANCE = 2.0
LEAST_STEPS = 10  # the steps from which on an ordinary base draws well


def drawing_hints(manifest: BundleManifest, request: Request, name: str) -> list[str]:
    """Returns hints for a better picture from the bundle of this name."""
    settings, scale = manifest.pipeline, request.guidance_scale
    takes = {tensor.name for stage in manifest.stages for tensor in stage.contract.inputs}
    if "guidance" in takes:
        hints = [f"{name} is a full LCM, made for --sampler lcm"] if request.sampler != "lcm" else []
        if request.negative_prompt:
            hints.append("--negative-prompt does nothing here: a full LCM has no second pass to read it")
        return hints
    hints = []
    if (weights := settings.few_step) is not None:
        if request.sampler != settings.sampler:
            hints.append(f"{name} has {weights.name} weights, made for --sampler {settings.sampler}")
        if request.steps not in weights.made_for:
            steps = in_words(weights.made_for)
            hints.append(f"the {weights.name} weights of {name} are made for {steps}, not {request.steps}")
        if settings.guidance_scale <= 1 and scale > MOST_GUIDANCE:
            hints.append(
                f"{weights.name} weights draw best with guidance from 1 to {MOST_GUIDANCE:g}; {scale:g} may "
                "oversaturate the picture"
            )
    elif scale <= 1 < settings.guidance_scale:
        hints.append(
            f"a base without few-step weights needs guidance: {settings.guidance_scale:g} by default"
        )
    elif request.steps < LEAST_STEPS:
        hints.append(f"a base without few-step weights needs more steps: {settings.steps} by default")
    if request.negative_prompt and scale <= 1:
        hints.append("--negative-prompt does nothing at guidance 1; try --guidance-scale 1.5")
    return hints


def in_words(steps: tuple[int, ...]) -> str:
    """Returns numbers of steps in words: `4 steps`, or `2 to 8 steps` for all from 2 to 8."""
    if len(steps) == 1:
        return f"{steps[0]} step{'s' * (steps[0] > 1)}"
    return f"{steps[0]} to {steps[-1]} steps"
