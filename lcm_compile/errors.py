"""The errors a user can meet.

LcmCompileError        exit 1   the request is fine, this machine or these files are not
├── CheckpointError             a base that can't be found, read or understood
├── LoraError                   a LoRA that can't be read, or that does not fit its base
├── BackendError                a backend that can't build or run here
├── BundleError                 a bundle that is missing, damaged or made for another machine
├── UsageError         exit 2   a request that can't be right on any machine
├── ParityError        exit 3   engines that do not draw what torch draws
└── PerformanceError   exit 3   measurements that are worse than a baseline's, or missing

Each says what happened and why in `message`, and the next command to type in `hint`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

REBUILD = "build the bundle again with --force"


class LcmCompileError(Exception):
    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(LcmCompileError):
    pass


class LoraError(LcmCompileError):
    pass


class BackendError(LcmCompileError):
    pass


class BundleError(LcmCompileError):
    pass


class UsageError(LcmCompileError):
    exit_code = 2


class ParityError(LcmCompileError):
    exit_code = 3


class PerformanceError(LcmCompileError):
    exit_code = 3


def unknown_name(kind: str, name: str, choices: Iterable[str], hint: str | None = None) -> UsageError:
    """The error for a name that is not in a table: lists the choices, the closest one first."""
    known = list(choices)
    closest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f" Did you mean {closest[0]!r}?" if closest else ""
    return UsageError(f"unknown {kind} {name!r}.{guess} Known: {', '.join(known)}", hint)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
