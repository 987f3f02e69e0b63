"""A bundle's engines, loaded: `load`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.bundles.bundle import EngineBundle, hold, open_bundle
from lcm_compile.bundles.manifest import PipelineSettings, StageFile
from lcm_compile.bundles.store import remember
from lcm_compile.engines import Backend, find_backend, find_target_here
from lcm_compile.engines.gpu import OldDriver
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import REBUILD, BundleError
from lcm_compile.graphs import DRAW, STAGES, StageContract
from lcm_compile.pipeline import LcmPipeline, Request
from lcm_compile.prompts import PROMPTS_KEPT
from lcm_compile.scheduler import lcm_timesteps
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.tokens import PromptTokenizer
from lcm_compile.whole_loop import check_whole, open_pipeline


def load(
    bundle: str | Path | EngineBundle,
    *,
    wait: bool = True,
    prompt_cache: int = PROMPTS_KEPT,
    cuda_graph: bool = True,
) -> LcmPipeline:
    """The pipeline of a bundle, engines loaded; with `wait` False the later ones while it draws already.

    `prompt_cache` is the number of prompts whose conditioning is kept. With `cuda_graph` a GPU's stages are
    launched as CUDA graphs where that can be; `Drawing.cuda_graph` tells. BundleError: no bundle, a damaged
    one, or one for another GPU. BackendError: its backend is missing.
    """
    start = time.perf_counter()
    if not isinstance(bundle, EngineBundle):
        bundle = open_bundle(Path(bundle))
        remember(bundle.folder)
    manifest = bundle.manifest
    backend = check_backend(bundle)
    check_stages(bundle)
    held = hold(bundle.folder)
    runners: dict[str, Runner] = {}

    def load_stage(stage: StageFile) -> Runner:
        return backend.load(bundle.path(stage.file), stage.contract, manifest.target)

    # One thread, so in the order in which the pipeline needs them.
    loader = None if wait else ThreadPoolExecutor(1)
    try:
        for stage in manifest.stages:
            name = stage.contract.name
            if loader is None:
                runners[name] = load_stage(stage)
            else:
                runners[name] = LoadingRunner(stage.contract, loader.submit(load_stage, stage))
        tokenizers = load_tokenizers(bundle.folder, manifest.pipeline)
    except BaseException:
        for runner in runners.values():
            runner.close()
        held.close()
        raise
    finally:
        if loader is not None:
            loader.shutdown(wait=False)
    load_ms = (time.perf_counter() - start) * 1000
    return open_pipeline(manifest.pipeline, runners, tokenizers, load_ms, held, prompt_cache, cuda_graph)


class LoadingRunner(Runner):
    """An engine that is being loaded; whoever needs it waits."""

    def __init__(self, contract: StageContract, loading: Future[Runner]) -> None:
        super().__init__(contract)
        self._loading = loading

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._loading.result()(inputs)

    def to_device(self, array: np.ndarray) -> Array:
        return self._loading.result().to_device(array)

    def to_host(self, array: Array) -> np.ndarray:
        return self._loading.result().to_host(array)

    def cannot_capture(self) -> str | None:
        return self._loading.result().cannot_capture()

    def graph_itself(self, on: bool) -> str | None:
        return self._loading.result().graph_itself(on)

    def mark(self) -> Any:
        return self._loading.result().mark()

    def between(self, start: Any, end: Any) -> float:
        return self._loading.result().between(start, end)

    def close(self) -> None:
        if not self._loading.cancel() and self._loading.exception() is None:
            self._loading.result().close()


def check_backend(bundle: EngineBundle) -> Backend:
    """The backend of a bundle; BundleError where its engines can't run here."""
    manifest = bundle.manifest
    backend = find_backend(manifest.backend)
    if reason := backend.cannot_run(manifest.target):
        built = f"{bundle.folder} was built for {manifest.target.name} ({manifest.target.description})"
        if isinstance(reason, OldDriver):
            raise BundleError(f"{built} and can't run here yet: {reason}", reason.update)
        here = find_target_here()
        rebuilt = replace(manifest.spec, gpu=here, precision="auto", backend="auto")
        raise BundleError(
            f"{built} and can't run on this machine ({here}): {reason}",
            f"copy it to a machine with that GPU, or build for this one: {rebuilt.command()}",
        )
    if reason := backend.cannot_load(*built_with(bundle)):
        raise BundleError(
            f"{bundle.folder} can't be loaded here: {reason}",
            f"build it again here: {manifest.spec.command()}",
        )
    return backend


def built_with(bundle: EngineBundle) -> tuple[str, Mapping[str, Any]]:
    """The backend's version and the builder options, from the key. BundleError where it holds none."""
    key = bundle.manifest.key
    try:
        return key["backend version"], from_json(Mapping[str, Any], json.loads(key["builder options"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise BundleError(f"{bundle.folder} does not tell what built it: {error}", REBUILD) from error


def check_stages(bundle: EngineBundle) -> None:
    """BundleError unless the contracts are those of an LCM loop and fit each other."""
    settings = bundle.manifest.pipeline
    contracts = {stage.contract.name: stage.contract for stage in bundle.manifest.stages}
    if tuple(contracts) == (DRAW,):
        check_draw(bundle, contracts[DRAW])
        return
    if tuple(contracts) != tuple(name for name in STAGES if name in contracts or name != "context"):
        raise BundleError(f"{bundle.folder} has the stages {list(contracts)}, not {list(STAGES)}", REBUILD)
    takes = {name: {s.name: s.shape for s in contract.inputs} for name, contract in contracts.items()}
    gives = {name: {s.name: s.shape for s in contract.outputs} for name, contract in contracts.items()}
    shape, latent = settings.shape, takes["step"].get("latent", ())
    own = {"timestep": (1,), "guidance": (1,), "timesteps": takes.get("context", {}).get("timesteps", ())}
    given = {**own, **gives["encode"]}
    wanted: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (takes["encode"], {t.input: (shape.batch, t.max_length) for t in settings.tokenizers})
    ]
    if "context" in contracts:
        wanted.append((takes["context"], picked(given, takes["context"])))
        given = {**gives["context"], "time": gives["context"].get("times", ())[1:]}
    given |= {"latent": latent, "noise": latent, "coefficients": (6,)}
    wanted += [
        (takes["step"], picked(given, takes["step"])),
        (gives["step"], picked({"prediction": latent, "next_latent": latent}, gives["step"])),
        (takes["decode"], {"latent": latent}),
        (gives["decode"], {"picture": (shape.batch, shape.height, shape.width, 3)}),
    ]
    whole = "prediction" in gives["step"] and ("next_latent" in gives["step"]) == ("noise" in takes["step"])
    timed = "time" in takes["step"] or "timestep" in takes["step"]
    for has, needs in wanted:
        if has != needs or not whole or not timed or latent[:1] != (shape.batch,):
            raise misfit(bundle, has, needs)


def check_draw(bundle: EngineBundle, contract: StageContract) -> None:
    """BundleError unless one stage takes all that a picture is drawn from, and gives that."""
    settings = bundle.manifest.pipeline
    has = {s.name: s.shape for s in (*contract.inputs, *contract.outputs)}
    shape, noise = settings.shape, has.get("noise", ())
    needs: dict[str, tuple[int, ...]] = {t.input: (shape.batch, t.max_length) for t in settings.tokenizers}
    needs |= {"timesteps": noise[:1], "coefficients": (*noise[:1], 6)}
    needs |= {"noise": (*noise[:1], shape.batch, *noise[2:])}
    needs |= {"guidance": (1,)} if "guidance" in has else {}
    needs |= {"picture": (shape.batch, shape.height, shape.width, 3)}
    if has != needs or len(noise) != 5 or [s.name for s in contract.outputs] != ["picture"]:
        raise misfit(bundle, has, needs)


def misfit(bundle: EngineBundle, has: Mapping[str, Any], needs: Mapping[str, Any]) -> BundleError:
    return BundleError(f"{bundle.folder}: its stages do not fit each other: {has} for {needs}", REBUILD)


def check_request(bundle: EngineBundle, request: Request) -> None:
    """UsageError for what a bundle can't draw, before its engines are loaded."""
    lcm_timesteps(request.steps, bundle.manifest.pipeline.scheduler)
    for stage in bundle.manifest.stages:
        if stage.contract.name == DRAW:
            check_whole(stage.contract, request)


def picked(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: given.get(name) for name in names}


def load_tokenizers(folder: Path, settings: PipelineSettings) -> dict[str, PromptTokenizer]:
    return {t.input: PromptTokenizer(folder / t.file, t) for t in settings.tokenizers}
