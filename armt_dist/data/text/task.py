"""Language modelling on long texts: local files or a data set, cut into sequences of `sequence_tokens`.

    input   T h e   k i n g <pad> <pad>
    label   h e   k i n g .   .     .        (`.` not scored; a sequence never crosses a text)
    mask    1 1 1 1 1 1 1 1   0     0

Shapes: b rows, N tokens of a sequence; with a curriculum, N = n * segment_tokens <= sequence_tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...config import ConfigError
from ..lengths import Measure, Unit, text_lengths
from ..sampling import Order, Split, row_words
from ..sections import DatasetConfig, TextConfig
from ..task import Batch, Difficulty, Run, excerpt, real_tokens
from ..tokenizers import decode, padding_id
from .cache import cached
from .dealing import reading
from .files import TextFacts, TextFile, find_files, read_texts, split_files
from .lanes import Lanes
from .pieces import Corpus, Samples, TextPiece, TokenizedText, collate, cut_text
from .stream import Stream, fingerprint, merge, open_texts
from .token_store import TokenStore
from .tokenising import Tokeniser

Sources = dict[Split, Samples | Stream | Lanes]
Texts = Callable[[], Iterable[Iterator[str]]]


class Text:
    """The task `text`; `n` counts segments. In training, a smaller n takes a random window of the piece."""

    measure: Measure = "perplexity"
    unit: Unit = "segments"

    def __init__(self, config: TextConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
        assert run.global_batch is not None, "task=text has finite samples: make_task needs global_batch"
        self.config, self.progress = config, run.progress
        self.seed, self.global_batch, self.carry_memory = run.seed, run.global_batch, run.carry_memory
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.pad = padding_id(tokenizer)
        self.sequence = config.sequence_tokens
        self.lengths = text_lengths(config, run.segment_tokens)
        self.segment_tokens = self.lengths.segment_tokens
        self.facts: dict[Split, list[TextFacts]] = {"train": [], "validation": []}
        self.tokeniser = Tokeniser(tokenizer, config.leading_tokens)
        self.sources = self.open_dataset(config.dataset) if config.dataset else self.open_files(config.files or [])

    def open_files(self, files: str | list[str]) -> Sources:
        """Open the tokens of the training files and, if there are any, of the validation files."""
        named = self.config.validation_files
        held_out = None if named is None else find_files(named, "validation_files")
        training, validation = split_files(find_files(files), held_out, self.config.validation_fraction)
        sources: Sources = {"train": self.training(self.read_files("train", training))}
        if validation:
            sources["validation"] = self.samples("validation", self.read_files("validation", validation))
        return sources

    def read_files(self, split: Split, files: list[TextFile]) -> TokenStore:
        """Return the tokens of files, and record what was read."""
        facts = list[TextFacts]()
        identity = [(str(file.path.absolute()), file.name, *file.stamp) for file in files]
        store = self.tokens(identity, lambda: read_texts(files, facts), facts)
        self.facts[split] = [TextFacts(*fact) for fact in store.about]
        return store

    def open_dataset(self, config: DatasetConfig) -> Sources:
        """Open the data set's training split and, if it is named, the validation split."""
        sources: Sources = {}
        if config.streaming:
            sources["train"] = Stream(
                config,
                self.tokeniser.encode,
                self.cut,
                self.global_batch,
                None if self.config.pack else self.sequence,
            )
        else:
            sources["train"] = self.training(self.read_split(config, config.split))
        if config.validation_split is not None:
            texts = self.read_split(config, config.validation_split, config.validation_texts)
            sources["validation"] = self.samples("validation", texts)
        return sources

    def read_split(self, config: DatasetConfig, split: str, most: int | None = None) -> TokenStore:
        """Return the tokens of a data set's split, or of its first `most` texts."""
        texts = open_texts(config, split)
        texts = texts if most is None else texts.take(most)
        rows = (iter([row[config.column]]) for row in reading(texts, config))
        return self.tokens([fingerprint(config), split, config.column, most], lambda: rows, [])

    def tokens(self, identity: list[Any], texts: Texts, about: list[Any]) -> TokenStore:
        """Return the tokens of the texts that `identity` stands for, tokenised now or before."""

        def make(folder: Path) -> None:
            """Tokenise them."""
            self.tokeniser.write(folder, texts(), about, self.progress)

        return cached(self.config.cache, [self.tokeniser.identity(), identity], make, self.progress)

    def training(self, texts: TokenStore) -> Samples | Lanes:
        """Return the training texts, to be read in pieces or on from step to step."""
        return Lanes(texts, self.seed, self.global_batch) if self.carry_memory else self.samples("train", texts)

    def samples(self, split: Split, texts: TokenStore) -> Samples:
        """Cut texts into pieces. Raises ConfigError if there is none."""
        corpus = Corpus(texts, self.sequence, self.config.pack, self.config.min_tokens)
        if not len(corpus):
            least = self.config.min_tokens
            raise ConfigError(f"text: the texts for {split} all have fewer than {least} tokens; give longer ones")
        return Samples(corpus, Order(len(corpus), self.seed, split, self.global_batch))

    def cut(self, texts: Iterable[TokenizedText]) -> Iterator[tuple[TokenizedText, int]]:
        """Cut texts as the configuration says; see `cut_text`."""
        return cut_text(texts, self.sequence, self.config.pack, self.config.min_tokens)

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
        return collate(windows, tokens, self.pad, apart and self.config.pack)

    def size(self, split: Split) -> int | None:
        """Return the number of pieces; None where there are none, as in a stream."""
        source = self.sources.get(split)
        if source is None:
            return 0
        return len(source.corpus) if isinstance(source, Samples) else None

    def text_of(self, number: int) -> int:
        """Return which validation text a sample is a part of; with `pack` nobody knows, and each is one of its own."""
        source = self.sources["validation"]
        assert isinstance(source, Samples), "only training reads a stream"
        return number if self.config.pack else source.corpus.text_of(number)

    def pads(self) -> bool:
        """Return whether a piece is shorter than the longest sequence; for a stream, whether one may be."""
        return any(
            not self.config.pack if isinstance(source, Stream) else source.corpus.padded
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
        """Return where the rows of this rank are in a stream."""
        return {name: source.state_dict() for name, source in self.sources.items() if isinstance(source, Stream)}

    def merge_states(self, states: list[dict]) -> dict:
        """Return the state from those of all ranks."""
        return {name: merge([state[name] for state in states]) for name in states[0]}

    def load_state_dict(self, state: dict) -> None:
        """Continue the streams at the positions of `state`."""
        for name, position in state.items():
            source = self.sources.get(name)
            if not isinstance(source, Stream):
                raise ConfigError(f"text: the checkpoint has the state of a stream for {name}, the run has none")
            source.load_state_dict(position)


def text_window(piece: TextPiece, tokens: int, word: int) -> TextPiece:
    """Cut `tokens` tokens out of a piece, at a start chosen by the random `word`; all of a shorter piece."""
    start = word % (max(0, len(piece.text.tokens) - tokens) + 1)
    return piece._replace(text=piece.text.part(start, start + tokens))
