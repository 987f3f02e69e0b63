"""Heavy work in a Python process of its own: its memory is given back whole when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcm_compile.errors import LcmCompileError

PR_SET_PDEATHSIG = 1  # prctl(2)
LAST_WORDS = 10.0  # seconds that a limited process has to end once it has answered, or was killed


def python_command(module: str, function: str, argument: int) -> list[str]:
    """The command of a new Python process that calls `module.function(argument)`, with this import path."""
    path = [str(Path(folder).absolute()) for folder in sys.path]
    code = f"import sys; sys.path[:] = {path!r}; from {module} import {function}; {function}({argument})"
    return [sys.executable, "-c", code]


def call_in_child(function: Callable[..., Any], *args: Any, seconds: float | None = None) -> Any:
    """`function(*args)`, computed by a new process; both, and what it returns, are pickled.

    Errors of this package are raised here as they were there; LcmCompileError where the process was killed.
    With `seconds`, TimeoutError after them, and all that the process started ends with it.
    """
    read, write = os.pipe()
    limited = seconds is not None
    process = subprocess.Popen(
        python_command(__name__, "serve", write),
        stdin=subprocess.PIPE,
        pass_fds=[write],
        start_new_session=limited,
    )
    os.close(write)
    try:
        with open(read, "rb") as results:  # noqa: PTH123 - a pipe, not a path
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                pickle.dump((function, args), process.stdin)
            if not select.select([results], [], [], seconds)[0]:
                raise TimeoutError(f"{function.__name__} took more than {seconds:.0f} s")
            answer = results.read()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS if limited else None)
    finally:
        end(process, limited)
    if not answer:
        raise LcmCompileError(
            f"the process of {function.__name__} ended without a result ({ended(process.returncode)})",
            "make sure that there is memory enough, and build again",
        )
    result, error = pickle.loads(answer)  # written by our own code
    if error is not None:
        raise error
    return result


def end(process: subprocess.Popen[bytes], limited: bool) -> None:
    """Kills what is left of a process, and of a limited one's whole session."""
    if not limited:
        process.kill()
        process.wait()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs inside a driver can't even be killed.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)


def ended(code: int | None) -> str:
    if code is None:
        return "it hangs, and can't be killed"
    if code == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(results: int) -> None:
    """The other end of call_in_child. It dies with its parent."""
    die_with_parent()
    answer: tuple[Any, BaseException | None]
    try:
        function, args = pickle.load(sys.stdin.buffer)
        answer = function(*args), None
    except KeyboardInterrupt:
        os._exit(130)  # the parent was interrupted too, and tells
    except Exception as error:
        if os.environ.get("LCM_COMPILE_DEBUG") == "1":
            traceback.print_exc()
        answer = None, portable(error)
    with open(results, "wb") as pipe:
        pickle.dump(answer, pipe)


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
