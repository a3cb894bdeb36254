"""Steps without a finite loss and gradient: each is skipped; after too many in a row the run goes back."""

from typing import Literal

Verdict = Literal["go on", "roll back", "stop"]


class Nonfinite:
    """Counts the skipped steps of a run. The same in every process, as the loss is."""

    def __init__(
        self,
        max_skipped: int,  # in a row
        rollbacks: int,  # of a run, at most; then it stops
    ):
        self.max_skipped, self.rollbacks = max_skipped, rollbacks
        self.skipped = 0  # in a row, up to now
        self.rolled_back = 0  # so often

    def after(self, skipped: bool) -> Verdict:
        """Of every step, in their order. "roll back": to the newest checkpoint, the data going on where they are."""
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped < self.max_skipped:
            return "go on"
        if self.rolled_back == self.rollbacks:
            return "stop"
        self.skipped, self.rolled_back = 0, self.rolled_back + 1
        return "roll back"
