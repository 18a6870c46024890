"""Text from the `datasets` library, read in order and resumed at the exact token."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...config import ConfigError, one_line
from ..sections import DatasetConfig
from .pieces import TextPiece, TokenizedText

if TYPE_CHECKING:
    import datasets


Encode = Callable[[str], np.ndarray]
Cut = Callable[[Iterable[TokenizedText]], Iterator[tuple[TokenizedText, int]]]


class Position(NamedTuple):
    """A position in a stream: the state of the data set before a text, and the tokens of that text already used."""

    epoch: int
    texts: dict | None
    offset: int


START = {"next_step": 0, "position": Position(0, None, 0)._asdict()}


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


def fingerprint(config: DatasetConfig) -> str:
    """Return what changes with the content of the data set: its place in the cache of `datasets`."""
    import datasets

    return datasets.load_dataset_builder(config.name, config.config, data_files=config.data_files).cache_dir


def reading(texts: Iterable[dict], config: DatasetConfig) -> Iterator[dict]:
    """Yield the rows of a stream. Raises ConfigError if it can no longer be read: a missing file or a broken line."""
    import datasets

    try:
        yield from texts
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"dataset.name={config.name} (split {config.split}): reading failed: {one_line(error, limit=300)}; "
            "once it is readable again, the same command resumes from the last checkpoint"
        ) from None


class Stream:
    """Pieces of a stream in its order: row i of step k is piece k * global_batch + i, epoch after epoch.

    Every rank reads the whole stream and keeps its rows, so that a world of any size resumes at the same place.
    Steps should come in order: a later one is reached by reading on, an earlier one by reading from the beginning.
    There is no shuffle buffer, because its content would be lost on resume. Shuffle the data set beforehand.
    """

    position: Position
    reading: Position
    current: list[TokenizedText]
    pieces: Iterator[TokenizedText]

    def __init__(self, config: DatasetConfig, encode: Encode, cut: Cut, global_batch: int) -> None:
        self.config = config
        self.encode = encode
        self.cut = cut
        self.global_batch = global_batch
        self.source = open_texts(config, config.split)
        self.load_state_dict(START)

    def take(self, step: int, rows: range) -> list[TextPiece]:
        """Return the pieces of some rows of a step."""
        assert rows.stop <= self.global_batch, f"rows={rows} of a global batch of {self.global_batch}"
        if step < self.next_step and (step < self.next_step - 1 or not self.current):
            self.load_state_dict(START)
        while self.next_step <= step:
            self.current = [next(self.pieces) for _ in range(self.global_batch)]
            self.next_step += 1
        return [TextPiece(step * self.global_batch + row, self.current[row]) for row in rows]

    def read(self) -> Iterator[TokenizedText]:
        """Yield pieces without end from `self.position`, which is moved behind each piece before it is yielded."""
        while True:
            fresh = self.position.texts is None
            for piece, unused in self.cut(self.read_epoch()):
                self.position = self.reading._replace(offset=self.reading.offset - unused)
                fresh = False
                yield piece
            if fresh:
                raise ConfigError(
                    f"dataset.column={self.config.column}: no text of text.min_tokens or more in the split"
                )
            self.position = Position(self.position.epoch + 1, None, 0)

    def read_epoch(self) -> Iterator[TokenizedText]:
        """Yield each text from `self.position`; `self.reading` is the end of the text yielded last."""
        epoch, state, offset = self.position
        # A copy: a data set keeps the state that it once loaded.
        texts = copy.deepcopy(self.source)
        texts.set_epoch(epoch)
        if state is not None:
            texts.load_state_dict(state)
        for example in reading(texts, self.config):
            tokens = self.encode(example[self.config.column])
            self.reading = Position(epoch, state, len(tokens))
            yield TokenizedText.of(tokens[offset:], whole=offset == 0)
            state, offset = texts.state_dict(), 0

    def state_dict(self) -> dict:
        """Return the position of the next piece."""
        return {"next_step": self.next_step, "position": self.position._asdict()}

    def load_state_dict(self, state: dict) -> None:
        """Continue at the position of `state`."""
        self.next_step = state["next_step"]
        self.position = Position(**state["position"])
        self.current = []
        self.pieces = self.read()
