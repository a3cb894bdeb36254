"""Signals: of one process, of several, and at awkward moments."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from sd_jax.training.preemption import Preemption

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize("signals", [[TERM], [INT], [TERM, TERM, TERM]])
def test_asked_once_or_often(signals, capfd):
    before = signal.getsignal(TERM), signal.getsignal(INT)
    with Preemption() as preemption:
        assert not preemption.reached(1)
        for number in signals:
            signal.raise_signal(number)
        assert preemption.reached(2) and preemption.reached(3)
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == before
    assert f"{signals[0].name}: the run saves after this step and ends" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(TERM), signal.getsignal(INT)
    with pytest.raises(KeyboardInterrupt), Preemption() as preemption:
        signal.raise_signal(INT)
        assert preemption.reached(1)
        signal.raise_signal(INT)
    assert (signal.getsignal(TERM), signal.getsignal(INT)) == before


def test_outside_the_main_thread_nothing_is_heard():
    said = []

    def work():
        with Preemption() as preemption:
            said.append(preemption.reached(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [False]


# Several processes: what each does, and the signal that it sends to itself, where it does

_WORKER = """
    import signal, sys, time, jax
    from sd_jax.training.preemption import Preemption
    port, process, first_step, when, number = *map(int, sys.argv[1:5]), sys.argv[5]
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    send = lambda: signal.raise_signal(signal.Signals[number]) if process == 1 else None
    with Preemption() as preemption:
        if when == 0:
            send()
            time.sleep(3)  # until all have heard: JAX looks for the signal once a second
        for step in range(first_step + 1, first_step + 2000):
            time.sleep(0.005 * (1 + process))  # they are not at the same step at the same time
            if step == when:
                send()
            if preemption.reached(step):
                print("STOPPED AT", step)
                break
"""


def stopped_at(first_step, when, number="SIGTERM"):
    """-> the step at which each of two processes stopped, the second one having had the signal at step `when`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(_WORKER), str(port)]
    workers = [
        subprocess.Popen(
            [*command, str(process), str(first_step), str(when), number],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(2)
    ]
    ended = [worker.communicate(timeout=100) for worker in workers]
    for worker, (out, errors) in zip(workers, ended, strict=True):
        assert worker.returncode == 0, errors[-3000:]
        assert "STOPPED AT" in out, "it was never told"
    return [int(out.split("STOPPED AT ")[1].split()[0]) for out, _ in ended]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_two_processes_stop_at_the_same_step(number):
    one, other = stopped_at(first_step=100, when=110, number=number)
    assert one == other >= 110


def test_a_signal_before_the_first_step_of_a_resumed_run():
    assert stopped_at(first_step=100, when=0) == [101, 101]
