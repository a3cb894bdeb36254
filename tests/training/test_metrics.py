"""The journal: rows, going back, crashes, and who writes."""

import json
import logging

import jax
import numpy as np
import pytest

from sd_jax.training.metrics import Journal, read_rows


@pytest.fixture
def journal():
    journal = Journal()
    yield journal
    journal.close()


def steps(workdir):
    return [row["step"] for row in read_rows(workdir)]


def write(journal, first, last, loss=1.0):
    for step in range(first, last + 1):
        journal.step({"step": step, "loss": loss, "images_per_second": 3.0})


def test_rows_are_on_the_disk_at_once_and_exact(journal, tmp_path):
    journal.open(tmp_path / "run", 10)
    journal.rewind(0)
    row = {"step": 1, "loss": 0.1 + 0.2, "seconds_data": 1e-300}
    journal.step(row)
    assert read_rows(tmp_path / "run") == [row]  # nothing was closed or flushed


def test_going_back_within_a_run_and_at_its_start(journal, tmp_path):
    journal.open(tmp_path, 10)
    journal.rewind(0)
    write(journal, 1, 6)
    journal.rewind(4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    write(journal, 5, 7, loss=2.0)
    journal.close()
    assert [row["loss"] for row in read_rows(tmp_path)] == [1.0] * 4 + [2.0] * 3

    again = Journal()
    again.open(tmp_path, 10)
    again.rewind(5)
    write(again, 6, 6, loss=3.0)
    again.close()
    assert [row["loss"] for row in read_rows(tmp_path)] == [1.0] * 4 + [2.0, 3.0]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\x00" * 50], ids=["half", "zeros"])
def test_a_last_line_cut_off_by_a_crash(journal, tmp_path, torn):
    rows = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3))
    (tmp_path / "metrics.jsonl").write_text(rows + torn)
    assert steps(tmp_path) == [1, 2, 3]
    journal.open(tmp_path, 10)
    journal.rewind(3)
    write(journal, 4, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_the_log_has_what_the_package_said_before_it_was_open(journal, tmp_path):
    logging.getLogger("sd_jax.data").warning("left out a file")
    journal.open(tmp_path, 10)
    logging.getLogger("sd_jax.data").warning("left out another")
    journal.log("line")
    text = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in text] == ["left out a file", "left out another", "line"]


def test_one_process_alone_writes(journal, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    journal.log("early")
    journal.open(tmp_path / "run", 10)
    journal.rewind(0)
    write(journal, 1, 2)
    journal.log("late")
    journal.picture(2, "samples", np.zeros((2, 2, 3), np.uint8))
    journal.rewind(1)
    journal.close()
    assert not (tmp_path / "run").exists()
    assert not any(type(h).__name__ == "_ToJournal" for h in logging.getLogger("sd_jax").handlers)
