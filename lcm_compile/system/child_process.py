"""Runs functions in a Python process of their own, whose memory the system gets back when it ends."""

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
# Seconds that a process with a time limit gets to end, once it has sent its result or was killed.
GRACE_SECONDS = 10.0


def python_command(module: str, function: str, argument: int) -> list[str]:
    """Returns the command of a new Python process that calls `module.function(argument)`.

    The new process has the same import path as this one.
    """
    path = [str(Path(folder).absolute()) for folder in sys.path]
    code = f"import sys; sys.path[:] = {path!r}; from {module} import {function}; {function}({argument})"
    return [sys.executable, "-c", code]


def call_in_child(function: Callable[..., Any], *args: Any, seconds: float | None = None) -> Any:
    """Returns `function(*args)`, computed by a new process.

    The function, its arguments and its result must be picklable. An error that the function raises is raised
    here too, as a RuntimeError with its text if it can't be pickled. Raises LcmCompileError if the process
    ends without a result, for example because it was killed.

    `seconds` is a time limit, after which TimeoutError is raised. With a limit, the processes that the
    function started are killed together with its own.
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
            process.wait(GRACE_SECONDS if limited else None)
    finally:
        kill(process, limited)
    if not answer:
        raise LcmCompileError(
            f"the process of {function.__name__} ended without a result ({ended(process.returncode)})",
            "make sure that there is enough memory, and try again",
        )
    result, error = pickle.loads(answer)  # written by our own code
    if error is not None:
        raise error
    return result


def kill(process: subprocess.Popen[bytes], limited: bool) -> None:
    """Kills a process if it still runs. If it has a time limit, its complete process group is killed."""
    if not limited:
        process.kill()
        process.wait()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that hangs inside a driver can't even be killed.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)


def ended(code: int | None) -> str:
    """Returns in words how a process ended, from its return code; None if it still runs after SIGKILL."""
    if code is None:
        return "it hangs, and can't be killed"
    if code == -signal.SIGKILL:
        return "killed, most likely because the memory ran out"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(results: int) -> None:
    """Runs in the new process of call_in_child: computes the result and writes it to the pipe `results`.

    The process dies with its parent.
    """
    die_with_parent()
    answer: tuple[Any, BaseException | None]
    try:
        function, args = pickle.load(sys.stdin.buffer)
        answer = function(*args), None
    except KeyboardInterrupt:
        os._exit(130)  # the parent was interrupted too, and reports it
    except Exception as error:
        if os.environ.get("LCM_COMPILE_DEBUG") == "1":
            traceback.print_exc()
        answer = None, portable(error)
    with open(results, "wb") as pipe:
        pickle.dump(answer, pipe)


def die_with_parent() -> None:
    """Makes the system kill this process when its parent ends. It has no effect outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def portable(error: Exception) -> Exception:
    """Returns the error itself if it can be pickled, else a RuntimeError with its type and text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
