"""The errors that a user can get.

LcmCompileError        exit 1   the request is fine, but this machine or these files are not
├── CheckpointError             a base that can't be found, read or understood
├── LoraError                   a LoRA that can't be read, or that does not fit its base
├── BackendError                a backend that can't build or run here
├── BundleError                 a bundle that is missing, damaged or made for another machine
├── Interrupted        exit 130 Ctrl-C after something was written
├── UsageError         exit 2   a request that can't be right on any machine
├── ParityError        exit 3   engines whose output differs from torch's
└── PerformanceError   exit 3   measurements that are worse than a baseline's, or that are missing

`message` says what happened and why. `hint` says what to do next, usually a command to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

REBUILD = "build the bundle again with --force"


class LcmCompileError(Exception):
    """The base of all errors of this package. `exit_code` is the command's exit status."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckpointError(LcmCompileError):
    """A base can't be found, read or understood."""


class LoraError(LcmCompileError):
    """A LoRA can't be read, or does not fit its base."""


class BackendError(LcmCompileError):
    """A backend can't build or run on this machine."""


class BundleError(LcmCompileError):
    """A bundle is missing, damaged or made for another machine."""


class UsageError(LcmCompileError):
    """A request can't be right on any machine."""

    exit_code = 2


class Interrupted(LcmCompileError):
    """Ctrl-C stopped a command after it had written something."""

    exit_code = 130


class ParityError(LcmCompileError):
    """The output of engines differs from torch's by more than the limit."""

    exit_code = 3


class PerformanceError(LcmCompileError):
    """Measurements are worse than a baseline's by more than the limit, or missing."""

    exit_code = 3


def unknown_name(kind: str, name: str, choices: Iterable[str], hint: str | None = None) -> UsageError:
    """Returns the error for a name that is not in a table. It suggests the closest choice, and lists all."""
    known = list(choices)
    closest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f" Did you mean {closest[0]!r}?" if closest else ""
    return UsageError(f"unknown {kind} {name!r}.{guess} Known: {', '.join(known)}", hint)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its type if it has no text."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names and the number of the others in words: `a, b, c and 5 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
