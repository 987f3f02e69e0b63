"""A bundle's engines, loaded: `load`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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
from lcm_compile.graphs import StageContract
from lcm_compile.pipeline.check import check_stages
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.prompts import PROMPTS_KEPT
from lcm_compile.pipeline.tokenizer import PromptTokenizer
from lcm_compile.pipeline.whole_loop import open_pipeline
from lcm_compile.system.dataclass_json import from_json


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


def load_tokenizers(folder: Path, settings: PipelineSettings) -> dict[str, PromptTokenizer]:
    return {t.input: PromptTokenizer(folder / t.file, t) for t in settings.tokenizers}
