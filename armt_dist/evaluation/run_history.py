"""What the report of a run needs of its metrics, read record by record: memory does not grow with the steps.

A curve of a million steps is kept as a few hundred means of neighbours, a stage as its ends and its last values.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

# Of a curve; it has at most twice as many.
POINTS = 200
# Steps at the end of a stage whose losses are averaged.
LAST = 10


class Point(NamedTuple):
    """Neighbouring values of a curve."""

    x: float  # of the last one
    total: float
    values: int


class Thinned:
    """A curve as points that stand for `size` values each; the size doubles whenever there would be too many points."""

    def __init__(self) -> None:
        self.size = 1
        self.points: list[Point] = []

    def add(self, x: float, y: float) -> None:
        """Add the next value."""
        if self.points and self.points[-1].values < self.size:
            _, total, count = self.points[-1]
            self.points[-1] = Point(x, total + y, count + 1)
            return
        if len(self.points) == 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [Point(b.x, a.total + b.total, a.values + b.values) for a, b in pairs]
            self.size *= 2
        self.points.append(Point(x, 0.0 + y, 1))

    @property
    def x(self) -> list[float]:
        """Where the points are."""
        return [point.x for point in self.points]

    @property
    def y(self) -> list[float]:
        """Means of the points' values."""
        return [point.total / point.values for point in self.points]


class StageHistory:
    """One stage of training: its first and last step, the losses of the last steps, and the last validation."""

    def __init__(self, first: int):
        self.first = self.last = first
        self.losses: deque[float] = deque(maxlen=LAST)
        self.validated: dict[str, Any] = {}

    @property
    def validation(self) -> dict[str, Any]:
        """The last validation, unless a rollback undid its step."""
        return self.validated if self.has(self.validated.get("step", self.first)) else {}

    def has(self, step: int) -> bool:
        """Tell whether a step is one of the stage's."""
        return self.first <= step <= self.last


class History:
    """All records of a run."""

    def __init__(self, records: Iterable[dict], drawn: Iterable[str]):
        """drawn: the metrics of which curves are kept. A record without what every step has raises KeyError."""
        self.last: dict[str, Any] = {}  # training record; empty without any
        self.seconds = 0.0
        self.validated: dict[str, Any] = {}  # the last validation; empty without any
        self.stages: dict[int, StageHistory] = {}
        self.training = {name: Thinned() for name in drawn}
        self.validation = {name: Thinned() for name in drawn}
        for record in records:
            if record["kind"] == "train":
                self.add_step(record)
            elif record["kind"] == "validation":
                self.add_validation(record)

    def add_step(self, record: dict[str, Any]) -> None:
        """Add a training step."""
        step, number = record["step"], record["stage"]
        stage = self.stages.setdefault(number, StageHistory(step))
        stage.last = step
        stage.losses.append(record["loss"] or 0.0)
        self.last = record
        self.seconds += record["step_s"]
        for name, curve in self.training.items():
            if name in record:
                curve.add(step, record[name] or 0.0)

    def add_validation(self, record: dict[str, Any]) -> None:
        """Add a validation."""
        step = record["step"]
        self.validated = record
        for stage in self.stages.values():
            if stage.has(step):
                stage.validated = record
        for name, curve in self.validation.items():
            if name in record:
                curve.add(step, float("nan") if record[name] is None else record[name])

    def by_stage(self) -> Iterator[tuple[int, StageHistory]]:
        """Yield the stages that have begun, in their order."""
        yield from sorted(self.stages.items())
