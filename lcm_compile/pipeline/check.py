"""Checks a bundle before its engines are loaded, and a request before anything is drawn."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.errors import REBUILD, BundleError
from lcm_compile.graphs import (
    ALL_STAGES,
    DRAW,
    ENCODE_IMAGE,
    IP_IMAGE,
    IP_WEIGHT,
    MASKED,
    STAGES,
    T2I_ADAPTERS,
    StageContract,
    is_lora_input,
)
from lcm_compile.pipeline.control import check_control, control_stages, guide_stages
from lcm_compile.pipeline.hires import check_hires, larger_folder
from lcm_compile.pipeline.image_start import check_images
from lcm_compile.pipeline.ip_image import check_ip_image
from lcm_compile.pipeline.loras import check_contracts, check_loras
from lcm_compile.pipeline.prompts import check_prompts
from lcm_compile.pipeline.request import Request
from lcm_compile.pipeline.whole_loop import check_whole_loop
from lcm_compile.samplers import schedule
from lcm_compile.samplers.step import COEFFICIENTS
from lcm_compile.spec import ControlNetSpec, IpAdapterSpec


def check_stages(bundle: EngineBundle) -> None:
    """Raises BundleError unless the stages are those of an LCM loop and their shapes fit together."""
    settings = bundle.manifest.pipeline
    contracts = {stage.contract.name: stage.contract for stage in bundle.manifest.stages}
    if tuple(contracts) == (DRAW,):
        check_draw(bundle, contracts[DRAW])
        return
    needed = [name for name in ALL_STAGES if name in contracts or name in ("encode", "step", "decode")]
    if list(contracts) != needed:
        raise BundleError(f"{bundle.folder} has the stages {list(contracts)}, not {list(STAGES)}", REBUILD)
    if unfit := check_contracts(settings, [*contracts.values()]):
        raise BundleError(f"{bundle.folder}: {unfit} is not what its LoRAs need", REBUILD)
    takes = {
        name: {s.name: s.shape for s in contract.inputs if not is_lora_input(s.name)}
        for name, contract in contracts.items()
    }
    gives = {name: {s.name: s.shape for s in contract.outputs} for name, contract in contracts.items()}
    shape, latent = settings.shape, takes["step"].get("latent", ())
    own = {"timestep": (1,), "guidance": (1,), "timesteps": takes.get("context", {}).get("timesteps", ())}
    given = {**own, "time_ids": (shape.batch, 6), **gives["encode"]}
    picture = {"latent": latent, "control": (shape.batch, 3, shape.height, shape.width), "strength": (1,)}
    controlled = {**given, **picture}
    wanted: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (takes["encode"], {t.input: (shape.batch, t.length) for t in settings.tokenizers})
    ]
    if all(widths := [tokenizer.width for tokenizer in settings.tokenizers]):
        text = gives["encode"].get("hidden_states", ())
        wanted.append(({"hidden_states": text[-1:]}, {"hidden_states": (sum(widths),)}))
    if (settings.ip_weight is None) == (IP_IMAGE in contracts):
        raise unfit_stages(bundle, [IP_IMAGE], [settings.ip_weight])
    if IP_IMAGE in contracts:
        side = takes[IP_IMAGE].get("pixels", (0,))[-1]
        wanted.append((takes[IP_IMAGE], {"pixels": (1, 3, side, side), "shown": (1,)}))
        given |= {**gives[IP_IMAGE], IP_WEIGHT: (1,)}
    if "context" in contracts:
        wanted.append((takes["context"], select(given, takes["context"])))
        given = {**gives["context"], "time": gives["context"].get("times", ())[1:]}
    guides, controls = guide_stages(contracts), control_stages(contracts)
    if len(settings.control_weights) != len(guides):
        raise unfit_stages(bundle, guides, settings.control_weights)
    grey, colours = ({"control": (1, n, shape.height, shape.width), "strength": (1,)} for n in (1, 3))
    for name in guides:
        needs = select(controlled, takes[name]) if name in controls else colours
        given |= gives[name]
        wanted.append((takes[name], grey if name in T2I_ADAPTERS and takes[name] == grey else needs))
        wanted.append((gives[name], select(takes["step"], gives[name])))
    given |= {"latent": latent, "noise": latent, "previous_x0": latent, "coefficients": (len(COEFFICIENTS),)}
    given[MASKED] = (*latent[:1], sum(latent[1:2]) + 1, *latent[2:])
    made = {"prediction": latent, "next_latent": latent, "x0": latent}
    wanted += [
        (takes["step"], select(given, takes["step"])),
        (gives["step"], select(made, gives["step"])),
        (takes["decode"], {"latent": latent}),
        (gives["decode"], {"picture": (shape.batch, shape.height, shape.width, 3)}),
    ]
    if ENCODE_IMAGE in contracts:
        encoded = dict.fromkeys(("mean", "std"), (1, *latent[1:]))
        wanted += [
            (takes[ENCODE_IMAGE], {"image": (1, shape.height, shape.width, 3)}),
            (gives[ENCODE_IMAGE], select(encoded, ["mean", *gives[ENCODE_IMAGE]])),
        ]
    arithmetic = [name in gives["step"] for name in ("next_latent", "x0")]
    arithmetic += [name in takes["step"] for name in ("noise", "previous_x0", "coefficients")]
    complete = "prediction" in gives["step"] and len(set(arithmetic)) == 1
    timed = "time" in takes["step"] or "timestep" in takes["step"]
    for has, needs in wanted:
        if has != needs or not complete or not timed or latent[:1] != (shape.batch,):
            raise unfit_stages(bundle, has, needs)


def check_draw(bundle: EngineBundle, contract: StageContract) -> None:
    """Raises BundleError unless the single stage has all inputs of a picture and returns the picture."""
    settings = bundle.manifest.pipeline
    has = {s.name: s.shape for s in (*contract.inputs, *contract.outputs)}
    shape, noise = settings.shape, has.get("noise", ())
    needs: dict[str, tuple[int, ...]] = {t.input: (shape.batch, t.length) for t in settings.tokenizers}
    needs |= {"timesteps": noise[:1], "coefficients": (*noise[:1], len(COEFFICIENTS))}
    needs |= {"noise": (*noise[:1], shape.batch, *noise[2:])}
    needs |= {"guidance": (1,)} if "guidance" in has else {}
    needs |= {"time_ids": (shape.batch, 6)} if "time_ids" in has else {}
    needs |= {"picture": (shape.batch, shape.height, shape.width, 3)}
    if has != needs or len(noise) != 5 or [s.name for s in contract.outputs] != ["picture"]:
        raise unfit_stages(bundle, has, needs)


def unfit_stages(bundle: EngineBundle, has: Collection[Any], needs: Collection[Any]) -> BundleError:
    """Returns the error for stages whose shapes are `has` where `needs` is required."""
    return BundleError(
        f"{bundle.folder}: its stages do not fit each other: {has} instead of {needs}", REBUILD
    )


def check_request(bundle: EngineBundle, request: Request) -> None:
    """Raises UsageError if a bundle can't draw this request; it needs no loaded engine.

    Raises BundleError if the size that a second pass needs is damaged.
    """
    manifest = bundle.manifest
    schedule(request.sampler, request.steps, manifest.pipeline.scheduler, request.eta)
    contracts = [stage.contract for stage in manifest.stages]
    check_images([request], contracts, manifest.spec)
    check_prompts(request, manifest.pipeline.tokenizers, contracts)
    check_loras(request, manifest.pipeline)
    guides = guide_stages(contract.name for contract in contracts)
    builds = ""
    if request.control and not guides:
        spec = replace(manifest.spec, whole_loop=False, controlnets=(ControlNetSpec("DIR"),))
        builds = spec.command()
    check_control(request.control, guides, builds)
    spec = replace(manifest.spec, whole_loop=False, ip_adapter=IpAdapterSpec("FILE"))
    check_ip_image(request, manifest.pipeline.ip_weight is not None, spec.command())
    for contract in contracts:
        if contract.name == DRAW:
            check_whole_loop(contract, request)
    check_hires(request, contracts, manifest.spec)
    if request.hires is not None:
        schedule(request.sampler, request.second_steps, manifest.pipeline.scheduler, request.eta)
        open_bundle(larger_folder(bundle.folder, request, manifest.pipeline.shape))


def select(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns the values of these names; a missing one is None."""
    return {name: given.get(name) for name in names}
