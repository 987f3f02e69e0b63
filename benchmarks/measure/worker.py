"""A process that draws on request and is stopped between requests; and processes that draw once, cold.

Rivals are timed in turn, each in a process of its own. Between its turns a process is stopped with SIGSTOP,
because threads that wait for work by spinning would take the processor from the program that is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from lcm_compile.bundles.manifest import read_manifest
from lcm_compile.errors import LcmCompileError
from lcm_compile.pipeline.control_picture import sample_picture
from lcm_compile.system.child_process import die_with_parent, ended, portable, python_command

ENDING = 5  # seconds that a process has to end by itself before it is killed


@dataclass(frozen=True)
class Drawn:
    """What one request drew: `pictures`, uint8 of shape (batch, height, width, 3).

    `stages` holds the milliseconds of each stage that could be timed separately. `cuda_graph` says whether a
    bundle's pipeline used CUDA graphs, or why not.
    """

    pictures: np.ndarray
    stages: Mapping[str, float]
    cuda_graph: str = ""


# Draws from a prompt and a seed.
Draw = Callable[[str, int], Drawn]


@dataclass(frozen=True)
class Maker:
    """How to load a program that draws: `function(*args)`, called in the process that will draw.

    Both are pickled to get there.
    """

    function: Callable[..., Draw]
    args: tuple[Any, ...] = ()

    def __call__(self) -> Draw:
        return self.function(*self.args)


@dataclass(frozen=True)
class Sample:
    """One timed request. `start` is in seconds of the system's monotonic clock, the same in every process."""

    start: float
    ms: float
    drawn: Drawn

    @property
    def end(self) -> float:
        """When the request ended, in seconds of the same clock."""
        return self.start + self.ms / 1000


def take_sample(draw: Draw, prompt: str, seed: int) -> Sample:
    """Draws once, and returns the time with what was drawn."""
    start = time.perf_counter()
    drawn = draw(prompt, seed)
    return Sample(start, (time.perf_counter() - start) * 1000, drawn)


class Worker:
    """A process that loads a program and draws with it on request. A context manager, which ends the process.

    Raises the error with which loading or drawing failed, and LcmCompileError if the process died.
    """

    def __init__(self, name: str, maker: Maker, threads: int) -> None:
        self._name = name
        read, write = os.pipe()
        self._process = start_process("serve", write, threads)
        os.close(write)
        self._answers = open(read, "rb")  # noqa: PTH123, SIM115 - a pipe, and closed by close()
        try:
            self._ask(maker)
        except BaseException:
            self.close()
            raise

    def draw(self, prompt: str, seed: int) -> Sample:
        """Resumes the stopped process for one timed request."""
        os.kill(self._process.pid, signal.SIGCONT)
        sample = self._ask((prompt, seed))
        assert isinstance(sample, Sample)
        return sample

    def _ask(self, request: Any) -> Any:
        """Sends a request, waits for its answer, and stops the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        try:
            answer, error = pickle.load(self._answers)
        except EOFError:
            raise LcmCompileError(
                f"the process that measures {self._name} ended ({ended(self._process.wait())})",
                "LCM_COMPILE_DEBUG=1 shows what it printed",
            ) from None
        if error is not None:
            raise error
        os.kill(self._process.pid, signal.SIGSTOP)
        return answer

    def peak_memory(self) -> int | None:
        """Returns the peak resident memory in bytes, loading included; None on systems without /proc."""
        return peak_memory(self._process.pid)

    def close(self) -> None:
        """Lets the process end by itself, so that engines remove what they unpacked, or else kills it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peak_memory(process: int | str) -> int | None:
    """Returns a process's peak resident memory in bytes, or this one's of "self"; None without /proc."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def start_process(entry: str, write: int, threads: int) -> subprocess.Popen[bytes]:
    """Starts a process that calls `entry(write)` of this module and computes with this many threads.

    `entry` is the name of a function, and `write` the file descriptor of the pipe for its answers.
    """
    loud = os.environ.get("LCM_COMPILE_DEBUG") == "1"
    return subprocess.Popen(
        python_command(__name__, entry, write),
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno() if loud else subprocess.DEVNULL,  # stdout is for data
        stderr=None if loud else subprocess.DEVNULL,
        pass_fds=[write],
        start_new_session=True,  # Ctrl-C interrupts the parent alone, which ends this process
        env=environment(threads),
    )


def environment(threads: int) -> dict[str, str]:
    """Returns the environment variables of a process that computes with this many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def serve(answers: int) -> None:
    """Runs in a Worker's process: loads the Maker, then draws until the parent closes the pipe."""
    die_with_parent()
    with open(answers, "wb") as pipe:
        try:
            draw = pickle.load(sys.stdin.buffer)()
            reply(pipe, None)
            while True:
                reply(pipe, take_sample(draw, *pickle.load(sys.stdin.buffer)))
        except EOFError:
            return
        except Exception as error:
            reply(pipe, None, portable(error))


def reply(pipe: Any, answer: Any, error: Exception | None = None) -> None:
    """Sends an answer, or the error instead of one, to the parent."""
    pickle.dump((answer, error), pipe)
    pipe.flush()


@dataclass(frozen=True)
class ColdStart:
    """The milliseconds of a new process that draws one picture.

    `ms` is from the process's start to its end, with the picture saved. `load_ms` is loading, including
    libraries. `first_ms` is drawing the first picture, which starts when everything is loaded.
    """

    ms: float
    load_ms: float
    first_ms: float


def cold_start(maker: Maker, prompt: str, seed: int, path: Path, threads: int) -> ColdStart:
    """Times a new process that loads, draws once, saves a PNG to `path` and ends.

    Raises LcmCompileError if the process ended without an answer.
    """
    start = time.perf_counter()
    read, write = os.pipe()
    with start_process("draw_once", write, threads) as process:
        os.close(write)
        with open(read, "rb") as pipe:  # noqa: PTH123 - a pipe, not a path
            process.communicate(pickle.dumps((maker, prompt, seed, path)))
            answer = pipe.read()
    ms = (time.perf_counter() - start) * 1000
    if not answer:
        raise LcmCompileError(
            f"a process that draws one picture ended before it was done ({ended(process.returncode)})",
            "LCM_COMPILE_DEBUG=1 shows what it printed",
        )
    times = json.loads(answer)
    return ColdStart(ms, times["load"], times["first"])


def draw_once(answers: int) -> None:
    """Runs in the process of cold_start, and writes its times to `answers`."""
    from PIL import Image

    die_with_parent()
    maker, prompt, seed, path = pickle.load(sys.stdin.buffer)
    start = time.perf_counter()
    draw = maker()
    load_ms = (time.perf_counter() - start) * 1000
    sample = take_sample(draw, prompt, seed)
    Image.fromarray(sample.drawn.pictures[0]).save(path)
    os.write(answers, json.dumps({"load": load_ms, "first": sample.ms}).encode())


def cold_run(folder: Path, prompt: str, seed: int, path: Path, threads: int) -> float:
    """Times `lcm-compile run` in a new process, which draws while engines still load. Returns milliseconds.

    Raises LcmCompileError if the command fails.
    """
    command = ["run", prompt, "--engine", str(folder), "--seed", str(seed), "--out", str(path)]
    settings = read_manifest(folder)[0].pipeline
    if settings.control_weights:
        lines = path.with_name("lines.png")
        sample_picture(settings.shape).image.save(lines)
        command += ["--control", str(lines)] * len(settings.control_weights)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "lcm_compile", *command],
        capture_output=True,
        env=environment(threads),
    )
    ms = (time.perf_counter() - start) * 1000
    if done.returncode:
        raise LcmCompileError(f"lcm-compile run failed: {done.stderr.decode(errors='replace').strip()}")
    return ms
