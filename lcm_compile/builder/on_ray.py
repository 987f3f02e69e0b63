"""Builds on a node of a Ray cluster that has the target's GPU: `lcm-compile build --on ray`.

The node builds into its own store, where the same build is a hit the next time, and then sends the bundle's
files. Paths of a base, of LoRAs and of other files are the node's: a hub id, or a folder that all nodes
share.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcm_compile.builder.build import build
from lcm_compile.bundles.bundle import EngineBundle, check_destination, open_bundle, publishing
from lcm_compile.bundles.manifest import MANIFEST
from lcm_compile.bundles.store import bundles_folder, remember
from lcm_compile.errors import BackendError, BundleError, LcmCompileError
from lcm_compile.spec import BuildSpec
from lcm_compile.system.stopwatch import Cost, Report, silent
from lcm_compile.targets import GpuTarget, find_target

CHUNK = 16 << 20  # bytes of a file in one message
AHEAD = 4  # messages that the node makes before the earlier ones have arrived
REACHED_SECONDS = 10.0  # in which a cluster's address must answer
START = "ray start --head on the first machine, and RAY_ADDRESS=HOST:6379 here"


@dataclass(frozen=True)
class Told:
    """A task of the build, as it starts and as it ends."""

    task: str
    cost: Cost | None


@dataclass(frozen=True)
class Built:
    """The bundle is in a folder of this name in the store of a node, whose id is Ray's."""

    node: str
    name: str
    digest: str


@dataclass(frozen=True)
class Refused:
    """The build can't be done."""

    error: LcmCompileError


@dataclass(frozen=True)
class Part:
    """Bytes of a file of the bundle, which follow those of the message before if that has the same name."""

    file: str
    content: bytes


def build_on_ray(
    spec: BuildSpec, out: Path | None = None, *, force: bool = False, report: Report = silent
) -> EngineBundle:
    """Builds a bundle on a node of the Ray cluster, copies it here and returns it.

    `out` is the bundle's folder here, by default one in the user's store. A bundle that is here already is
    not copied. Raises BackendError if there is no cluster or none of its nodes has the GPU, BundleError if
    what comes is not what the node built, and otherwise what `build` raises, there.
    """
    if out is not None:
        check_destination(out)
    target = find_target(spec.gpu)
    with cluster() as ray:
        check_nodes(ray.nodes(), target)
        chosen = replace(spec, gpu=target.name)
        made: Built | None = None
        for message in stream(ray, build_there, target.needs_of_node(1), chosen, force):
            if isinstance(message, Refused):
                raise message.error
            if isinstance(message, Told):
                report(message.task, message.cost)
            else:
                made = message
        assert made is not None
        folder = out if out is not None else bundles_folder() / made.name
        if not is_here(folder, made.digest):
            copy(ray, made, folder)
    remember(folder)
    return open_bundle(folder)


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """Yields the module ray, connected to a cluster that runs. Raises BackendError if there is none."""
    try:
        import ray
    except ImportError as error:
        raise BackendError("ray is not installed", "pip install 'lcm-compile[ray]'") from error
    connected = ray.is_initialized()
    if not connected:
        try:
            # Ray itself would try an address for minutes, and then end the process.
            host, colon, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
            if colon and port.isdecimal() and "/" not in host:
                socket.create_connection((host, int(port)), timeout=REACHED_SECONDS).close()
            ray.init(address="auto", log_to_driver=False, logging_level="error")
        except OSError as error:  # among them Ray's ConnectionError
            raise BackendError("no Ray cluster runs here, and RAY_ADDRESS names none", START) from error
    try:
        yield ray
    finally:
        if not connected:
            ray.shutdown()


def check_nodes(nodes: list[dict[str, Any]], target: GpuTarget) -> None:
    """Raises BackendError if no node has the target's GPU: Ray would wait for one without a word."""
    if target.is_cpu:
        return
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    prefix = "accelerator_type:"
    needed, wanted = f"{prefix}{target.accelerator_type}", f"a {target.description}"
    if target.further_capabilities:
        needed, wanted = "GPU", "any GPU"
    if not any(needed in resources for resources in alive):
        kinds = sorted({name.removeprefix(prefix) for r in alive for name in r if name.startswith(prefix)})
        raise BackendError(
            f"none of the {len(alive)} nodes of the Ray cluster has {wanted}; they have "
            f"{', '.join(kinds) or 'no GPU'}",
            "add such a node: ray start --address HOST:6379; or build without --on ray",
        )


def stream(
    ray: Any, function: Callable[..., Iterator[Any]], options: dict[str, Any], *args: Any
) -> Iterator[Any]:
    """Yields what a generator yields on a node. Raises BackendError if the node is lost."""
    task = ray.remote(function).options(
        **options, num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=AHEAD
    )
    results = task.remote(*args)
    try:
        for result in results:
            yield ray.get(result)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(f"the build on the Ray cluster failed: {lines[-1]}", "build again") from error
    finally:
        ray.cancel(results)  # of a command that was interrupted; else it has ended


def build_there(spec: BuildSpec, force: bool) -> Iterator[Told | Built | Refused]:
    """Builds on this node, and yields what happens. Runs in a worker of Ray."""
    import ray

    messages: queue.Queue[Told | Built | Refused] = queue.Queue()

    def work() -> None:
        try:
            bundle = build(spec, force=force, report=lambda task, cost: messages.put(Told(task, cost)))
        except LcmCompileError as error:
            messages.put(Refused(error))
        except BaseException as error:
            messages.put(
                Refused(BackendError(f"internal error of the node: {error!r}", "its log tells more"))
            )
            raise
        else:
            node = ray.get_runtime_context().get_node_id()
            messages.put(Built(node, bundle.folder.name, bundle.digest))

    threading.Thread(target=work, daemon=True).start()
    while isinstance(message := messages.get(), Told):
        yield message
    yield message


def is_here(folder: Path, digest: str) -> bool:
    """Returns whether a folder holds the bundle of a digest."""
    try:
        return open_bundle(folder).digest == digest
    except BundleError:
        return False


def copy(ray: Any, made: Built, folder: Path) -> None:
    """Copies a bundle from the node that built it. Raises BundleError if what comes is another."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(made.node, soft=False)}
    with publishing(folder) as part:
        for message in stream(ray, send_files, there, made.name):
            path = part / message.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(message.content)
        if open_bundle(part).digest != made.digest:
            raise BundleError("the node's bundle changed while it was copied", "build again")


def send_files(name: str) -> Iterator[Part]:
    """Yields all files of a bundle in this node's store. Runs in a worker of Ray."""
    folder = bundles_folder() / name
    for file in (MANIFEST, *open_bundle(folder).manifest.files):
        with (folder / file).open("rb") as source:
            content = source.read(CHUNK)
            yield Part(file, content)
            while content := source.read(CHUNK):
                yield Part(file, content)
