"""What a server counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lcm_compile.serving.dispatcher import Picture

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The metrics of one server."""

    def __init__(
        self, waiting: Callable[[], float], drawing: Callable[[], float], ready: Callable[[], float]
    ):
        self.registry = CollectorRegistry()
        name = "lcm_compile"
        self._pictures = Counter(f"{name}_pictures", "Pictures drawn.", ["model"], registry=self.registry)
        self._calls = Counter(
            f"{name}_calls",
            "Calls of the engines, of one picture or a batch.",
            ["model"],
            registry=self.registry,
        )
        self._stage = Histogram(
            f"{name}_stage_seconds",
            "Seconds of a call in each stage; step is all of its steps.",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._queued = Histogram(
            f"{name}_queue_seconds", "Seconds that a picture waited.", buckets=SECONDS, registry=self.registry
        )
        self.requests = Counter(
            f"{name}_requests", "Answers by route and status.", ["route", "status"], registry=self.registry
        )
        self.errors = Counter(f"{name}_errors", "Errors by kind.", ["kind"], registry=self.registry)
        self.deaths = Counter(f"{name}_worker_deaths", "Workers that died.", registry=self.registry)
        for gauge, text, function in (
            ("queue_pictures", "Pictures that wait.", waiting),
            ("drawing_pictures", "Pictures that workers have.", drawing),
            ("workers_ready", "Workers that can draw.", ready),
        ):
            Gauge(f"{name}_{gauge}", text, registry=self.registry).set_function(function)

    def count(self, model: str, pictures: Sequence[Picture]) -> None:
        """Counts a call of a model's engines that drew these pictures."""
        self._calls.labels(model).inc()
        self._pictures.labels(model).inc(len(pictures))
        for picture in pictures:
            self._queued.observe(picture.waited)
        for stage, value in pictures[0].future.result()[1].items():
            if stage != "load":
                self._stage.labels(stage).observe((sum(value) if isinstance(value, list) else value) / 1000)

    def text(self) -> bytes:
        """Returns all of them in Prometheus' text format."""
        return generate_latest(self.registry)
