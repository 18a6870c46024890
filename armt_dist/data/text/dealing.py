"""Which row reads which text of a stream: known from the lengths of the texts alone, so that a rank tokenises its own.

Texts come in the order of the data set, epoch after epoch, and each goes to the row that has got least so far. So rows
need the next texts at nearly the same time, and a rank holds few that wait for a slower row.

Shapes: G rows of a global batch.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
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
    heap: list[tuple[int, int]]  # what each of the G rows has got, and its number; a heap

    def as_json(self) -> dict:
        """Return the mark as JSON has it: by row, less what all rows have got."""
        least = self.heap[0][0]
        loads = [load - least for load, _ in sorted(self.heap, key=itemgetter(1))]
        return {"loads": loads, **{name: value for name, value in self._asdict().items() if name != "heap"}}

    @classmethod
    def restored(cls, saved: dict) -> "Mark":
        """Restore what `as_json` gave."""
        heap = sorted((load, row) for row, load in enumerate(saved["loads"]))
        return cls(saved["number"], saved["epoch"], saved["first"], saved["texts"], heap)


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
        self.heap = mark.heap.copy()
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
        return Mark(self.number, self.epoch, self.first, self.state, self.heap.copy())

    def deal(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Dealt]]:
        """Read the next block, and yield its texts for `wanted` rows, each with its row. Raises ConfigError."""
        from pyarrow import compute, large_string

        table = next(self.tables, None)
        while table is None:
            self.begin_epoch()
            table = next(self.tables, None)
        self.state = self.texts.state_dict()
        texts = table.column(self.config.column)
        # Where a file has no text at all, the column has no type either.
        texts = compute.fill_null(texts.cast(large_string()), "") if texts.null_count else texts
        rows = list[int]()
        for load in self.load(compute.binary_length(texts).to_numpy()).tolist():
            least, row = self.heap[0]
            heapq.heapreplace(self.heap, (least + load, row))
            rows.append(row)
        places = [place for place, row in enumerate(rows) if wanted(row)]
        number, self.number = self.number, self.number + len(rows)
        for place, text in zip(places, texts.take(np.array(places, dtype=np.int64)).to_pylist(), strict=True):
            yield rows[place], Dealt(number + place, text)

    def begin_epoch(self) -> None:
        """Begin the next epoch. Raises ConfigError if the last one had no text."""
        self.size = self.number - self.first
        if self.size == 0:
            raise ConfigError(f"dataset.name={self.config.name}: split {self.config.split} is empty; choose another")
        self.epoch, self.first = self.epoch + 1, self.number
        self.tables = self.open(None)


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
