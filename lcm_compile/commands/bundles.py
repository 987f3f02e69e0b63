"""`bundles`: lists, shows and removes bundles."""

from __future__ import annotations

from datetime import datetime

import click

from lcm_compile.commands.options import json_option, quiet_option

BASE_SHOWN = 24  # characters of a base's name in the list


class ListsAlone(click.Group):
    """A click group that runs its `list` command when no command is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments, after adding `list` if there is no command."""
        return super().parse_args(ctx, args if args and args != ["--json"] else ["list", *args])


@click.group(cls=ListsAlone)
def bundles() -> None:
    """List, show or remove bundles; without a command, list them."""


@bundles.command("list")
@json_option
def list_bundles(as_json: bool) -> None:
    """List all bundles, last used first, with those built outside the store."""
    from lcm_compile.bundles.inventory import STORE, disk_size, list_bundles
    from lcm_compile.output.console import print_json, print_table, size_text

    found = list_bundles()
    total = disk_size(found)
    if as_json:
        print_json({"bundles": [one.to_dict() for one in found], "bytes": total})
        return
    if not found:
        print("there is no bundle yet")
        return
    print_table(
        ("used", "size", "target", "backend", "built", "base", "bundle"),
        [
            (
                short_time(one.used),
                size_text(one.size),
                one.manifest.target.name if one.manifest else "",
                one.manifest.backend if one.manifest else "",
                short_time(one.built),
                short_base(one.manifest.spec.base) if one.manifest else "",
                one.folder.name if one.kind == STORE else f"{one.folder} ({one.kind})",
            )
            for one in found
        ],
    )
    shared = sum(one.size for one in found) - total
    print(f"{size_text(total)} in all" + (f"; {size_text(shared)} saved by sharing files" if shared else ""))


@bundles.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what a bundle is; NAME is its name in the list, or its path."""
    from lcm_compile.bundles.inventory import ELSEWHERE, STORE, find_stored, read_stored
    from lcm_compile.bundles.manifest import read_manifest
    from lcm_compile.bundles.store import bundles_folder, last_uses
    from lcm_compile.output.console import print_json
    from lcm_compile.output.describe import describe_bundle
    from lcm_compile.output.reports import print_description

    folder = find_stored(name)
    kind = STORE if folder.parent == bundles_folder().resolve() else ELSEWHERE
    description = {
        **describe_bundle(folder, *read_manifest(folder)),
        **read_stored(folder, kind, last_uses().get(folder)).to_dict(),
    }
    if as_json:
        print_json(description)
    else:
        print_description(folder.name, description)


@bundles.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@quiet_option
def rm(names: tuple[str, ...]) -> None:
    """Remove bundles, by their names in the list or their paths."""
    from lcm_compile.bundles.inventory import find_stored, remove_bundle
    from lcm_compile.output.console import note

    for folder in [find_stored(name) for name in names]:
        remove_bundle(folder)
        note(f"removed {folder}")


@bundles.command()
@click.option(
    "--keep-under",
    required=True,
    metavar="SIZE",
    help="Size to keep, such as 50GB, 500MB, 1.5GiB; 0 keeps none.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would be removed.")
@json_option
@quiet_option
def prune(keep_under: str, dry_run: bool, as_json: bool) -> None:
    """Remove the bundles that have been unused for longest.

    Removes bundles until the store is under SIZE, and always what interrupted builds left. Keeps bundles
    that are in use or being built, and all bundles outside the store.
    """
    from lcm_compile.bundles.inventory import disk_size, parse_size
    from lcm_compile.bundles.inventory import prune as remove_oldest
    from lcm_compile.output.console import note, print_json, size_text

    limit = parse_size(keep_under)
    pruned = remove_oldest(limit, dry_run)
    size = disk_size(pruned.left)
    if as_json:
        print_json(
            {
                "removed": [one.to_dict() for one in pruned.removed],
                "kept": list(pruned.reasons),
                "freed_bytes": disk_size([*pruned.removed, *pruned.left]) - size,
                "bytes": size,
            }
        )
        return
    for one in pruned.removed:
        print(one.folder)
    for reason in pruned.reasons:
        note(reason, always=True)
    done = "would be removed" if dry_run else "removed"
    more = f", over {keep_under}" if size > limit else ""
    note(f"{len(pruned.removed)} {done}; {size_text(size)} left{more}")


def short_time(seconds: float) -> str:
    """Returns a Unix time, in seconds, as local date and minutes."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def short_base(base: str) -> str:
    """Returns the name of a base, cut at its start to BASE_SHOWN characters."""
    return base if len(base) <= BASE_SHOWN else f"…{base[1 - BASE_SHOWN :]}"
