"""A picture's stages as CUDA graphs: the context, each step with its arithmetic, and the decoding.

A graph for each stage, not one for all: the host draws the noise of later steps while the GPU computes
earlier ones, and stages are timed and reported as they are without. A launch takes the host microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from lcm_compile.engines.cuda_graph import Capturer
from lcm_compile.engines.runner import Array
from lcm_compile.errors import BackendError
from lcm_compile.pipeline.loop import Arrays, Loop, Runners, conditions_of
from lcm_compile.scheduler import LcmStep

Kind = tuple[int, bool]  # steps, and whether a second pass guides
KINDS_KEPT = 8
USED, FIRST = "used", "not used: the first picture of its kind is drawn without"
SWITCHED_OFF = "not used: it is switched off"
CHECK_SCALE = 1.5
# Of the range of values of a picture: the most by which a graph's may differ from the same without graphs.
# Kernels that add in any order stay far under it, a wrong address far over it.
MOST_DIFFERENCE = 0.01


class CapturedLoop:
    """What Loop does, for one kind of picture: so many steps, guided by a second pass or not.

    All memory stays. Texts, scale and noise are copied in; all else a stage reads where the one before wrote
    it. BackendError or RuntimeError where it can't be captured, or then draws another picture than without.
    """

    def __init__(
        self,
        capturer: Capturer,
        runners: Runners,
        steps: Sequence[LcmStep],
        coefficients: Sequence[Arrays],
        times: Sequence[Array],
        texts: Sequence[Arrays],
    ) -> None:
        """`texts` are arrays of the texts' shapes, one or two, and become this object's."""
        step = runners["step"]
        shape = next(spec.shape for spec in step.contract.inputs if spec.name == "latent")
        noise = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
        self._texts = texts
        self._scale = step.to_device(np.asarray([CHECK_SCALE], np.float32))
        # Copies: on a processor an array may be in place already.
        self._latent, self._fresh = (step.to_device(array.copy()) for array in noise)
        # The context is called once: nothing overwrites its output memory while the steps read it there.
        keep = len(texts) * len(times) > 1
        last = len(steps) - 1

        def context() -> list[list[Arrays]]:
            return [conditions_of(runners, text, times, keep) for text in texts]

        def draw() -> Array:
            loop, latent = Loop(runners, steps, coefficients, context(), self._scale), self._latent
            for i in range(len(steps)):
                latent = loop.step(i, latent, None if i == last else self._fresh)
            return loop.decode(latent) + 0

        expected = runners["decode"].to_host(capturer.warm_up(draw))
        self._launch_context: Callable[[], None] = lambda: None
        if "context" in runners:
            self._launch_context, conditions = capturer.capture(context)
        else:
            conditions = context()
        # Held, with the timesteps: the graphs read their arrays at every launch.
        self._loop, self._times = Loop(runners, steps, coefficients, conditions, self._scale), times
        self._steps: list[tuple[Callable[[], None], Array]] = []
        latent = self._latent
        for i in range(len(steps)):
            fresh = None if i == last else self._fresh
            launch, latent = capturer.capture(partial(self._loop.step, i, latent, fresh))
            self._steps.append((launch, latent))
        self._launch_decode, self._picture = capturer.capture(partial(self._loop.decode, latent))
        self._check(noise, expected)

    def _check(self, noise: np.ndarray, expected: np.ndarray) -> None:
        """BackendError unless the graphs draw from `noise` what was drawn without, after something else."""
        runners, last = self._loop.runners, len(self._steps) - 1
        for arrays in (-noise, noise):
            latent, fresh = (runners["step"].to_device(array) for array in arrays)
            self.begin(self._texts, self._scale)
            for i in range(len(self._steps)):
                latent = self.step(i, latent, None if i == last else fresh)
            drawn = runners["decode"].to_host(self.decode(latent))
        difference = np.abs(drawn.astype(np.float32) - expected.astype(np.float32)).mean()
        if not difference <= MOST_DIFFERENCE * (255 if expected.dtype == np.uint8 else 1):
            raise BackendError("its CUDA graphs draw another picture than the engines do without them")

    def begin(self, texts: Sequence[Arrays], scale: Array) -> CapturedLoop:
        """This loop with other texts and scale, whose context is computed."""
        for own, given in zip(self._texts, texts, strict=True):
            for name, array in own.items():
                array.copy_(given[name])
        self._scale.copy_(scale)
        self._launch_context()
        return self

    def step(self, i: int, latent: Array, fresh: Array | None) -> Array:
        if i == 0:  # later ones read what the step before wrote
            self._latent.copy_(latent)
        if fresh is not None:
            self._fresh.copy_(fresh)
        launch, latent = self._steps[i]
        launch()
        return latent

    def decode(self, latent: Array) -> Array:
        """The picture; valid until the next one is drawn."""
        self._launch_decode()
        return self._picture


class CudaGraphs:
    """The captured loops of one pipeline, by kind of picture; or its engines' own CUDA graphs.

    A kind's first picture is drawn without: engines may still be loading, one picture is drawn sooner so, and
    a capture must find ready what libraries set up at their first calls.
    """

    def __init__(self, runners: Runners) -> None:
        self._runners = runners
        self._kinds: dict[Kind, CapturedLoop | None] = {}  # the one used last is the last
        self._capturer: Capturer | None = None
        self._failed = ""
        self._own = False

    def find(self, kind: Kind, make: Callable[[Capturer], CapturedLoop]) -> CapturedLoop | None:
        """The graphs of a kind of picture, captured by `make`; None where it is drawn without."""
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
            return make(self._capturer)
        except (BackendError, RuntimeError) as error:  # RuntimeError: torch's own, of CUDA's errors too
            self._failed = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return None

    def _cannot_capture(self) -> str:
        """Why not all stages of a loop can be captured, or nothing. Waits until they are loaded."""
        stages = (runner for name, runner in self._runners.items() if name != "encode")
        return next((reason for runner in stages if (reason := runner.cannot_capture())), "")

    def use_own(self, on: bool) -> None:
        """Whether engines that have CUDA graphs of their own use them from now on."""
        if on != self._own:
            self._own = on
            for runner in self._runners.values():
                runner.graph_itself(on)

    def told(self, loop: CapturedLoop | None) -> str:
        """Whether the picture that was drawn last was drawn with CUDA graphs, and else why not."""
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
        self._kinds.clear()
        self._capturer = None
