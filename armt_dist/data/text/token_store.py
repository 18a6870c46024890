"""The tokens of many texts in one memory-mapped file, which all ranks of a machine share in its page cache.

    tokens.bin     the tokens of all texts, end to end: uint16 or, for large vocabularies, uint32
    ends.bin       int64, where each text ends
    sums.bin       uint64, a checksum of every BLOCK tokens, compared when a block is first read
    manifest.json  counts, checksums of the other two, and what is known about the texts

Shapes: n tokens of all texts, k texts.
"""

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from ...config import ConfigError
from ...records import read_json, write_json

FORMAT = 1
TOKENS, ENDS, SUMS, MANIFEST = "tokens.bin", "ends.bin", "sums.bin", "manifest.json"
# Tokens under one checksum.
BLOCK = 2**16


class TokenWriter:
    """Writes a store into an empty folder, in constant memory but for 8 bytes a text."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder = folder
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.file = (folder / TOKENS).open("wb")
        self.buffer = np.empty(BLOCK, self.dtype)
        self.filled, self.tokens = 0, 0
        self.ends, self.sums = array("q"), array("Q")

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens [m] to the text that is being written."""
        self.tokens += len(tokens)
        while len(tokens):
            now = tokens[: BLOCK - self.filled]
            self.buffer[self.filled : self.filled + len(now)] = now
            self.filled, tokens = self.filled + len(now), tokens[len(now) :]
            if self.filled == BLOCK:
                self.write_block()

    def write_block(self) -> None:
        """Write what the buffer holds, and keep its checksum."""
        content = self.buffer[: self.filled].tobytes()
        self.file.write(content)
        self.sums.append(xxh3_64_intdigest(content))
        self.filled = 0

    def end_text(self) -> None:
        """End the text that is being written."""
        self.ends.append(self.tokens)

    def close(self, about: list[Any]) -> None:
        """Write the other files; about: what is known about the texts, as JSON has it."""
        if self.filled:
            self.write_block()
        self.file.close()
        ends, sums = np.array(self.ends, "<i8").tobytes(), np.array(self.sums, "<u8").tobytes()
        (self.folder / ENDS).write_bytes(ends)
        (self.folder / SUMS).write_bytes(sums)
        counts = {"tokens": self.tokens, "texts": len(self.ends), "dtype": self.dtype.str}
        checks = {"ends": xxh3_64_intdigest(ends), "sums": xxh3_64_intdigest(sums)}
        write_json(self.folder / MANIFEST, {"format": FORMAT, **counts, **checks, "about": about})


class TokenStore:
    """The tokens of texts, end to end, and where each text ends."""

    def __init__(self, tokens: np.ndarray, ends: np.ndarray, sums: np.ndarray | None = None, where: str = ""):
        """tokens: [n]; ends: int64 [k], ascending; sums: of each BLOCK tokens, to be compared; where: for messages."""
        self.tokens, self.ends, self.sums, self.where = tokens, ends, sums, where
        self.starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        self.unread = np.full(0 if sums is None else len(sums), True)
        self.about: list[Any] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, start: int, end: int) -> np.ndarray:
        """Return the tokens from `start` to `end` [end - start]. Raises ConfigError where the file is damaged."""
        if self.sums is not None:
            first = start // BLOCK
            for block in np.flatnonzero(self.unread[first : -(-end // BLOCK)]) + first:
                content = self.tokens[block * BLOCK : (block + 1) * BLOCK]
                if xxh3_64_intdigest(content.tobytes()) != self.sums[block]:
                    raise damaged(self.where, f"{TOKENS} is not what was written")
                self.unread[block] = False
        return self.tokens[start:end]

    def begins(self, start: int, end: int) -> np.ndarray:
        """Return the places from `start` to `end` where texts begin, ascending."""
        first, last = np.searchsorted(self.starts, [start, end])
        # A text without tokens begins where the next one does.
        begins = np.unique(self.starts[first:last])
        return begins[begins < len(self)]


def open_store(folder: Path, field: str = "data.text.cache") -> TokenStore:
    """Open a store that was written. Raises ConfigError where a file is missing or damaged, and OSError.

    field: what messages call the folder that it lies in.
    """
    where = f"{field}: {folder}"
    manifest = read_json(folder / MANIFEST)
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}")
        dtype, count = np.dtype(manifest["dtype"]), int(manifest["tokens"])
        read = {name: (folder / name).read_bytes() for name in (ENDS, SUMS)}
        if [xxh3_64_intdigest(content) for content in read.values()] != [manifest["ends"], manifest["sums"]]:
            raise ValueError(f"{ENDS} or {SUMS} is not what was written")
        size = (folder / TOKENS).stat().st_size
        if size != count * dtype.itemsize:
            raise ValueError(f"{TOKENS} has {size} bytes instead of {count * dtype.itemsize}")
        about = list(manifest["about"])
    except KeyError:
        raise damaged(where, f"{MANIFEST} is missing or damaged") from None
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise damaged(where, str(error)) from None
    # An empty file cannot be mapped.
    tokens = np.memmap(folder / TOKENS, dtype, "r") if count else np.empty(0, dtype)
    store = TokenStore(tokens, np.frombuffer(read[ENDS], "<i8"), np.frombuffer(read[SUMS], "<u8"), where)
    store.about = about
    return store


def damaged(where: str, why: str) -> ConfigError:
    """Return the error of a store that cannot be used."""
    return ConfigError(f"{where} is damaged ({why}); delete it, and the next start makes it anew")
