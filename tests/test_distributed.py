"""Who a process is, by what its launcher tells; and what is said when the others do not come, or are gone."""

import os
import signal
import sys
import time

import pytest

from sd_jax import distributed
from sd_jax.data import DataError
from sd_jax.distributed import cluster_of
from tests.training import processes

SD_JAX = {
    "SD_JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "SD_JAX_NUM_PROCESSES": "4",
    "SD_JAX_PROCESS_ID": "3",
    "SD_JAX_LOCAL_DEVICE_IDS": "0,1",
}
XPK = {"JAX_COORDINATOR_ADDRESS": "head", "JAX_COORDINATOR_PORT": "6002", "NNODES": "2", "NODE_RANK": "1"}
XPK_CPU = {
    "JAX_COORDINATOR_ADDRESS": "head:1234",
    "JAX_PROCESS_COUNT": "8",
    "PROCESSES_IN_JOB": "4",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "2",
}
SKYPILOT = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6\n", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
SLURM_8 = {**SLURM, "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
TPU = {"TPU_ML_PLATFORM": "JAX"}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
FLAGS = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({}, {}, None),
        (SD_JAX, {}, ("flags or SD_JAX_*", "10.0.0.1:1234", 4, 3, (0, 1))),
        (SD_JAX, {"process_id": 0, "local_device_ids": ["2"]}, ("flags or SD_JAX_*", "10.0.0.1:1234", 4, 0, (2,))),
        ({**SD_JAX, **XPK, **SLURM}, {"num_processes": 1}, None),  # asked for by hand
        (XPK, {}, ("XPK", "head:6002", 2, 1, None)),
        ({**XPK, "NNODES": "1", "NODE_RANK": "0"}, {}, None),
        (XPK_CPU, {}, ("XPK", "head:1234", 8, 6, None)),
        (SKYPILOT, {}, ("SkyPilot", f"10.0.0.5:{distributed.PORT}", 2, 1, None)),
        ({**SKYPILOT, "SKYPILOT_NUM_NODES": "1"}, {}, None),
        # Slurm's GPUs: all of the node for its one task; one for each of eight; a share; those bound to a task
        (SLURM, {}, ("Slurm", None, None, None, tuple(range(8)))),
        (SLURM_8, {}, ("Slurm", None, None, None, (5,))),
        ({**SLURM_8, "SLURM_STEP_TASKS_PER_NODE": "1,4(x2)", "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}, {},
         ("Slurm", None, None, None, (2, 3))),
        ({**SLURM_8, "CUDA_VISIBLE_DEVICES": "0"}, {}, ("Slurm", None, None, None, (0,))),
        ({**SLURM_8, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "0,1"}, {},
         ("Slurm", None, None, None, (0, 1))),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": ""}, {}, ("Slurm", None, None, None, None)),  # a task without GPUs
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "3"}, {}, ("Slurm", None, None, None, None)),  # JAX reads it
        (SLURM, {"local_device_ids": ["0"]}, ("Slurm", None, None, None, (0,))),
        ({**SLURM, "SLURM_NTASKS": "1"}, {}, None),
        (TPU, {}, ("Cloud TPU", None, None, None, None)),  # the metadata server knows how many workers there are
        ({**TPU, "TPU_SKIP_MDS_QUERY": "1"}, {}, None),  # a notebook's TPU
        ({**TPU, "TPU_WORKER_HOSTNAMES": "a,b", **KUBERNETES}, {}, ("Cloud TPU", None, None, None, None)),
        ({**TPU, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, ("Cloud TPU", None, None, None, None)),
        ({**TPU, "TPU_WORKER_HOSTNAMES": "localhost"}, {}, None),
        ({**TPU, "JAX_PLATFORMS": "cpu"}, {}, None),
        (KUBERNETES, {}, ("Kubernetes", None, None, None, None)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, {}, None),  # a pod that is of no indexed job
        (OMPI, {}, ("Open MPI", None, None, None, None)),
        ({**OMPI, "CUDA_VISIBLE_DEVICES": "0,1"}, {}, ("Open MPI", None, None, None, (1,))),
        # Who comes first
        ({**SD_JAX, **XPK}, FLAGS, ("flags or SD_JAX_*", "a:1", 2, 0, (0, 1))),
        ({**SD_JAX, **XPK, **SKYPILOT, **SLURM}, {}, ("flags or SD_JAX_*", "10.0.0.1:1234", 4, 3, (0, 1))),
        ({**XPK, **SKYPILOT, **SLURM}, {}, ("XPK", "head:6002", 2, 1, None)),
        ({**SKYPILOT, **SLURM, **KUBERNETES}, {}, ("SkyPilot", f"10.0.0.5:{distributed.PORT}", 2, 1, None)),
    ],
)  # fmt: skip
def test_who_a_process_is(environ, flags, expected):
    found = cluster_of(environ, **flags)
    assert found == (None if expected is None else distributed.Cluster(*expected))


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "flags", "said"),
    [
        ({}, {"process_id": 0}, r"--coordinator_address \(SD_JAX_COORDINATOR_ADDRESS\) is missing beside --process_id"),
        ({}, without(FLAGS, "num_processes"), r"--num_processes \(SD_JAX_NUM_PROCESSES\) is missing"),
        (without(SD_JAX, "SD_JAX_PROCESS_ID"), {}, r"--process_id \(SD_JAX_PROCESS_ID\) is missing"),
        ({}, {**FLAGS, "process_id": 2}, "process id 2 of 2 processes .*: they count from 0"),
        ({}, {**FLAGS, "coordinator_address": "a"}, "'a' .* has no port: write HOST:PORT"),
        ({**SD_JAX, "SD_JAX_NUM_PROCESSES": "four"}, {}, r"--num_processes \(SD_JAX_NUM_PROCESSES\) is 'four': it tak"),
        ({}, {**FLAGS, "local_device_ids": ["x"]}, "--local_device_ids .* is 'x': it takes a whole number"),
        (without(XPK, "NODE_RANK"), {}, "NODE_RANK is missing"),
        (without(XPK, "NNODES"), {}, "NNODES is missing"),
        (without(XPK_CPU, "JOB_INDEX"), {}, "JOB_INDEX is missing"),
        (without(SKYPILOT, "SKYPILOT_NODE_RANK"), {}, "SKYPILOT_NODE_RANK is missing"),
        # Never N runs where one was meant
        (without(XPK, "JAX_COORDINATOR_ADDRESS"), {}, "NNODES=2, but nothing says where the first process is"),
        (without(XPK, "NNODES", "NODE_RANK"), {}, "JAX_COORDINATOR_ADDRESS is set, but NNODES and NODE_RANK are miss"),
        (without(OMPI, "OMPI_MCA_orte_hnp_uri"), {}, "OMPI_COMM_WORLD_SIZE=2, but nothing says where the first"),
        (without(SLURM, "SLURM_STEP_NODELIST"), {}, "SLURM_NTASKS=2, but this is not one of them: start it by srun"),
        ({**SLURM_8, "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}, {}, "3 tasks on a node cannot share 8 GPUs evenly"),
    ],
)
def test_what_is_half_told_is_an_error(environ, flags, said):
    with pytest.raises(ValueError, match=said):
        cluster_of(environ, **flags)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("UNKNOWN: Gloo all-reduce failed: pair.cc:538 Read error [127.0.0.1]: Connection reset"), True),
        (RuntimeError("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"), False),
        (ValueError("UNKNOWN: Gloo all-reduce failed: pair.cc:538 Connection reset by peer"), True),
        (ConnectionResetError("Connection reset by peer"), False),  # of a download
        (DataError("data.path='gloo' holds no records"), False),
    ],
)
def test_which_errors_mean_that_another_process_is_gone(error, lost):
    told = distributed.lost_peer(error)
    assert (told is not None) == lost
    assert not lost or ("the same command" in told and "\n" not in told)


# --- Processes of their own -------------------------------------------------------------------------------------------

JOB = """
import sys, time
from sd_jax import distributed
distributed.initialize(timeout_seconds=int(sys.argv[1]))
import jax, jax.numpy as jnp, numpy as np
from sd_jax import sharding
try:
    mesh = sharding.make_mesh({"data": -1})
    x = sharding.place_batch({"x": np.full((2,), 1.0 + jax.process_index(), np.float32)}, mesh)["x"]
    total = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))
    for i in range(int(sys.argv[2])):
        value = float(total(x))
        if i == 3:
            distributed.barrier("all have begun")
            # One write, on a line of its own: Gloo writes to the same stream
            sys.stdout.write(f"\\nsum {value} first {distributed.is_first()}\\n")
            sys.stdout.flush()
        if sys.argv[3:] == [str(jax.process_index())] and i == 5:
            raise ValueError("what only this process has met")
        time.sleep(0.01)
except Exception as error:
    distributed.end_if_alone(error)
    raise
"""


def job(timeout, steps, *failing):
    return [sys.executable, "-c", JOB, str(timeout), str(steps), *failing]


def test_processes_meet_and_part():
    results = processes.finish(processes.start(job(120, 10), 2, devices_each=2))
    assert [code for code, _, _ in results] == [0, 0], results
    assert ["sum 6.0 first True" in out for _, out, _ in results] == [True, False], results
    assert not any("error" in err for _, _, err in results), results


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_waits_in_vain_fails(present):
    alone = {"SD_JAX_PROCESS_ID": str(present), "SD_JAX_NUM_PROCESSES": "2", "http_proxy": "http://nowhere:1"}
    alone["SD_JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{processes.free_port()}"
    started = time.monotonic()
    [(code, out, err)] = processes.finish(processes.start(job(2, 1), 1, env=alone))
    assert code != 0 and "sum" not in out
    last = err.strip().splitlines()[-1]
    waited = "the others" if present == 0 else "process 0"
    assert last.startswith(f"error: process {present} of 2 did not meet {waited} at 127.0.0.1:"), err
    assert "unset http_proxy" in last and "(waited 2 seconds)" in last
    assert time.monotonic() - started < 120


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_within_a_minute(killed):
    both = processes.start(job(120, 10**6), 2)
    try:
        for process in both:
            while not (line := process.stdout.readline()).startswith("sum"):
                assert line, process.stderr.read()
        both[killed].send_signal(signal.SIGKILL)
        at = time.monotonic()
        [(code, _, err)] = processes.finish([both[1 - killed]], timeout=60)
        assert time.monotonic() - at < 60
        assert code not in (0, -signal.SIGKILL)
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ") and "gone" in last and "the same command" in last, err
    finally:
        processes.stop(both)
        for process in both:
            process.stdout.close(), process.stderr.close()


def test_a_process_that_fails_alone_does_not_wait_for_the_others():
    results = processes.finish(processes.start(job(120, 10**6, "1"), 2), timeout=90)
    assert results[1][0] == 1 and "error: what only this process has met" in results[1][2], results
    assert results[0][0] != 0 and "the same command" in results[0][2].strip().splitlines()[-1], results


def test_a_single_process_is_left_alone():
    assert distributed.initialize(num_processes=1) is None and distributed.is_first()
    distributed.barrier("nobody is waited for")
    distributed.end_if_alone(ValueError("is raised as it is"))
    assert "SD_JAX_PROCESS_ID" not in os.environ
