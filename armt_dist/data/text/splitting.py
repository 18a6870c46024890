"""Cut a long text into parts whose tokens, one after another, are those of the whole text.

A tokenizer looks at words, and few look further, so a part ends behind a word, where the tokens on both sides do not
depend on each other. Each border is tried with the characters around it. Where a tokenizer has no such place, as one
whose tokens span words, a part ends all the same: the tokens of a text are then, by definition, those of its parts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Characters of a part. A library holds 40 to 150 bytes for each while it tokenises.
PART = 2**15
# Characters around a border that are tokenised to try it, and how far from the end of a part it is looked for.
CONTEXT, REACH = 256, 4096
# Places that are tried before a border is set where none is right.
TRIES = 16
WORD_END = re.compile(r"\w(?=\s)")

EncodeAll = Callable[[Sequence[str]], list[np.ndarray]]


class Part(NamedTuple):
    """A part of a text behind some of the text before it, whose `skip` tokens belong to the part before."""

    text: str
    skip: int


def split_text(pieces: Iterable[str], encode: EncodeAll, part: int = PART) -> Iterator[Part]:
    """Yield the parts of a text that comes in pieces, at least one: `part` characters and a little more each."""
    context, skip, rest = "", 0, ""
    for piece in pieces:
        rest += piece
        while len(rest) >= part + REACH + CONTEXT:
            end, tokens = border(rest, encode, part)
            yield Part(context + rest[:end], skip)
            context, skip, rest = rest[max(0, end - CONTEXT) : end] if tokens else "", tokens, rest[end:]
    yield Part(context + rest, skip)


def border(text: str, encode: EncodeAll, part: int) -> tuple[int, int]:
    """Return where a part ends, and the number of tokens of the CONTEXT characters before; 0 if no place is right."""
    for end in candidates(text, part):
        before = text[max(0, end - CONTEXT) : end]
        alone, both = encode([before, before + text[end : end + CONTEXT]])
        if len(alone) < len(both) and np.array_equal(alone, both[: len(alone)]):
            return end, len(alone)
    return part, 0


def candidates(text: str, part: int) -> Iterator[int]:
    """Yield places where a part may end: behind words, then anywhere, for scripts without spaces."""
    for _, match in zip(range(TRIES), WORD_END.finditer(text, part, part + REACH), strict=False):
        yield match.end()
    yield from range(part, part + TRIES)
