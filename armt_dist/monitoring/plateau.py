"""Recognises early that associative retrieval is stuck on the key-blind plateau.

A model that does not find the asked key says one of the sample's values: its accuracy is that of such a guess, falls
with the number of pairs, and stays there: for 200 to 800 steps with the recipes of launch/configs, by seed; for as long
as one likes to wait with the usual initialisation.
"""

from collections import defaultdict, deque
from statistics import fmean

# Steps that are judged together, and how far above guessing, and above their own past, they must be.
OVER, ABOVE, BETTER = 120, 0.05, 0.03


class Plateau:
    """The accuracy of the latest steps of a stage beside that of guessing among the sample's values."""

    def __init__(self) -> None:
        self.recent: deque[tuple[int, float, float]] = deque(maxlen=OVER)
        self.told = False

    def add(self, pairs: int, accuracy: float, guessing: float) -> None:
        """One step's accuracy, and that of a guess without the key. One pair needs no key."""
        if pairs > 1:
            self.recent.append((pairs, accuracy, guessing))

    def notice(self) -> str | None:
        """One line, once, when the model looks blind to the key; else None."""
        if self.told or len(self.recent) < OVER:
            return None
        # Above guessing, whatever the numbers of pairs were.
        lead = [accuracy - guessing for _, accuracy, guessing in self.recent]
        before, now = fmean(lead[: OVER // 2]), fmean(lead[OVER // 2 :])
        if now > ABOVE or now > before + BETTER:
            return None
        self.told = True
        return (
            f"the last {OVER} steps look blind to the key: accuracy (and that of guessing one of the sample's values) "
            f"by pairs: {self.by_pairs()}; if hundreds of steps more do not help, set model.init "
            "(linear_std about 1/sqrt(width)), a larger batch, or another train.seed"
        )

    def by_pairs(self) -> str:
        """``2: 0.55 (0.54), 3: ...``"""
        found = defaultdict(list)
        for pairs, accuracy, guessing in self.recent:
            found[pairs].append((accuracy, guessing))
        means = {pairs: (fmean(a for a, _ in steps), fmean(g for _, g in steps)) for pairs, steps in found.items()}
        return ", ".join(f"{pairs}: {a:.2f} ({g:.2f})" for pairs, (a, g) in sorted(means.items()))
