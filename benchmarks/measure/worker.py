"""A process that draws when it is asked to, and otherwise stands still.

Rivals are timed in turn, each in a process of its own. Between its turns a process is stopped (SIGSTOP):
threads that wait for more work by spinning would otherwise take the processor from whoever is measured.
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

from lcm_compile.errors import LcmCompileError
from lcm_compile.system.child_process import die_with_parent, ended, portable, python_command

ENDING = 5  # seconds that a process may take to end by itself


@dataclass(frozen=True)
class Drawn:
    """Pictures (n, height, width, 3), uint8, and milliseconds of those stages that could be timed apart.

    `cuda_graph` is what a bundle's pipeline tells of CUDA graphs.
    """

    pictures: np.ndarray
    stages: Mapping[str, float]
    cuda_graph: str = ""


# Prompt and seed to pictures.
Draw = Callable[[str, int], Drawn]


@dataclass(frozen=True)
class Maker:
    """`function(*args)` loads what draws, in the process that will draw; all of it is pickled."""

    function: Callable[..., Draw]
    args: tuple[Any, ...] = ()

    def __call__(self) -> Draw:
        return self.function(*self.args)


@dataclass(frozen=True)
class Sample:
    """One request. `start` is on the system's monotonic clock, in seconds: the same in every process."""

    start: float
    ms: float
    drawn: Drawn

    @property
    def end(self) -> float:
        return self.start + self.ms / 1000


def take_sample(draw: Draw, prompt: str, seed: int) -> Sample:
    start = time.perf_counter()
    drawn = draw(prompt, seed)
    return Sample(start, (time.perf_counter() - start) * 1000, drawn)


class Worker:
    """A context manager that owns the process. LcmCompileError where it could not load, or died."""

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
        """The most resident memory that the process ever had, loading included; None where /proc is not."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None

    def close(self) -> None:
        """Ends the process: by itself, so that engines remove what they unpacked, or else by force."""
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


def start_process(entry: str, write: int, threads: int) -> subprocess.Popen[bytes]:
    """`entry(write)` of this module in a new process that computes with so many threads."""
    loud = os.environ.get("LCM_COMPILE_DEBUG") == "1"
    return subprocess.Popen(
        python_command(__name__, entry, write),
        stdin=subprocess.PIPE,
        stdout=sys.stderr.fileno() if loud else subprocess.DEVNULL,  # stdout is for data
        stderr=None if loud else subprocess.DEVNULL,
        pass_fds=[write],
        start_new_session=True,  # an interrupt is the parent's to handle
        env=environment(threads),
    )


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def serve(answers: int) -> None:
    """The process of a Worker."""
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
    pickle.dump((answer, error), pipe)
    pipe.flush()


@dataclass(frozen=True)
class ColdStart:
    """Milliseconds from a process's start to its end, the picture saved; of loading; of the first picture.

    Loading is over when all is loaded, libraries with it, and the first picture is begun after that.
    """

    ms: float
    load_ms: float
    first_ms: float


def cold_start(maker: Maker, prompt: str, seed: int, path: Path, threads: int) -> ColdStart:
    """Loads and draws once in a process of its own, which saves a PNG and ends."""
    start = time.perf_counter()
    read, write = os.pipe()
    with start_process("draw_once", write, threads) as process:
        os.close(write)
        with open(read, "rb") as pipe:  # noqa: PTH123 - a pipe, not a path
            process.communicate(pickle.dumps((maker, prompt, seed, path)))
            answer = pipe.read()
    ms = (time.perf_counter() - start) * 1000
    if not answer:
        raise LcmCompileError(f"a process that draws one picture ended ({ended(process.returncode)})")
    told = json.loads(answer)
    return ColdStart(ms, told["load"], told["first"])


def draw_once(answers: int) -> None:
    """The process of cold_start."""
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
    """Milliseconds of `lcm-compile run` as a person starts it; it draws while engines still load."""
    start = time.perf_counter()
    command = ["run", prompt, "--engine", str(folder), "--seed", str(seed), "--out", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "lcm_compile", *command],
        capture_output=True,
        env=environment(threads),
    )
    ms = (time.perf_counter() - start) * 1000
    if done.returncode:
        raise LcmCompileError(f"lcm-compile run failed: {done.stderr.decode(errors='replace').strip()}")
    return ms
