"""Which row reads which text of a stream: known from the lengths of the texts alone, so that a rank tokenises its own.

Texts come in the order of the data set, epoch after epoch, and each goes to the row that has got least so far. So rows
need the next texts at nearly the same time, and a rank holds few that wait for a slower row.

Shapes: G rows of a global batch.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...config import ConfigError, one_line
from ..sections import DatasetConfig

if TYPE_CHECKING:
    import datasets

# Texts that are read at once.
BLOCK = 128


class Mark(NamedTuple):
    """A place between two texts of a stream, from which dealing can go on."""

    number: int  # of the next text, over all epochs
    epoch: int
    first: int  # number of the first text of the epoch
    texts: dict | None  # state of the data set; None at the beginning of an epoch
    loads: np.ndarray  # what each of the rows has got, [G] int64

    def as_json(self) -> dict:
        """Return the mark as JSON has it: by row, less what all rows have got."""
        return {**self._asdict(), "loads": (self.loads - self.loads.min()).tolist()}

    @classmethod
    def restored(cls, saved: dict) -> "Mark":
        """Restore what `as_json` gave."""
        loads = np.array(saved["loads"], dtype=np.int64)
        return cls(saved["number"], saved["epoch"], saved["first"], saved["texts"], loads)


class Dealt(NamedTuple):
    """A text that a row has got."""

    number: int
    text: str


class Dealer:
    """Deals the texts of a stream to rows."""

    def __init__(
        self, source: "datasets.IterableDataset", config: DatasetConfig, load: Callable[[Any], Any], mark: Mark
    ):
        """load: from the bytes of texts [n] to what a row gets with each [n]; mark: where to begin."""
        self.source, self.config, self.load = source, config, load
        self.number, self.epoch, self.first = mark.number, mark.epoch, mark.first
        # Texts of an epoch; None before the end of one.
        self.size: int | None = None
        self.loads = mark.loads.copy()
        self.tables = self.open(mark.texts)

    def open(self, state: dict | None) -> Iterator[Any]:
        """Begin to read at a state of the data set, or at the beginning of the epoch."""
        # A data set of its own, as one keeps the state that it once loaded. Not a deep copy: threads of the library may
        # still change what belongs to the last one.
        self.texts = self.source.select_columns(self.config.column).with_format("arrow")
        self.texts.set_epoch(self.epoch)
        if state is not None:
            self.texts.load_state_dict(state)
        self.state = state
        return iter(reading(self.texts.iter(batch_size=BLOCK), self.config))

    def mark(self) -> Mark:
        """Return where the next block begins."""
        return Mark(self.number, self.epoch, self.first, self.state, self.loads.copy())

    def deal(self, wanted: Iterable[int] | None) -> Iterator[tuple[int, Dealt]]:
        """Read the next block, and yield its texts for the rows `wanted` (None: all), with their rows.

        Raises ConfigError.
        """
        from pyarrow import compute, large_string

        table = next(self.tables, None)
        while table is None:
            self.begin_epoch()
            table = next(self.tables, None)
        self.state = self.texts.state_dict()
        texts = table.column(self.config.column)
        # Where a file has no text at all, the column has no type either.
        texts = compute.fill_null(texts.cast(large_string()), "") if texts.null_count else texts
        rows = least_loaded(self.loads, self.load(compute.binary_length(texts).to_numpy()))
        own = np.full(len(self.loads), wanted is None)
        own[list(wanted or ())] = True
        places = np.flatnonzero(own[rows])
        number, self.number = self.number, self.number + len(rows)
        # Most blocks have none for a rank of many.
        taken = texts.take(places).to_pylist() if len(places) else []
        for place, text in zip(places.tolist(), taken, strict=True):
            yield int(rows[place]), Dealt(number + place, text)

    def begin_epoch(self) -> None:
        """Begin the next epoch. Raises ConfigError if the last one had no text."""
        self.size = self.number - self.first
        if self.size == 0:
            raise ConfigError(f"dataset.name={self.config.name}: split {self.config.split} is empty; choose another")
        self.epoch, self.first = self.epoch + 1, self.number
        self.tables = self.open(None)


def least_loaded(loads: np.ndarray, added: np.ndarray) -> np.ndarray:
    """Give each of n texts to the row that has got least so far, the first of equal ones, and add up its load.

    loads [G] int64, changed; added: what a row gets with each text, [n], above 0. Returns the rows [n].
    """
    count = len(added)
    if 0 < count <= len(loads):
        # All at once, if no row that has got one of these texts would get a later one of them too.
        rows = np.argsort(loads, kind="stable")[:count]
        after, last = loads[rows] + added, (loads[rows[-1]], rows[-1])
        if np.all((after > last[0]) | ((after == last[0]) & (rows > last[1]))):
            loads[rows] = after
            return rows
    heap = [(load, row) for row, load in enumerate(loads.tolist())]
    heapq.heapify(heap)
    rows = np.empty(count, dtype=np.int64)
    for place, load in enumerate(added.tolist()):
        least, row = heap[0]
        heapq.heapreplace(heap, (least + load, row))
        rows[place], loads[row] = row, least + load
    return rows


def reading(texts: Iterable[Any], config: DatasetConfig) -> Iterator[Any]:
    """Yield the rows of a stream. Raises ConfigError if it can no longer be read: a missing file or a broken line."""
    import datasets

    try:
        yield from texts
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"dataset.name={config.name} (split {config.split}): reading failed: {one_line(error, limit=300)}; "
            "once it is readable again, the same command resumes from the last checkpoint"
        ) from None
