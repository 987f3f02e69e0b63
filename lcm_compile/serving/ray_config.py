"""What a Ray Serve application is told: `lcm-compile serve --ray-config` writes it, `ray` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lcm_compile.bundles.bundle import EngineBundle, open_bundle
from lcm_compile.bundles.fetch import fetch_bundle
from lcm_compile.errors import BundleError, UsageError
from lcm_compile.serving.catalog import Catalog, Model
from lcm_compile.serving.settings import ServerSettings
from lcm_compile.system.dataclass_json import from_json
from lcm_compile.system.processor import threads

KEY_VARIABLE = "LCM_COMPILE_API_KEY"
IDLE_SECONDS = 300.0  # before a replica that has nothing to draw is ended


@dataclass(frozen=True)
class RayBundle:
    """A bundle: the sha256 of its manifest, and its folder where the configuration was written."""

    digest: str
    folder: str


@dataclass(frozen=True)
class RayModel:
    """A model: its bundle, and those of its further sizes."""

    name: str
    bundles: tuple[RayBundle, ...]


@dataclass(frozen=True)
class RayConfig:
    """The arguments of `lcm_compile.serving.ray:app`.

    models: What is served. All of them are built for one target.
    place: Where nodes fetch the bundles by their digests, a folder or a URL. None: the bundles' own folders
        are the same on every node.
    resources: What a replica that draws needs of a node, as Ray's options of an actor.
    least, most: How many of these replicas there are.
    idle_seconds: How long one has had nothing to draw before it is ended.
    needs_key: Whether clients need an API key: the nodes' own LCM_COMPILE_API_KEY, which is in no file.
    settings: Those of the server that differ from their defaults.
    """

    models: tuple[RayModel, ...]
    place: str | None = None
    resources: Mapping[str, Any] | None = None
    least: int = 0
    most: int = 1
    idle_seconds: float = IDLE_SECONDS
    needs_key: bool = False
    settings: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, args: Mapping[str, Any]) -> RayConfig:
        """Returns the configuration of an application's arguments. Raises UsageError if they are none."""
        try:
            return from_json(cls, dict(args))
        except ValueError as error:
            raise UsageError(
                f"these are no arguments of a Ray Serve application: {error}",
                "lcm-compile serve BUNDLE --ray-config FILE writes them",
            ) from error

    def server_settings(self, api_key: str | None) -> ServerSettings:
        """Returns the settings of the server on a node. Raises UsageError if the node lacks the key."""
        if self.needs_key and not api_key:
            raise UsageError(f"the clients' API key is not known on this node: {KEY_VARIABLE} is not set")
        given = dict(self.settings or {})
        for name in ("origins", "hosts"):
            given[name] = tuple(given.get(name, ()))
        loras = Path(given["loras"]) if given.get("loras") else None
        return replace(ServerSettings(), **{**given, "loras": loras, "api_key": api_key})

    def catalog(self) -> Catalog:
        """Returns the models, whose bundles are fetched if this node lacks them. Raises BundleError."""
        models = []
        for model in self.models:
            opened = [self.open(own) for own in model.bundles]
            shapes = [bundle.manifest.pipeline.shape for bundle in opened]
            sizes = {(s.height, s.width): bundle for s, bundle in zip(shapes, opened, strict=True)}
            models.append(Model(model.name, sizes))
        loras = (self.settings or {}).get("loras")
        return Catalog(models, Path(loras) if loras else None)

    def open(self, own: RayBundle) -> EngineBundle:
        """Returns a bundle on this node. Raises BundleError if there is none, or another."""
        if self.place is not None:
            return fetch_bundle(own.digest, self.place)
        bundle = open_bundle(Path(own.folder))
        if bundle.digest != own.digest:
            raise BundleError(
                f"{own.folder} holds another bundle here than when the configuration was written",
                "write it again, and copy the bundle to every node; or give --ray-from PLACE",
            )
        return bundle


def ray_config(catalog: Catalog, settings: ServerSettings, place: str | None) -> RayConfig:
    """Returns the configuration of what `lcm-compile serve` would serve with these settings.

    Raises UsageError if the bundles are for several targets: a replica has one device.
    """
    targets = {m.first.manifest.target.name: m.first.manifest.target for m in catalog.models.values()}
    if len(targets) > 1:
        raise UsageError(
            f"the bundles are for {', '.join(targets)}, and a replica has one device",
            "write a configuration for each",
        )
    defaults = asdict(ServerSettings())
    own = {name: value for name, value in asdict(settings).items() if value != defaults[name]}
    for name in ("host", "port", "workers", "api_key"):
        own.pop(name, None)
    if "loras" in own:
        own["loras"] = str(own["loras"].absolute())
    return RayConfig(
        models=tuple(
            RayModel(m.name, tuple(RayBundle(b.digest, str(b.folder.absolute())) for b in m.bundles.values()))
            for m in catalog.models.values()
        ),
        place=place,
        resources=next(iter(targets.values())).needs_of_node(max(1, threads() // settings.workers)),
        most=settings.workers,
        needs_key=settings.api_key is not None,
        settings={name: list(value) if isinstance(value, tuple) else value for name, value in own.items()},
    )


def yaml_text(config: RayConfig, host: str, port: int) -> str:
    """Returns a file for `serve run` and `serve deploy`."""
    import yaml

    args = json.loads(json.dumps(asdict(config)))  # lists in place of tuples, which YAML has not
    document = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": "lcm-compile",
                "route_prefix": "/",
                "import_path": "lcm_compile.serving.ray:app",
                "args": args,
            }
        ],
    }
    return str(yaml.safe_dump(document, sort_keys=False))
