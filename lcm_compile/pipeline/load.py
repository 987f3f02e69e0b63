"""Loads a bundle's engines as a pipeline: `load`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcm_compile.bundles.bundle import EngineBundle, hold, open_bundle
from lcm_compile.bundles.manifest import PipelineSettings, StageFile
from lcm_compile.bundles.sizes import folder_of_size
from lcm_compile.bundles.store import remember
from lcm_compile.engines import Backend, find_backend, find_target_here
from lcm_compile.engines.gpu import OldDriver
from lcm_compile.engines.runner import ForwardingRunner, Runner, closed
from lcm_compile.engines.scratch import Scratch
from lcm_compile.errors import REBUILD, BundleError
from lcm_compile.graphs import StageContract
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.system.processor import threads

# What draws with the engines is imported while they load.
if TYPE_CHECKING:
    from lcm_compile.pipeline.pipeline import Pipeline
    from lcm_compile.pipeline.request import Request
    from lcm_compile.pipeline.tokenizer import PromptTokenizer

PROMPTS_KEPT = 8  # prompts, or different prompts of a batch, in the cache


def load(
    bundle: str | Path | EngineBundle,
    *,
    height: int | None = None,
    width: int | None = None,
    wait: bool = True,
    prompt_cache: int = PROMPTS_KEPT,
    cuda_graph: bool = True,
    open_size: Callable[[Path], Pipeline] | None = None,
) -> Pipeline:
    """Returns the pipeline of a bundle, with its engines loaded. Threads may share it.

    `height` and `width` in pixels choose one of the bundle's sizes; None stands for its own. With `wait`
    False the engines load in a thread, and each stage waits for its own engine. `prompt_cache` is the number
    of prompts whose conditioning is kept. With `cuda_graph` the stages are launched as CUDA graphs on a GPU
    if they can be captured; `Drawing.cuda_graph` says whether they were. `open_size` gives the pipeline of a
    size's folder for second passes, by default a new one; it is closed with this one. Raises BundleError if
    there is no bundle, or it is damaged or for another GPU, UsageError if it has no such size, and
    BackendError if its backend is not installed.
    """
    start = time.perf_counter()
    if height is not None or width is not None:
        bundle = folder_of_size(
            bundle.folder if isinstance(bundle, EngineBundle) else Path(bundle), height, width
        )
    if not isinstance(bundle, EngineBundle):
        bundle = open_bundle(Path(bundle))
        remember(bundle.folder)
    manifest = bundle.manifest
    backend = check_backend(bundle)
    held = hold(bundle.folder)
    runners: dict[str, Runner] = {}
    scratch = Scratch()  # the stages of a picture run in turn

    def load_stage(stage: StageFile) -> Runner:
        path = bundle.path(stage.file)
        runner = backend.load(path, stage.contract, manifest.target, stage.precision)
        runner.share_scratch(scratch)
        return runner

    # They begin in the order in which the pipeline needs them. A GPU loads one at a time.
    loader = None if wait else ThreadPoolExecutor(threads() if manifest.target.is_cpu else 1)
    try:
        for stage in manifest.stages:
            name = stage.contract.name
            if loader is None:
                runners[name] = load_stage(stage)
            else:
                runners[name] = LoadingRunner(stage.contract, loader.submit(load_stage, stage))
        from lcm_compile.pipeline.check import check_stages
        from lcm_compile.pipeline.whole_loop import pipeline_class

        check_stages(bundle)
        tokenizers = load_tokenizers(bundle.folder, manifest.pipeline)
    except BaseException:
        for runner in runners.values():
            runner.close()
        held.close()
        raise
    finally:
        if loader is not None:
            loader.shutdown(wait=False)

    def open_larger(request: Request) -> Pipeline:
        from lcm_compile.pipeline.hires import larger_folder

        folder = larger_folder(bundle.folder, request, manifest.pipeline.shape)
        if open_size is not None:
            return open_size(folder)
        return load(open_bundle(folder), wait=False, prompt_cache=prompt_cache, cuda_graph=cuda_graph)

    load_ms = (time.perf_counter() - start) * 1000
    open_with = pipeline_class(runners)
    settings = manifest.pipeline
    return open_with(settings, runners, tokenizers, load_ms, held, prompt_cache, cuda_graph, open_larger)


class LoadingRunner(ForwardingRunner):
    """An engine that is still being loaded. Its first call waits until it is."""

    def __init__(self, contract: StageContract, loading: Future[Runner]) -> None:
        super().__init__(contract)
        self._loading = loading

    def runner(self) -> Runner:
        """Returns the loaded engine, and waits for it.

        Raises the error of the loading, if there was one, and UsageError if the loading was cancelled.
        """
        try:
            return self._loading.result()
        except CancelledError:
            raise closed(f"the {self.contract.name} engine") from None

    def keep_kernels(self) -> None:
        """Writes what was compiled for the engine, if it is loaded."""
        if self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None:
            super().keep_kernels()

    def close(self) -> None:
        """Frees the engine, as soon as it is loaded if it still loads, or cancels the loading."""
        if not self._loading.cancel():
            self._loading.add_done_callback(close_loaded)


def close_loaded(loading: Future[Runner]) -> None:
    """Frees an engine, if it could be loaded."""
    if loading.exception() is None:
        loading.result().close()


def check_backend(bundle: EngineBundle) -> Backend:
    """Returns the backend of a bundle. Raises BundleError if the bundle's engines can't run here."""
    manifest = bundle.manifest
    backend = find_backend(manifest.backend)
    if reason := backend.cannot_run(manifest.target):
        built = f"{bundle.folder} was built for {manifest.target.name} ({manifest.target.description})"
        if isinstance(reason, OldDriver):
            raise BundleError(f"{built} and can't run here yet: {reason}", reason.update)
        here = find_target_here()
        rebuilt = replace(manifest.spec, gpu=here, beside=(), precision="auto", backend="auto")
        raise BundleError(
            f"{built} and can't run on this machine ({here}): {reason}",
            f"copy it to a machine with such a GPU, or build for this one: {rebuilt.command()}",
        )
    if reason := backend.cannot_load(*built_with(bundle)):
        raise BundleError(
            f"{bundle.folder} can't be loaded here: {reason}",
            f"build it again here: {manifest.spec.command()}",
        )
    return backend


def built_with(bundle: EngineBundle) -> tuple[str, Mapping[str, Any]]:
    """Returns the backend's version and the builder options of a bundle's key.

    Raises BundleError if the key has none.
    """
    key = bundle.manifest.key
    try:
        return key["backend version"], from_json(Mapping[str, Any], json.loads(key["builder options"]))
    except (KeyError, ValueError, RecursionError) as error:
        raise BundleError(f"{bundle.folder} does not say what built it: {error}", REBUILD) from error


def load_tokenizers(folder: Path, settings: PipelineSettings) -> dict[str, PromptTokenizer]:
    """Returns the tokenizers by the stage input that they fill. Raises BundleError if one can't be read."""
    from lcm_compile.pipeline.tokenizer import PromptTokenizer

    tokenizers = {}
    for own in settings.tokenizers:
        path = folder / own.file
        try:
            json = path.read_text(encoding="utf-8")
            tokenizers[own.input] = PromptTokenizer(json, own.max_length, own.pad_token_id, own.chunks)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} can't be read: {error}", "build the bundle again") from error
    return tokenizers
