"""Early warning that associative retrieval is stuck on the key-blind plateau.

A model that does not find the queried key answers with any of the sample's values. Its accuracy is that of such a
guess, falls with the number of pairs, and stays there: for 200 to 800 steps with the recipes of launch/configs,
depending on the seed; indefinitely with the usual initialisation.
"""

from collections import defaultdict, deque
from statistics import fmean

# Steps judged together.
WINDOW = 120
# Lead over guessing, and gain between the two halves of the window, that count as learning.
MIN_LEAD, MIN_GAIN = 0.05, 0.03


class Plateau:
    """The accuracies of the latest steps of a stage, beside those of guessing one of the sample's values."""

    def __init__(self) -> None:
        self.recent: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)
        self.warned = False

    def add(self, pairs: int, accuracy: float, guessing: float) -> None:
        """Record a step's accuracy and that of guessing without the key. With one pair there is nothing to find."""
        if pairs > 1:
            self.recent.append((pairs, accuracy, guessing))

    def notice(self) -> str | None:
        """Return a warning once, when the model looks blind to the key."""
        if self.warned or len(self.recent) < WINDOW:
            return None
        # The lead over guessing is comparable between steps with different numbers of pairs.
        lead = [accuracy - guessing for _, accuracy, guessing in self.recent]
        before, now = fmean(lead[: WINDOW // 2]), fmean(lead[WINDOW // 2 :])
        if now > MIN_LEAD or now > before + MIN_GAIN:
            return None
        self.warned = True
        return (
            f"the model has looked blind to the key for {WINDOW} steps; its accuracy (and that of guessing one of the "
            f"sample's values) by number of pairs: {self.by_pairs()}; if it stays so for hundreds of steps, set "
            "model.init (linear_std about 1/sqrt(width)), use a larger batch, or try another train.seed"
        )

    def by_pairs(self) -> str:
        """Format the mean accuracies as ``2: 0.55 (0.54), 3: ...``."""
        found = defaultdict(list)
        for pairs, accuracy, guessing in self.recent:
            found[pairs].append((accuracy, guessing))
        means = {pairs: (fmean(a for a, _ in steps), fmean(g for _, g in steps)) for pairs, steps in found.items()}
        return ", ".join(f"{pairs}: {a:.2f} ({g:.2f})" for pairs, (a, g) in sorted(means.items()))
