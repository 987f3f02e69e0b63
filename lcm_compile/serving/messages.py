"""What a server and its workers send each other, pickled: both are this program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcm_compile.pipeline.request import Request


@dataclass(frozen=True)
class Start:
    """To a worker, once: load these bundles."""

    folders: tuple[Path, ...]


@dataclass(frozen=True)
class Draw:
    """To a worker: draw these pictures in one call of a bundle's engines.

    Pictures that are foreseen after the steps `previews` are sent too.
    """

    number: int
    folder: Path
    requests: tuple[Request, ...]
    previews: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cancel:
    """To a worker: stop drawing these, or don't begin."""

    number: int


@dataclass(frozen=True)
class Ping:
    """To a worker: answer Pong, whatever you draw."""


@dataclass(frozen=True)
class End:
    """To a worker: end, whatever it draws."""


@dataclass(frozen=True)
class Ready:
    """From a worker: its bundles are loaded, after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Pong:
    """From a worker: it runs."""


@dataclass(frozen=True)
class Progress:
    """From a worker: so many passes of a drawing are done."""

    number: int
    done: int
    total: int


@dataclass(frozen=True)
class Preview:
    """From a worker: the pictures (n, height, width, 3) that are foreseen after a step."""

    number: int
    step: int
    pictures: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """From a worker: the pictures (n, height, width, 3), and milliseconds by stage."""

    number: int
    pictures: np.ndarray
    ms: Mapping[str, Any]


@dataclass(frozen=True)
class Failed:
    """From a worker: it could not draw these, or, with number 0, not load its bundles.

    `asked_wrong` says that the request is the cause.
    """

    number: int
    message: str
    hint: str | None
    asked_wrong: bool = False


@dataclass(frozen=True)
class Stopped:
    """From a worker: a drawing was cancelled."""

    number: int
