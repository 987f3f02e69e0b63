"""Options that many commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--quiet", is_flag=True, help="No progress and no hints.")(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")(command)
