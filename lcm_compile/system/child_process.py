"""Runs functions in a Python process of their own, whose memory the system gets back when it ends."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from lcm_compile.errors import LcmCompileError

PR_SET_PDEATHSIG = 1  # prctl(2)
# Seconds that a process with a time limit gets to end, once it has sent its result or was killed.
GRACE_SECONDS = 10.0
CODE_BYTES = 4  # of an exit code on a pipe
# The environment of a ForkServer's calls. Their threads must not spin on a core while they wait, since other
# calls need it. And glibc gives freed tensors back to the system at once: otherwise it keeps those of less
# than 32 MB for itself.
CHILD = {"OMP_WAIT_POLICY": "passive", "MALLOC_MMAP_THRESHOLD_": str(1 << 22)}


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
    return result_of(function, answer, process.returncode)


def result_of(function: Callable[..., Any], answer: bytes, code: int | None) -> Any:
    """Returns the result of a function whose process wrote `answer` and ended with `code`.

    Raises the function's own error, and LcmCompileError if there is no answer.
    """
    if not answer:
        raise LcmCompileError(
            f"the process of {function.__name__} ended without a result ({ended(code)})",
            "make sure that there is enough memory, and try again",
        )
    result, error = pickle.loads(answer)  # written by our own code
    if error is not None:
        raise error
    return result


class ForkServer:
    """A process that imports modules once, and forks a child for each call, which begins with them imported.

    Importing torch, diffusers and the exporter takes seconds, and this process itself can't be forked: the
    caller's threads and devices would not survive that. Several threads may call at the same time.

    >>> with ForkServer(["numpy"]) as server:
    ...     server.call(len, [1, 2])
    2
    """

    def __init__(self, modules: Sequence[str]) -> None:
        """Starts the process, which imports the modules meanwhile.

        The system kills it, and the calls with it, if the thread that made this object ends.
        """
        self._socket, other = socket.socketpair()
        with other:
            command = python_command(__name__, "serve_forks", other.fileno())
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env={**CHILD, **os.environ},
            )
        self._turn = threading.Lock()
        self._socket.sendall(" ".join(modules).encode() + b"\n")

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process, and with it every call."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns `function(*args)`, computed by a child. Raises what `call_in_child` raises."""
        read_task, write_task = os.pipe()
        read_result, write_result = os.pipe()
        with open(write_task, "wb") as task, open(read_result, "rb") as results:  # noqa: PTH123 - pipes
            with self._turn, contextlib.suppress(OSError):  # the server may have been killed
                socket.send_fds(self._socket, [b"!"], [read_task, write_result])
            os.close(read_task)
            os.close(write_result)
            with contextlib.suppress(BrokenPipeError), task:
                pickle.dump((function, args), task)
            answer = results.read()
        code = int.from_bytes(answer[-CODE_BYTES:], "big", signed=True) if answer else -signal.SIGKILL
        return result_of(function, answer[:-CODE_BYTES], code)


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
    with open(results, "wb") as pipe:
        answer_task(sys.stdin.buffer, pipe)


def serve_forks(control: int) -> None:
    """Runs in the process of ForkServer: imports the modules that the socket `control` names, and forks.

    For each call the socket brings the ends of two pipes, of its task and of its result. When the child has
    ended, its exit code is added to the result: it may have been killed, as when the memory runs out.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which then ends this
    # The libraries' own idle threads don't survive a fork, and they know how to start others.
    warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
    with socket.socket(fileno=control) as connection:
        names = b""
        while not names.endswith(b"\n"):
            names += connection.recv(1)
        for name in names.decode().split():
            with contextlib.suppress(Exception):  # a call that needs the module tells why it is missing
                importlib.import_module(name)
        # The children that run and where their results go, by the end of a pipe whose other end is theirs
        # alone: it closes when they end.
        running: dict[int, tuple[int, int]] = {}
        while True:
            ready, _, _ = select.select([connection.fileno(), *running], [], [])
            for closed in running.keys() & set(ready):
                child, results = running.pop(closed)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                with contextlib.suppress(BrokenPipeError):  # nobody waits for the result any more
                    os.write(results, code.to_bytes(CODE_BYTES, "big", signed=True))
                os.close(results)
                os.close(closed)
            if connection.fileno() in ready:
                _, files, _, _ = socket.recv_fds(connection, 1, 2)
                if not files:
                    return
                server = os.getpid()
                end, own = os.pipe()
                if (child := os.fork()) == 0:
                    for other, (_, results) in running.items():  # a result ends when nobody holds its pipe
                        os.close(other)
                        os.close(results)
                    serve_fork(server, *files)
                os.close(files[0])
                os.close(own)
                running[end] = child, files[1]


def serve_fork(server: int, task: int, results: int) -> NoReturn:
    """Runs in a child of the process of ForkServer, whose number is `server`: computes one call."""
    die_with_parent()
    if os.getppid() != server:  # it was killed before that
        os._exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the result any more
        with open(task, "rb") as tasks, open(results, "wb") as pipe:
            answer_task(tasks, pipe)
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer_task(task: IO[bytes], results: IO[bytes]) -> None:
    """Computes the function that was written to the pipe `task`, and writes its result to `results`."""
    answer: tuple[Any, BaseException | None]
    try:
        function, args = pickle.load(task)
        answer = function(*args), None
    except KeyboardInterrupt:
        os._exit(130)  # the parent was interrupted too, and reports it
    except Exception as error:
        if os.environ.get("LCM_COMPILE_DEBUG") == "1":
            traceback.print_exc()
        answer = None, portable(error)
    pickle.dump(answer, results)


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
