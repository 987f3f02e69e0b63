"""Draws a picture with CUDA graphs: for the text encoders, the context, each step, and the decoding.

There is a graph for each stage rather than one for all. So the host can generate the noise of later steps
while the GPU computes earlier ones, and stages are timed and reported as they are without graphs. A launch
takes the host a few microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from lcm_compile.engines.capture import Capturer
from lcm_compile.engines.runner import Array, Runner
from lcm_compile.errors import BackendError
from lcm_compile.graphs import MASKED
from lcm_compile.pipeline.control import Control
from lcm_compile.pipeline.loop import NOTHING, Arrays, Loop, Runners, State, conditions_of
from lcm_compile.samplers.step import Step

# The steps, whether a second pass guides, the share of guidance rescale, and for each ControlNet whether
# it is run in each step.
Kind = tuple[tuple[Step, ...], bool, float, tuple[tuple[bool, ...], ...]]
KINDS_KEPT = 8  # kinds of pictures whose graphs are kept
# The status of a picture: whether it was drawn with CUDA graphs, and why not.
USED = "used"
FIRST = "not used: the first picture of its kind is drawn without"
SWITCHED_OFF = "not used: it is switched off"
CHECK_SCALE = 1.5  # guidance scale of the picture that checks the graphs
# The largest mean difference between the check's picture with graphs and without, as a fraction of the range
# of a pixel. Another order of sums changes a picture far less, and a read from a wrong address far more.
MOST_DIFFERENCE = 0.01


class CapturedLoop:
    """Does what Loop does, with CUDA graphs, for one kind of picture: its steps and passes are fixed.

    All arrays stay at their addresses. Texts, scale and noise are copied in, and a stage reads everything
    else where the stage before wrote it. Raises BackendError or RuntimeError if the loop can't be captured,
    or if its graphs draw another picture than the engines draw without graphs.
    """

    def __init__(
        self,
        capturer: Capturer,
        runners: Runners,
        steps: Sequence[Step],
        coefficients: Sequence[Arrays],
        times: Sequence[Array],
        texts: Sequence[Arrays],
        rescale: float = 0.0,
        loras: Arrays | None = None,
        control: Control | None = None,
    ) -> None:
        """Captures the loop. `texts` are one or two dicts of arrays that this object owns and overwrites.

        So are `loras` and the arrays of `control`.
        """
        step = runners["step"]
        shape = next(spec.shape for spec in step.contract.inputs if spec.name == "latent")
        noise = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
        self._texts = texts
        self._loras = loras or {}
        self._control = control
        self._scale = step.to_device(np.asarray([CHECK_SCALE], np.float32))
        # Copies, because to_device returns the same array on a processor.
        self._latent, self._fresh = (step.to_device(array.copy()) for array in noise)
        parts = {spec.name: spec.shape for spec in step.contract.inputs if spec.name == MASKED}
        self._masked = {name: step.to_device(np.zeros(shape, np.float32)) for name, shape in parts.items()}
        # Each call of the context overwrites the output of the one before. So it is copied if there are
        # several.
        keep = len(texts) * len(times) > 1
        fresh = [self._fresh if one.noise_scale else None for one in steps]

        def loop_of(conditions: list[list[Arrays]]) -> Loop:
            return Loop(runners, steps, coefficients, conditions, self._scale, rescale, self._loras, control)

        def context() -> list[list[Arrays]]:
            return [conditions_of(runners, text, times, keep) for text in texts]

        def draw() -> Array:
            loop, state = loop_of(context()), (self._latent, None)
            for i in range(len(steps)):
                state = loop.step(i, state, fresh[i], self._masked)
            return loop.decode(state[0]) + 0

        expected = runners["decode"].to_host(capturer.warm_up(draw))
        self._launch_context: Callable[[], None] = lambda: None
        if "context" in runners:
            self._launch_context, conditions = capturer.capture(context)
        else:
            conditions = context()
        # Both are kept, because the graphs read their arrays at every launch.
        self._loop, self._times = loop_of(conditions), times
        self._steps: list[tuple[Callable[[], None], State]] = []
        state: State = (self._latent, None)
        for i in range(len(steps)):
            launch, state = capturer.capture(partial(self._loop.step, i, state, fresh[i], self._masked))
            self._steps.append((launch, state))
        self._launch_decode, self._picture = capturer.capture(partial(self._loop.decode, state[0]))
        self._check(noise, expected)

    def _check(self, noise: np.ndarray, expected: np.ndarray) -> None:
        """Raises BackendError unless the graphs draw `expected` from `noise`, after another picture."""
        runners, steps = self._loop.runners, self._loop.steps
        for arrays in (-noise, noise):
            latent, fresh = (runners["step"].to_device(array) for array in arrays)
            self.begin(self._texts, self._scale, self._loras, self._control)
            state: State = (latent, None)
            for i, step in enumerate(steps):
                state = self.step(i, state, fresh if step.noise_scale else None)
            drawn = runners["decode"].to_host(self.decode(state[0]))
        difference = np.abs(drawn.astype(np.float32) - expected.astype(np.float32)).mean()
        if not difference <= MOST_DIFFERENCE * (255 if expected.dtype == np.uint8 else 1):
            raise BackendError("its CUDA graphs draw another picture than the engines do without them")

    def begin(
        self, texts: Sequence[Arrays], scale: Array, loras: Arrays, control: Control | None = None
    ) -> CapturedLoop:
        """Returns this loop after copying in what another picture reads, and computing its texts' context."""
        for own, given in zip((*self._texts, self._loras), (*texts, loras), strict=True):
            for name, array in own.items():
                array.copy_(given[name])
        self._scale.copy_(scale)
        if self._control and control:
            self._control.copy(control)
        self._launch_context()
        return self

    def step(self, i: int, state: State, fresh: Array | None, masked: Mapping[str, Array] = NOTHING) -> State:
        """Returns the state after step i; valid until step i is run again. See Loop.step."""
        if i == 0:  # later steps read what the step before wrote
            self._latent.copy_(state[0])
            for name in masked:
                self._masked[name].copy_(masked[name])
        if fresh is not None:
            self._fresh.copy_(fresh)
        launch, after = self._steps[i]
        launch()
        return after

    def keep(self, state: State, kept: tuple[Array, Array]) -> State:
        """Does what Loop.keep does, in place: the next graph reads the latent where it is."""
        import torch

        repainted, other = kept
        with torch.inference_mode():  # the engine's arrays may be changed in no other mode
            state[0].copy_(state[0] * repainted + other)
        return state

    def decode(self, latent: Array) -> Array:
        """Returns the picture; it is valid until the next one is drawn."""
        self._launch_decode()
        return self._picture


class CapturedStage:
    """Does what a runner does, by one CUDA graph. Each call returns new arrays.

    Raises BackendError or RuntimeError if the runner can't be captured, or if the graph computes something
    else than the runner does without it.
    """

    def __init__(self, capturer: Capturer, runner: Runner) -> None:
        zeros, ones = (
            {s.name: runner.to_device(np.full(s.shape, value, s.dtype)) for s in runner.contract.inputs}
            for value in (0, 1)
        )
        self._inputs = {name: array + 0 for name, array in zeros.items()}
        warm = capturer.warm_up(lambda: runner(self._inputs))
        expected = [np.array(runner.to_host(array)) for array in warm.values()]
        self._launch, self._outputs = capturer.capture(lambda: runner(self._inputs))
        for given in (ones, zeros):  # the first call overwrites what the outputs were
            outputs = self(given)
        for before, after in zip(expected, outputs.values(), strict=True):
            difference = np.abs(runner.to_host(after) - before).mean()
            if not difference <= MOST_DIFFERENCE * np.abs(before).mean():
                raise BackendError(f"the CUDA graph of {runner.contract.name} computes something else")

    def __call__(self, inputs: Arrays) -> Arrays:
        for name, own in self._inputs.items():
            own.copy_(inputs[name])
        self._launch()
        return {name: array + 0 for name, array in self._outputs.items()}


class CudaGraphs:
    """The captured loops of one pipeline, by kind of picture, or its engines' own CUDA graphs.

    The first picture of a kind is drawn without graphs: engines may still be loading, a single picture is
    faster this way, and the libraries must have done the setup of their first call before a capture.
    """

    def __init__(self, runners: Runners) -> None:
        self._runners = runners
        self._kinds: dict[Kind, CapturedLoop | None] = {}  # the last used one is at the end
        self._lock = threading.Lock()  # held while the kinds change: threads draw at once on a processor
        self._capturer: Capturer | None = None
        self._encode: CapturedStage | None = None
        self._failed = ""
        self._own = False

    def find(self, kind: Kind, make: Callable[[Capturer], CapturedLoop]) -> CapturedLoop | None:
        """Returns the captured loop for a kind of picture, or None if it is drawn without.

        For the first picture of a kind it returns None. At the second one it captures the loop with `make`.
        """
        with self._lock:
            first, loop = kind not in self._kinds, self._kinds.pop(kind, None)
            if not first and loop is None:
                if self._cannot_capture():
                    self.use_own(True)
                elif not self._failed:
                    loop = self._capture(make)
            self._kinds[kind] = loop
            while len(self._kinds) > KINDS_KEPT:
                del self._kinds[next(iter(self._kinds))]
            return loop

    def _capture(self, make: Callable[[Capturer], CapturedLoop]) -> CapturedLoop | None:
        try:
            self._capturer = self._capturer or Capturer()
            encode = self._runners["encode"]
            if self._encode is None and encode.cannot_capture() is None:
                self._encode = CapturedStage(self._capturer, encode)
            return make(self._capturer)
        except (BackendError, RuntimeError) as error:  # torch raises RuntimeError for CUDA's errors too
            self._failed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return None

    @property
    def encode(self) -> CapturedStage | None:
        """The captured text encoders, if pictures were drawn with graphs and they can be captured."""
        return self._encode

    def _cannot_capture(self) -> str:
        """Returns why a stage of the loop can't be captured, or "". It waits until the stages are loaded."""
        stages = (runner for name, runner in self._runners.items() if name != "encode")
        return next((reason for runner in stages if (reason := runner.cannot_capture())), "")

    def use_own(self, on: bool) -> None:
        """Switches the CUDA graphs of engines that have their own on or off."""
        if on != self._own:
            self._own = on
            for runner in self._runners.values():
                runner.graph_itself(on)

    def status(self, loop: CapturedLoop | None) -> str:
        """Returns "used" if the last picture was drawn with CUDA graphs, or says why it was not."""
        if loop is not None:
            return USED
        if self._failed:
            return f"not used: {self._failed}"
        if self._cannot_capture():
            own = (runner.graph_itself(self._own) for runner in self._runners.values())
            if reason := next(filter(None, own), ""):
                return f"not used: {reason}"
            if self._own:
                return USED
        return FIRST

    def close(self) -> None:
        """Frees all graphs and their memory."""
        self._kinds.clear()
        self._capturer = self._encode = None
