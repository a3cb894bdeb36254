"""When a run goes back, and when it stops."""

import pytest

from sd_jax.training.nonfinite import Nonfinite
from tests.training import doors


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


def test_a_run_that_has_lost_itself_goes_back_to_its_checkpoint_and_then_ends(tmp_path):
    """At such a rate the weights are finite at step 1, which is saved, and no loss is after it."""
    flags = ("--config.optimizer.learning_rate=1e30", "--config.checkpoint_steps=1", "--config.keep_checkpoints=9")
    limits = ("--config.max_skipped=2", "--config.rollbacks=1", "--config.total_steps=20")
    done = doors.run("train.py", *doors.TINY, *flags, *limits, f"--workdir={tmp_path}", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no finite loss in 2 steps" in done.stderr and "learning_rate" in done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert log.count("2 steps without a finite loss: back to step") == 1
    rows = doors.rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0]["skipped"] == 0 and rows[-1]["skipped"] == rows[-2]["skipped"] == 1
