"""Starts a run as several local processes, which talk over Gloo:

    start(command, num_processes, devices_each=1, env=None, stdout=PIPE, stderr=PIPE) -> list[Popen]
    finish(processes, timeout=300) -> list[(exit code, stdout, stderr)]

Each process finds its cluster in SD_JAX_COORDINATOR_ADDRESS, SD_JAX_NUM_PROCESSES and SD_JAX_PROCESS_ID, so the command
is the same for all: `doors.command("train.py", ...)`, or a script that calls `distributed.initialize()`.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence

from tests.training import doors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    command: Sequence[str],
    num_processes: int,
    devices_each: int = 1,
    env: Mapping[str, str] | None = None,  # on top of the environment of `doors.environment`
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
) -> list[subprocess.Popen]:
    """The processes 0 ... num_processes - 1 of one run. None is left behind if one cannot be started."""
    cluster = {
        "SD_JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "SD_JAX_NUM_PROCESSES": str(num_processes),
    }
    environment = {**doors.environment(devices_each), **(cluster if num_processes > 1 else {})}
    processes = []
    try:
        for process_id in range(num_processes):
            own = {"SD_JAX_PROCESS_ID": str(process_id)} if num_processes > 1 else {}
            processes.append(
                subprocess.Popen(
                    command,
                    env={**environment, **own, **(env or {})},
                    cwd=doors.ROOT,
                    stdout=stdout,
                    stderr=stderr,
                    text=True,
                )
            )
    except BaseException:
        stop(processes)
        raise
    return processes


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Waits for all of them: (exit code, stdout, stderr) of each. After `timeout` seconds they are killed, and
    subprocess.TimeoutExpired is raised."""
    end, results = time.monotonic() + timeout, []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            results.append((process.returncode, out or "", err or ""))
    finally:
        stop(processes)
    return results


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Kills what still runs; what it wrote and nobody has read is lost."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    for process in processes:
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
