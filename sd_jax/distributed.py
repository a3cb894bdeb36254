"""Several processes as one run: who they are, how they meet, and what is said when one of them is gone.

JAX is multi-controller: a launcher starts the same program once per host (or per GPU), and each process must learn how
many there are, which one it is, and where the first one listens. That is looked for, in this order, in
    flags           --coordinator_address, --num_processes, --process_id, --local_device_ids
    SD_JAX_*        SD_JAX_COORDINATOR_ADDRESS, SD_JAX_NUM_PROCESSES, SD_JAX_PROCESS_ID, SD_JAX_LOCAL_DEVICE_IDS
    XPK             JAX_COORDINATOR_ADDRESS with NNODES and NODE_RANK, or with JAX_PROCESS_COUNT and job indices
    SkyPilot        SKYPILOT_NODE_IPS, SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK
    Slurm, Cloud TPU, Kubernetes, Open MPI: JAX asks them itself
A setting that is half given is an error: a launcher that fails must not turn one run into many.
"""

import atexit
import contextlib
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

PORT = 8476  # of process 0, where nothing says another
HEARTBEAT_SECONDS = 30  # without a sign of life from a process, after which the others end

_AGAIN = "the same command, given again to all of them, goes on from the last checkpoint"

# Words of Gloo, NCCL and JAX's coordination service in the errors of a process that still lives
_LOST = (
    "gloo",
    "nccl operation",
    "remote process exited",
    "stopped sending heartbeats",
    "coordination service",
    "coordinationservice",
    "barrier timed out",
)


class Cluster(NamedTuple):
    """Fields that are None are JAX's to find out."""

    source: str  # what told it, for messages
    coordinator_address: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # GPUs of this process; None = all that it sees


def cluster_of(
    environ: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int | str] | None = None,
) -> Cluster | None:
    """What the flags and the environment say, in the order of the module's docstring; None = a single process.

    Raises ValueError naming the flag or variable that is missing or wrong.
    """
    flags = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
        "local_device_ids": None if local_device_ids is None else ",".join(map(str, local_device_ids)),
    }
    given = {name: environ.get(f"SD_JAX_{name.upper()}") if flag is None else flag for name, flag in flags.items()}
    given = {name: value for name, value in given.items() if value not in (None, "")}
    ids = _numbers(given.pop("local_device_ids", None), "--local_device_ids (SD_JAX_LOCAL_DEVICE_IDS)")
    if "num_processes" in given and _number(given["num_processes"], "--num_processes (SD_JAX_NUM_PROCESSES)") == 1:
        return None
    if given:
        for name in ("coordinator_address", "num_processes", "process_id"):
            if name not in given:
                there = ", ".join(f"--{other}" for other in given)
                raise ValueError(f"--{name} (SD_JAX_{name.upper()}) is missing beside {there}: give all three")
        return _checked(Cluster("flags or SD_JAX_*", **given, local_device_ids=ids))
    cluster = _xpk(environ) or _skypilot(environ) or _found_by_jax(environ)
    if cluster is None:
        _check_alone(environ)
        return None
    return cluster if ids is None else cluster._replace(local_device_ids=ids)


def _xpk(environ: Mapping[str, str]) -> Cluster | None:
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        return None
    if "JAX_PROCESS_COUNT" in environ:  # pools of CPUs: several jobs of several processes
        count, first, each, index = (
            _of(environ, name)
            for name in ("JAX_PROCESS_COUNT", "JOB_INDEX", "PROCESSES_IN_JOB", "JOB_COMPLETION_INDEX")
        )
        process_id = first * each + index
    elif "NNODES" in environ or "NODE_RANK" in environ:
        count, process_id = _of(environ, "NNODES"), _of(environ, "NODE_RANK")
    else:
        return None
    if ":" not in address:
        address = f"{address}:{environ.get('JAX_COORDINATOR_PORT', PORT)}"
    return None if count == 1 else _checked(Cluster("XPK", address, count, process_id))


def _skypilot(environ: Mapping[str, str]) -> Cluster | None:
    if "SKYPILOT_NODE_IPS" not in environ or _of(environ, "SKYPILOT_NUM_NODES") == 1:
        return None
    head = environ["SKYPILOT_NODE_IPS"].split()[0]
    count, process_id = _of(environ, "SKYPILOT_NUM_NODES"), _of(environ, "SKYPILOT_NODE_RANK")
    return _checked(Cluster("SkyPilot", f"{head}:{PORT}", count, process_id))


def _found_by_jax(environ: Mapping[str, str]) -> Cluster | None:
    """Where JAX finds the rest; but which GPUs a process takes is settled here, see `_gpus`."""
    if int(environ.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_STEP_NODELIST" not in environ:
            raise ValueError(
                f"SLURM_NTASKS={environ['SLURM_NTASKS']}, but this is not one of them: start it by srun "
                "(--num_processes=1 for a single process)"
            )
        tasks = _tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"), int(environ.get("SLURM_NODEID", "0")))
        return Cluster("Slurm", local_device_ids=_gpus(environ, tasks, _of(environ, "SLURM_LOCALID")))
    if "TPU_ML_PLATFORM" in environ and "tpu" in environ.get("JAX_PLATFORMS", "tpu"):  # set by `import jax` on TPUs
        hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
        slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
        if "," in (hosts or "") or slices > 1 or (hosts is None and "TPU_SKIP_MDS_QUERY" not in environ):
            return Cluster("Cloud TPU")
        return None
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Cluster("Kubernetes")
    if "OMPI_MCA_orte_hnp_uri" in environ and int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        tasks, place = (_of(environ, f"OMPI_COMM_WORLD_LOCAL_{name}") for name in ("SIZE", "RANK"))
        return Cluster("Open MPI", local_device_ids=_gpus(environ, tasks, place))
    return None


def _tasks_on_node(text: str, node: int) -> int:
    """Slurm's "8(x2),4": 8 tasks on each of the first two nodes, 4 on the third."""
    tasks = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(times or 1)
    return tasks[min(node, len(tasks) - 1)]


def _gpus(environ: Mapping[str, str], tasks: int, place: int) -> tuple[int, ...] | None:
    """The GPUs of one of several tasks on a node, counted among those that it sees; None = there are none.

    JAX gives each task of Slurm and Open MPI one GPU, that of its place on the node: a task that has the node for
    itself would leave all but one idle, and one that is bound to its own GPU would not find it. Here a task takes all
    that are bound to it, or else its share of the node's.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environ:
        return None  # which JAX reads
    on_node = int(environ.get("SLURM_GPUS_ON_NODE", "0"))
    seen = next((environ[n] for n in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if n in environ), None)
    visible = on_node if seen is None else len([one for one in seen.split(",") if one not in ("", "-1", "NoDevFiles")])
    if visible == 0:
        return None
    if visible == 1 or visible * tasks == on_node:
        return tuple(range(visible))
    if visible % tasks:
        raise ValueError(f"{tasks} tasks on a node cannot share {visible} GPUs evenly: set --ntasks-per-node={visible}")
    share = visible // tasks
    return tuple(range(place * share, (place + 1) * share))


def _check_alone(environ: Mapping[str, str]) -> None:
    """Raises ValueError where something tells of several processes, but not how they meet."""
    counts = ("NNODES", "JAX_PROCESS_COUNT", "OMPI_COMM_WORLD_SIZE", "SKYPILOT_NUM_NODES")
    for name in counts:
        if environ.get(name, "1") not in ("", "1"):
            raise ValueError(
                f"{name}={environ[name]}, but nothing says where the first process is: set "
                "SD_JAX_COORDINATOR_ADDRESS=HOST:PORT, SD_JAX_NUM_PROCESSES and SD_JAX_PROCESS_ID "
                "(--num_processes=1 for a single process)"
            )
    if environ.get("JAX_COORDINATOR_ADDRESS") and not any(name in environ for name in counts):
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS is set, but NNODES and NODE_RANK are missing: set them, or unset it "
            "(--num_processes=1 for a single process)"
        )


def _checked(cluster: Cluster) -> Cluster:
    count = _number(cluster.num_processes, f"the number of processes ({cluster.source})")
    process_id = _number(cluster.process_id, f"the process id ({cluster.source})")
    if not 0 <= process_id < count:
        raise ValueError(f"process id {process_id} of {count} processes ({cluster.source}): they count from 0")
    if not cluster.coordinator_address.rpartition(":")[2].isdigit() or ":" not in cluster.coordinator_address:
        raise ValueError(
            f"coordinator address {cluster.coordinator_address!r} ({cluster.source}) has no port: "
            f"write HOST:PORT, e.g. 10.0.0.1:{PORT}"
        )
    return cluster._replace(num_processes=count, process_id=process_id)


def _of(environ: Mapping[str, str], name: str) -> int:
    if environ.get(name, "") == "":
        raise ValueError(f"{name} is missing in the environment, beside the others of its launcher")
    return _number(environ[name], name)


def _number(value: int | str, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}: it takes a whole number") from None


def _numbers(text: str | None, name: str) -> tuple[int, ...] | None:
    return None if text is None else tuple(_number(part, name) for part in text.split(","))


# --- Meeting, and parting ---------------------------------------------------------------------------------------------


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int | str] | None = None,
    timeout_seconds: int = 300,  # how long the processes wait for each other
) -> Cluster | None:
    """Meets the other processes of the run, if there are any; before any use of a device. -> who it is, as far as told.

    Raises ValueError for settings that are wrong, and OSError naming the address where there is no meeting. Where a
    process waits in vain JAX aborts it (status 134); what to do is then said as the last line of its stderr.
    """
    cluster = cluster_of(os.environ, coordinator_address, num_processes, process_id, local_device_ids)
    if cluster is None or jax.distributed.is_initialized():
        return cluster
    if cluster.source == "Kubernetes" and importlib.util.find_spec("kubernetes") is None:
        raise OSError("a Kubernetes job cannot ask for its pods without the package kubernetes: pip install jax[k8s]")
    _last_words(f"error: {_no_meeting(cluster, os.environ)} (waited {timeout_seconds} seconds)")
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            cluster.local_device_ids,
            cluster_detection_method="deactivate" if cluster.coordinator_address else None,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:
        _last_words("")
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"{_no_meeting(cluster, os.environ)} ({reason})") from error
    who = f"process {jax.process_index()} of {jax.process_count()}"
    _last_words(f"error: {who} was ended, because another one is gone (see above) or from outside: {_AGAIN}")
    atexit.register(_part)
    return cluster


def _no_meeting(cluster: Cluster, environ: Mapping[str, str]) -> str:
    proxies = [name for name in environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"]
    unset = f", unset {' '.join(proxies)}" if proxies else ""
    if cluster.coordinator_address is None:
        return f"the processes of the run did not meet: {cluster.source} was asked who they are{unset}"
    waited = "the others" if cluster.process_id == 0 else "process 0"
    return (
        f"process {cluster.process_id} of {cluster.num_processes} did not meet {waited} at "
        f"{cluster.coordinator_address}: start all of them, each with its own process id, and see that this port of "
        f"process 0 is free and open to them{unset} (told by {cluster.source})"
    )


def is_first() -> bool:
    """Whether this is the process that writes what the run writes once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Until all processes have come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def lost_peer(error: BaseException) -> str | None:
    """What to tell of an error that means that another process is gone; None: it means something else."""
    # XLA's errors come as a RuntimeError of JAX, or as a bare ValueError
    of_xla = isinstance(error, RuntimeError) or type(error) is ValueError
    if not of_xla or not any(word in str(error).lower() for word in _LOST):
        return None
    reason = str(error).strip().split("\n")[0][:300]
    return f"another process of the run is gone ({reason}): {_AGAIN}"


def end_if_alone(error: BaseException) -> None:
    """Ends a process that has failed beside others, at once and with status 1: in Python's orderly end it would wait
    for the others at JAX's barrier, while they wait for it in the step. Of a single process: does nothing."""
    if not jax.distributed.is_initialized():
        return
    told = lost_peer(error)
    if told is None and not isinstance(error, ValueError | OSError | FloatingPointError):
        told = "".join(traceback.format_exception(error)).rstrip()
    _last_words("")
    sys.stdout.flush()
    print(f"error: {told or error}", file=sys.stderr, flush=True)
    os._exit(1)


def _part() -> None:
    """At the orderly end: waits until all have come here, so that none is taken for dead."""
    try:
        jax.distributed.shutdown()
    finally:
        _last_words("")


_WITNESS: list[subprocess.Popen] = []
_SCRIPT = """trap '' INT TERM HUP; while IFS= read -r said; do text=$said; done; test -z "$text" || echo "$text" >&2"""


def _last_words(text: str) -> None:
    """What is written to stderr should this process die from now on without a word of its own; "" = nothing.

    JAX aborts a process from a thread of its own where another one is gone, and asks no handler of Python. So a shell
    stands by, is told what to say, and says it when its input ends. A system without a shell does without.
    """
    with contextlib.suppress(OSError):
        if not _WITNESS:
            told = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
            _WITNESS.append(subprocess.Popen(["/bin/sh", "-c", _SCRIPT], **told))
        shell = _WITNESS[0]
        shell.stdin.write(text.replace("\n", " ") + "\n")
        shell.stdin.flush()
        if not text:
            _WITNESS.clear()
            shell.stdin.close()
            shell.wait()
