"""Rows as stored samples: read, checked, tokenised and fitted once per machine, and counted."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...config import ConfigError
from ..sampling import Split, place
from ..sections import InstructionsConfig
from ..text.token_store import TokenWriter
from .encoding import RowEncoder, pieces, shorten
from .forms import FORMS, check_row, find_form
from .reading import Row

# Rows between two lines of progress.
PROGRESS_ROWS = 1000


class Counts(NamedTuple):
    """What became of the rows of a split."""

    form: str = ""
    rows: int = 0
    samples: int = 0
    cut: int = 0
    skipped: int = 0

    def describe(self, split: Split) -> str:
        """Return a line for people."""
        if not self.rows:
            return f"data.instructions, {split}: no rows"
        form = FORMS[self.form]
        changed = [f"{count:,} {what}" for what, count in (("cut", self.cut), ("skipped", self.skipped)) if count]
        long = f" (too long: {', '.join(changed)})" if changed else ""
        return (
            f"data.instructions, {split}: {self.rows:,} rows of {' + '.join(form.columns)}, {self.samples:,} samples"
            f"{long}; the loss counts {form.scored}"
        )


def held_out(row: Row, fraction: float) -> bool:
    """Return whether a row belongs to validation, by a hash of what it holds: equal rows always go together."""
    return fraction > 0 and place(json.dumps(row.values, sort_keys=True, default=str)) < fraction


def write_samples(
    folder: Path, rows: Iterator[Row], config: InstructionsConfig, encoder: RowEncoder, progress: Callable[[str], None]
) -> None:
    """Write the samples of rows into a store. Raises ConfigError for the first row that is not as it should be."""
    counts = Counts()
    writer = TokenWriter(folder, 2**32)
    with writer.file:
        for row in rows:
            counts = counts._replace(form=counts.form or find_form(row.values, row.where), rows=counts.rows + 1)
            check_row(row.values, counts.form, row.where)
            sample = encoder.encode(row.values, counts.form, row.where)
            counts = add(writer, fitted(sample, counts.form, config, row.where), counts, len(sample))
            if counts.rows % PROGRESS_ROWS == 0:
                progress(f"tokenising data.instructions: {counts.rows:,} rows so far")
        writer.close(list(counts))


def add(writer: TokenWriter, samples: list[np.ndarray], counts: Counts, tokens: int) -> Counts:
    """Write the samples of one row, which had `tokens`, and count them."""
    for sample in samples:
        writer.add(sample)
        writer.end_text()
    kept = sum(map(len, samples))
    return counts._replace(
        samples=counts.samples + len(samples),
        cut=counts.cut + (len(samples) == 1 and kept < tokens),
        skipped=counts.skipped + (not samples),
    )


def fitted(sample: np.ndarray, form: str, config: InstructionsConfig, where: str) -> list[np.ndarray]:
    """Return the samples of a row with at most `sequence_tokens` each, as `too_long` says; none: it is skipped.

    Raises ConfigError.
    """
    most = config.sequence_tokens
    if form == "text":
        return pieces(sample, most)
    if len(sample) > most and config.too_long == "error":
        raise ConfigError(
            f"{where}: {len(sample):,} tokens, more than sequence_tokens={most}; raise that, or set too_long to cut or "
            "skip"
        )
    if config.too_long == "cut":
        sample = shorten(sample, most)
    return [sample] if len(sample) <= most else []
