"""Heavy work in a Python process of its own: its memory is given back whole when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lcm_compile.errors import LcmCompileError

PR_SET_PDEATHSIG = 1  # prctl(2)
SERVE = "import sys; sys.path[:] = {path!r}; from lcm_compile.apart import serve; serve({results})"


def call_apart(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, computed by a new process; both, and what it returns, are pickled.

    Errors of this package are raised here as they were there; LcmCompileError where the process was killed.
    """
    read, write = os.pipe()
    code = SERVE.format(path=[str(Path(folder).absolute()) for folder in sys.path], results=write)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=[write])
    os.close(write)
    try:
        with open(read, "rb") as results:  # noqa: PTH123 - a pipe, not a path
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                pickle.dump((function, args), process.stdin)
            answer = results.read()
        process.wait()
    finally:
        process.kill()
        process.wait()
    if not answer:
        raise LcmCompileError(
            f"the process of {function.__name__} ended without a result ({ended(process.returncode)})",
            "make sure that there is memory enough, and build again",
        )
    result, error = pickle.loads(answer)  # written by our own code
    if error is not None:
        raise error
    return result


def ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed, most likely for want of memory"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(results: int) -> None:
    """The other end of call_apart. It dies with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answer: tuple[Any, BaseException | None]
    try:
        function, args = pickle.load(sys.stdin.buffer)
        answer = function(*args), None
    except LcmCompileError as error:
        answer = None, error
    except KeyboardInterrupt:
        os._exit(130)  # the parent was interrupted too, and tells
    except Exception as error:
        if os.environ.get("LCM_COMPILE_DEBUG") == "1":
            traceback.print_exc()
        answer = None, portable(error)
    with open(results, "wb") as pipe:
        pickle.dump(answer, pipe)


def portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
