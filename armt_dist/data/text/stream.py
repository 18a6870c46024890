"""Text from the `datasets` library, read in order and resumed at the exact token."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ...config import ConfigError, one_line
from ..sections import DatasetConfig, HubDataset
from .dealing import Dealer, Dealt, Mark
from .pieces import NOTHING, TextPiece, TokenizedText

if TYPE_CHECKING:
    import datasets


# Characters of the first text from which the bytes of a token are known.
SAMPLE = 2**14
# Texts without a piece after which a row is given up.
FRUITLESS = 10_000

Encode = Callable[[str], np.ndarray]
Cut = Callable[[Iterable[TokenizedText]], Iterator[tuple[TokenizedText, int]]]


def open_texts(config: DatasetConfig, split: str) -> "datasets.IterableDataset":
    """Open the split as a stream. Raises ConfigError naming the missing data set, split or column."""
    # The import takes a second, which tasks without a data set should not pay.
    import datasets

    try:
        stream = datasets.load_dataset(
            config.name, config.config, data_files=config.data_files, split=split, streaming=True
        )
        first = next(iter(stream), None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error, limit=300)
        raise ConfigError(f"dataset.name={config.name} (split {split}): cannot be read: {reason}") from None
    if first is None:
        raise ConfigError(f"dataset.name={config.name}: split {split} is empty; choose another")
    if not isinstance(first.get(config.column), str):
        text = [name for name, value in first.items() if isinstance(value, str)]
        raise ConfigError(
            f"dataset.column={config.column}: no such text column; the text columns are: {', '.join(text) or 'none'}"
        )
    return stream


def fingerprint(config: HubDataset) -> str:
    """Return what changes with the content of the data set: its place in the cache of `datasets`."""
    import datasets

    return datasets.load_dataset_builder(config.name, config.config, data_files=config.data_files).cache_dir


class Lane:
    """What one row reads: its texts one after another, cut into pieces, of which each step takes one."""

    def __init__(self, step: int, number: int, offset: int):
        """step: that takes the next piece; number, offset: the text where it begins, and tokens of it already used."""
        self.step, self.number, self.offset = step, number, offset
        self.current = NOTHING
        self.waiting = deque[Dealt]()
        self.pieces: Iterator[tuple[TokenizedText, int]] = iter(())
        # The text read last, its tokens, and how many were read since the last piece.
        self.last, self.length, self.fruitless = number, 0, 0

    def texts(self, encode: Encode, read_on: Callable[["Lane"], None]) -> Iterator[TokenizedText]:
        """Yield the row's texts without end; read_on: called while none waits."""
        while True:
            while not self.waiting:
                read_on(self)
            self.last, text = self.waiting.popleft()
            tokens = encode(text)
            self.length, self.fruitless = len(tokens), self.fruitless + 1
            offset = self.offset if self.last == self.number else 0
            yield TokenizedText.of(tokens[offset:], whole=offset == 0)

    def advance(self) -> None:
        """Take the next piece."""
        self.current, unused = next(self.pieces)
        self.number, self.offset = (self.last, self.length - unused) if unused else (self.last + 1, 0)
        self.step, self.fruitless = self.step + 1, 0


class Stream:
    """Pieces of texts that are dealt to the G rows of a step: row i of step k is piece k of what row i reads.

    A rank reads on until its rows have what they need, and tokenises their texts alone; any number of ranks gives every
    row the same. Steps should come in order: a later one is reached by reading on, an earlier one by reading from the
    beginning. There is no shuffle buffer, because its content would be lost on resume. Shuffle the data set beforehand.
    """

    origin: dict  # the state that was loaded last
    next_step: int
    dealer: Dealer
    lanes: dict[int, Lane]  # by row
    marks: deque[Mark]  # from the last one before what the slowest row needs
    first_step: int | None  # the first that was asked for since then
    kept: dict[int, deque[Dealt]] | None  # texts of other rows, which may be asked for in the same step

    def __init__(self, config: DatasetConfig, encode: Encode, cut: Cut, global_batch: int, length: int | None) -> None:
        """length: tokens of a piece; None where texts are joined before they are cut."""
        self.config, self.encode, self.cut, self.global_batch = config, encode, cut, global_batch
        self.source = open_texts(config, config.split)
        self.piece_bytes = None if length is None else length * self.bytes_per_token()
        self.load_state_dict(self.start())

    def start(self) -> dict:
        """Return the state before the first step."""
        return self.state_at(Mark(0, 0, 0, None, np.zeros(self.global_batch, dtype=np.int64)), 0)

    def state_at(self, mark: Mark, next_step: int) -> dict:
        """Return the state in which every row goes on with the first text behind a mark."""
        places = {str(row): [mark.number, 0] for row in range(self.global_batch)}
        return {"next_step": next_step, "mark": mark.as_json(), "places": places}

    def bytes_per_token(self) -> float:
        """Return what the beginning of the first text tells, on every rank the same."""
        text = next(iter(self.source))[self.config.column][:SAMPLE]
        return max(1, len(text.encode())) / max(1, len(self.encode(text)))

    def load(self, sizes: np.ndarray) -> np.ndarray:
        """Return what a row gets with texts of `sizes` bytes [n]: bytes or, uncut, about as many pieces [n]."""
        return sizes + 1 if self.piece_bytes is None else np.ceil((sizes + 1) / self.piece_bytes).astype(np.int64)

    def take(self, step: int, rows: range) -> list[TextPiece]:
        """Return the pieces of some rows of a step. Raises ConfigError if the stream cannot be read."""
        assert rows.stop <= self.global_batch, f"rows={rows} of a global batch of {self.global_batch}"
        if self.first_step not in (None, step):
            self.kept = None
        if not all(self.reaches(step, row) for row in rows):
            later = self.origin["next_step"] <= step and all(str(row) in self.origin["places"] for row in rows)
            self.load_state_dict(self.origin if later else self.start())
        self.first_step = step if self.first_step is None else self.first_step
        for row in rows:
            lane = self.lanes.get(row) or self.add(row)
            while lane.step <= step:
                lane.advance()
        self.next_step = step + 1
        # What all rows have read is not needed to resume.
        number = min(lane.number for lane in self.lanes.values())
        while len(self.marks) > 1 and self.marks[1].number <= number:
            self.marks.popleft()
        return [TextPiece(step * self.global_batch + row, self.lanes[row].current) for row in rows]

    def reaches(self, step: int, row: int) -> bool:
        """Return whether a row's piece of a step is known, or is found by reading on."""
        lane = self.lanes.get(row)
        if lane is not None:
            return lane.step <= step + (lane.current is not NOTHING)
        return self.kept is not None and self.origin["next_step"] <= step and str(row) in self.origin["places"]

    def add(self, row: int) -> Lane:
        """Begin to read for a row."""
        assert self.kept is not None, f"row {row} is new, and its texts are gone"
        lane = Lane(self.origin["next_step"], *self.origin["places"][str(row)])
        lane.waiting.extend(dealt for dealt in self.kept.pop(row, ()) if dealt.number >= lane.number)
        lane.pieces = iter(self.cut(lane.texts(self.encode, self.read_on)))
        self.lanes[row] = lane
        return lane

    def read_on(self, lane: Lane) -> None:
        """Read the next block of texts, because `lane` has none left. Raises ConfigError if it never finds a piece."""
        size = self.dealer.size
        # Joined texts fill a piece at some time.
        if self.piece_bytes is not None and lane.fruitless >= min(size or FRUITLESS, FRUITLESS):
            raise ConfigError(
                f"dataset.column={self.config.column}: no text of text.min_tokens or more among {lane.fruitless:,} in "
                "a row; lower it"
            )
        self.marks.append(self.dealer.mark())
        for row, dealt in self.dealer.deal(self.lanes if self.kept is None else None):
            if row not in self.lanes:
                assert self.kept is not None, f"a text of row {row} was not asked for"
                self.kept.setdefault(row, deque()).append(dealt)
            elif dealt.number >= self.lanes[row].number:
                self.lanes[row].waiting.append(dealt)

    def state_dict(self) -> dict:
        """Return where the rows of this rank are; `merge` makes the state of the stream of those of all ranks."""
        if not self.lanes:
            return self.origin
        places = {str(row): [lane.number, lane.offset] for row, lane in self.lanes.items()}
        return {"next_step": self.next_step, "mark": self.marks[0].as_json(), "places": places}

    def load_state_dict(self, state: dict) -> None:
        """Continue where the rows of `state` are. Raises ConfigError for a state of an earlier version."""
        if "mark" not in state:
            raise ConfigError(
                "the checkpoint is of a version in which the rows of a stream read other texts; go on with that "
                "version, or start a new run"
            )
        mark = Mark.restored(state["mark"])
        if len(mark.loads) != self.global_batch:
            # Of another train_batch_size: nothing is left out, and little is read twice.
            mark = mark._replace(loads=np.zeros(self.global_batch, dtype=np.int64))
            state = self.state_at(mark, state["next_step"])
        self.origin, self.next_step = state, state["next_step"]
        self.marks, self.lanes = deque([mark]), {}
        self.dealer = Dealer(self.source, self.config, self.load, mark)
        self.first_step, self.kept = None, {}


def merge(states: list[dict]) -> dict:
    """Return the state of a stream from those of ranks that have different rows."""
    mark = min((state["mark"] for state in states), key=lambda mark: mark["number"])
    places = {row: place for state in states for row, place in state["places"].items()}
    return {"next_step": states[0]["next_step"], "mark": mark, "places": places}
