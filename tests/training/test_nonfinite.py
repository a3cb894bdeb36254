"""When a run goes back, and when it stops."""

import pytest

from sd_jax.training.nonfinite import Nonfinite


@pytest.mark.parametrize(
    ("max_skipped", "rollbacks", "steps", "verdicts"),
    [
        (3, 1, "..x.xx.xx.", "----------"),  # never three in a row
        (3, 1, "xxx.xxx", "--r---s"),
        (3, 2, "xxxxxxxxx", "--r--r--s"),  # the count starts anew after a return
        (1, 0, ".x", "-s"),
        (2, 0, "x.xx", "---s"),
    ],
)
def test_verdicts(max_skipped, rollbacks, steps, verdicts):
    names = {"-": "go on", "r": "roll back", "s": "stop"}
    nonfinite = Nonfinite(max_skipped, rollbacks)
    assert [nonfinite.after(step == "x") for step in steps] == [names[v] for v in verdicts]
