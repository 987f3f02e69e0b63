"""`serve`: an HTTP server that draws pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lcm_compile.commands.options import quiet_option
from lcm_compile.errors import UsageError

if TYPE_CHECKING:
    from lcm_compile.serving.catalog import Catalog
    from lcm_compile.serving.settings import ServerSettings


@click.command()
@click.argument("bundles", nargs=-1, metavar="[NAME=]BUNDLE…")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option(
    "--api-key",
    envvar="LCM_COMPILE_API_KEY",
    help="What clients must send as their API key; better in LCM_COMPILE_API_KEY.",
)
@click.option(
    "--loras",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The folder whose LoRAs clients may put into slots, by name.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that draw: one for each GPU.",
)
@click.option(
    "--queue",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Pictures that may wait; more are refused with 429.",
)
@click.option(
    "--batch-wait",
    type=click.FloatRange(0, 10_000),
    default=5,
    show_default=True,
    metavar="MS",
    help="How long a picture waits to share a call of engines with --batch.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=600,
    show_default=True,
    metavar="S",
    help="Seconds that a request may take, with waiting.",
)
@click.option("--most-images", type=click.IntRange(1), default=10, show_default=True, help="Of one request.")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="URL",
    help="Let web pages of another origin use the server.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name that the server is called by, besides localhost and addresses.",
)
@click.option(
    "--ray-config",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Write the configuration of an application of Ray Serve with up to --workers replicas, and end.",
)
@click.option(
    "--ray-from",
    metavar="PLACE",
    help="Where its nodes fetch bundles from by their digests: a folder or a URL.",
)
@quiet_option
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    loras: Path | None,
    workers: int,
    queue: int,
    batch_wait: float,
    timeout: float,
    most_images: int,
    origins: tuple[str, ...],
    hosts: tuple[str, ...],
    ray_config: Path | None,
    ray_from: str | None,
) -> None:
    """Serve bundles over HTTP: OpenAI's images API, A1111's, and a page that draws as you type.

    Without a bundle it serves the one used last. Ctrl-C ends it when what was asked for is drawn.
    """
    needed = ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client")
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing and ray_config is None:
        raise UsageError(f"serving needs {', '.join(missing)}", "pip install 'lcm-compile[serve]'")
    from lcm_compile.commands.find_bundle import find_bundle
    from lcm_compile.output.console import note
    from lcm_compile.serving.catalog import open_catalog
    from lcm_compile.serving.settings import ServerSettings

    settings = ServerSettings(
        host=host,
        port=port,
        api_key=api_key or None,
        workers=workers,
        queue=queue,
        batch_wait_ms=batch_wait,
        timeout=timeout,
        most_images=most_images,
        loras=loras,
        origins=origins,
        hosts=hosts,
    )
    catalog = open_catalog(bundles or [str(find_bundle(None, None, None).folder)], loras)
    if ray_config is not None:
        write_ray_config(catalog, settings, ray_config, ray_from)
        return
    if ray_from is not None:
        raise click.UsageError("--ray-from is part of --ray-config.")
    from lcm_compile.serving.server import serve as run_server

    if not settings.is_local and settings.api_key is None:
        note(f"warning: anyone who reaches {host} may draw here: give --api-key", always=True)
    run_server(catalog, settings, note)


def write_ray_config(catalog: Catalog, settings: ServerSettings, path: Path, place: str | None) -> None:
    """Writes the configuration of an application of Ray Serve to a file, or for "-" to stdout."""
    from lcm_compile.output.console import note
    from lcm_compile.serving.ray_config import KEY_VARIABLE, ray_config, yaml_text
    from lcm_compile.system.files import check_file, replacing_output

    config = ray_config(catalog, settings, place)
    text = yaml_text(config, settings.host, settings.port)
    if str(path) == "-":
        click.echo(text, nl=False)
    else:
        check_file(path, "--ray-config")
        with replacing_output(path) as partial:
            partial.write_text(text, encoding="utf-8")
        note(f"serve run {path} serves it, where pip install 'lcm-compile[ray]' was done")
    if place is not None:
        for own in (own for model in config.models for own in model.bundles):
            note(f"{place.rstrip('/')}/{own.digest} must have what is in {own.folder}")
    if config.needs_key:
        note(f"{KEY_VARIABLE} must be set on the nodes; the key is not in the file")
