"""Tokenise texts into a store, part by part, in constant memory."""

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..tokenizers import Encoder, leading_tokens
from .cache import Progress
from .splitting import Part, split_text
from .token_store import TokenWriter

# Characters that are tokenised at once, on all cores.
BATCH = 2**19


class Tokeniser:
    """How a whole text becomes tokens: those before a text, its own, and eos if the tokenizer has one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, with_leading: bool):
        self.encoder = Encoder(tokenizer)
        self.leading = np.array(leading_tokens(tokenizer) if with_leading else [], dtype=np.int32)
        self.eos = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.int32)
        self.vocab_size = len(tokenizer)

    def identity(self) -> list[Any]:
        """Return what the tokens of a text depend on, as JSON has it."""
        return [self.encoder.identity(), version("tokenizers"), self.leading.tolist(), self.eos.tolist()]

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 tokens of a text in memory."""
        tokens = [ids[part.skip :] for part in split_text([text], self.encoder) for ids in self.encoder([part.text])]
        return np.concatenate([self.leading, *tokens, self.eos]).astype(np.int32)

    def write(self, folder: Path, texts: Iterable[Iterable[str]], about: list[Any], progress: Progress) -> None:
        """Write the tokens of texts, which come in pieces, into a store; `about` is complete when the last one is read.

        Raises OSError, and whatever reading the texts raises.
        """
        writer = TokenWriter(folder, self.vocab_size)
        with writer.file:
            for batch in batches(self.parts(texts)):
                encoded = self.encoder([task.part.text for task in batch])
                for task, ids in zip(batch, encoded, strict=True):
                    if task.first:
                        writer.add(self.leading)
                    writer.add(ids[task.part.skip :])
                    if task.last:
                        writer.add(self.eos)
                        writer.end_text()
                progress(f"tokenising the texts: {writer.tokens:,} tokens so far")
            writer.close(about)

    def parts(self, texts: Iterable[Iterable[str]]) -> Iterator["TextPart"]:
        """Yield the parts of all texts."""
        for text in texts:
            first, before = True, None
            for part in split_text(text, self.encoder):
                if before is not None:
                    yield TextPart(before, first, last=False)
                    first = False
                before = part
            if before is not None:
                yield TextPart(before, first, last=True)


class TextPart(NamedTuple):
    """A part of a text, and whether the text begins and ends with it."""

    part: Part
    first: bool
    last: bool


def batches(parts: Iterable[TextPart]) -> Iterator[list[TextPart]]:
    """Yield parts of about BATCH characters together."""
    batch, size = list[TextPart](), 0
    for part in parts:
        batch.append(part)
        size += len(part.part.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
