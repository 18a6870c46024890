"""Language modelling on long texts: local files or a data set, cut into sequences of `sequence_tokens`.

    input   T h e   k i n g <pad> <pad>
    label   h e   k i n g .   .     .        (`.` not scored; a sequence never crosses a text)
    mask    1 1 1 1 1 1 1 1   0     0

Shapes: b rows, N tokens of a sequence; with a curriculum, N = n * segment_tokens <= sequence_tokens.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...config import ConfigError
from ..lengths import Measure, Unit, text_lengths
from ..sampling import Order, Split, row_words
from ..sections import DatasetConfig, TextConfig
from ..task import Batch, Difficulty, Run, excerpt, real_tokens
from ..tokenizers import decode, encode, leading_tokens, padding_id
from .files import TextFacts, TextFile, facts_of, find_files, read_text, split_files
from .lanes import Lanes
from .pieces import Corpus, TextPiece, TokenizedText, collate, cut_text
from .stream import Stream, open_texts

Sources = dict[Split, Corpus | Stream | Lanes]


class Text:
    """The task `text`; `n` counts segments. In training, a smaller n takes a random window of the piece."""

    measure: Measure = "perplexity"
    unit: Unit = "segments"

    def __init__(self, config: TextConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
        assert run.global_batch is not None, "task=text has finite samples: make_task needs global_batch"
        self.config = config
        self.seed, self.global_batch, self.carry_memory = run.seed, run.global_batch, run.carry_memory
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.sequence = config.sequence_tokens
        self.lengths = text_lengths(config, run.segment_tokens)
        self.segment_tokens = self.lengths.segment_tokens
        self.facts: dict[Split, list[TextFacts]] = {"train": [], "validation": []}
        self.prefix = leading_tokens(tokenizer) if config.leading_tokens else []
        self.sources = self.open_dataset(config.dataset) if config.dataset else self.open_files(config.files or [])

    def open_files(self, files: str | list[str]) -> Sources:
        """Read and tokenise the training files and, if there are any, the validation files."""
        named = self.config.validation_files
        held_out = None if named is None else find_files(named, "validation_files")
        training, validation = split_files(find_files(files), held_out, self.config.validation_fraction)
        sources: Sources = {"train": self.training(self.read("train", training))}
        if validation:
            sources["validation"] = self.corpus("validation", self.read("validation", validation))
        return sources

    def read(self, split: Split, files: Iterable[TextFile]) -> Iterator[str]:
        """Yield the text of each file, and record what was read."""
        for file in files:
            text = read_text(file.path)
            self.facts[split].append(facts_of(file.name, text))
            yield text

    def open_dataset(self, config: DatasetConfig) -> Sources:
        """Open the data set's training split and, if it is named, the validation split."""
        sources: Sources = {}
        if config.streaming:
            sources["train"] = Stream(config, self.encode_text, self.cut, self.global_batch)
        else:
            texts = open_texts(config, config.split)
            sources["train"] = self.training(row[config.column] for row in texts)
        if config.validation_split is not None:
            texts = open_texts(config, config.validation_split).take(config.validation_texts)
            sources["validation"] = self.corpus("validation", (row[config.column] for row in texts))
        return sources

    def training(self, texts: Iterable[str]) -> Corpus | Lanes:
        """Tokenise the training texts, to be read in pieces or on from step to step."""
        if not self.carry_memory:
            return self.corpus("train", texts)
        return Lanes([self.encode_text(text) for text in texts], self.seed, self.global_batch)

    def corpus(self, split: Split, texts: Iterable[str]) -> Corpus:
        """Tokenise texts and cut them into pieces. Raises ConfigError if there is none."""
        pieces = [piece for piece, _ in self.cut(TokenizedText.of(self.encode_text(text)) for text in texts)]
        if not pieces:
            least = self.config.min_tokens
            raise ConfigError(f"text: the texts for {split} all have fewer than {least} tokens; give longer ones")
        return Corpus(pieces, Order(len(pieces), self.seed, split, self.global_batch))

    def cut(self, texts: Iterable[TokenizedText]) -> Iterator[tuple[TokenizedText, int]]:
        """Cut texts as the configuration says; see `cut_text`."""
        return cut_text(texts, self.sequence, self.config.pack, self.config.min_tokens)

    def encode_text(self, text: str) -> np.ndarray:
        """Return the int32 tokens of a whole text, with eos at the end if the tokenizer has one."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        return np.concatenate([self.prefix, encode(self.tokenizer, text), end]).astype(np.int32)

    def sequence_tokens(self, n: int) -> int:
        """Return the tokens N of `n` segments. Raises ConfigError if they exceed `sequence_tokens`."""
        return self.lengths.sequence_tokens(n)

    def batch(self, split: Split, step: int, rows: range, difficulty: Difficulty) -> Batch:
        """Return `rows` of the global batch of `step`."""
        if split not in self.sources:
            raise ConfigError(
                "text: there is no validation data; set text.validation_fraction, text.validation_files or "
                "text.dataset.validation_split"
            )
        tokens = self.sequence_tokens(difficulty.draw(self.seed, split, step))
        source, apart = self.sources[split], not self.config.cross_documents
        if isinstance(source, Lanes):
            return source.batch(step, rows, tokens, apart)
        pieces = source.take(step, rows)
        words = row_words(self.seed, split, step, rows, 1)[:, 0] if split == "train" else [0] * len(rows)
        windows = [text_window(piece, tokens, int(word)) for piece, word in zip(pieces, words, strict=True)]
        return collate(windows, tokens, padding_id(self.tokenizer), apart and self.config.pack)

    def size(self, split: Split) -> int | None:
        """Return the number of pieces; None where there are none, as in a stream."""
        source = self.sources.get(split)
        if source is None:
            return 0
        return len(source.pieces) if isinstance(source, Corpus) else None

    def pads(self) -> bool:
        """Return whether a piece is shorter than the longest sequence; for a stream, whether one may be."""
        return any(
            not self.config.pack
            if isinstance(source, Stream)
            else min(len(piece.tokens) for piece in source.pieces) < self.sequence
            for source in self.sources.values()
            if not isinstance(source, Lanes)
        )

    def texts(self) -> dict[Split, list[TextFacts]]:
        """Return name, size and hash of the text files that were read."""
        return self.facts

    def show(self, batch: Batch, row: int = 0) -> str:
        """Return the beginning and the end of one sample as text."""
        return excerpt(decode(self.tokenizer, real_tokens(batch, row)))

    def state_dict(self) -> dict:
        """Return the positions of the streams."""
        return {name: source.state_dict() for name, source in self.sources.items() if isinstance(source, Stream)}

    def load_state_dict(self, state: dict) -> None:
        """Continue the streams at the positions of `state`."""
        for name, position in state.items():
            source = self.sources.get(name)
            if not isinstance(source, Stream):
                raise ConfigError(f"text: the checkpoint has the position of a stream for {name}, the run has none")
            source.load_state_dict(position)


def text_window(piece: TextPiece, tokens: int, word: int) -> TextPiece:
    """Cut `tokens` tokens out of a piece, at a start chosen by the random `word`; all of a shorter piece."""
    start = word % (max(0, len(piece.text.tokens) - tokens) + 1)
    return piece._replace(text=piece.text.part(start, start + tokens))
