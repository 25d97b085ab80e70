"""How the processes of a run find each other: flags, SLURM, Open MPI, Google's TPUs. No other file knows.

Importing this starts no devices.
"""

import contextlib
import ctypes
import hashlib
import itertools
import logging
import os
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from atlas_jax.config import RunConfig
from atlas_jax.errors import UserError
from atlas_jax.runtime.membership import ProcessInfo, rendezvous
from atlas_jax.runtime.process_group import ProcessGroup, process_group, use_process_group

logger = logging.getLogger(__name__)

PORTS, FIRST_PORT = 12_000, 20_000  # below those that Linux gives to programs that ask for any
DEVICE_FILES = Path("/dev")  # with one of each GPU, nvidia0 and so on
NO_STEP = 0xFFFFFFF0  # SLURM numbers a batch script's and a shell's own step from here
PER_PROCESS_FLAGS = ("--process_id", "--local_rank", "--compile_cache")  # of which each process may have its own value


@dataclass(frozen=True)
class ClusterSpec:
    """This process among those of the run."""

    coordinator: str = ""  # host:port of process 0
    count: int = 1
    index: int = 0
    devices: tuple[int, ...] | None = None  # its GPUs, of those it sees; None: all
    found: str = "a single process"  # what told all this
    names: tuple[str, ...] = ()  # the host of each process, where that is known beforehand


def detect_cluster(run: RunConfig, environment: Mapping[str, str] = os.environ) -> ClusterSpec:
    """Flags before SLURM before Open MPI before Google's TPUs; a single process otherwise."""
    flags = {"coordinator": run.coordinator, "num_processes": run.num_processes, "process_id": run.process_id}
    if missing := [f"--{flag}" for flag, value in flags.items() if value is None]:
        if len(missing) < len(flags):
            raise UserError(
                f"{', '.join(missing)} missing: --coordinator, --num_processes and --process_id go together"
            )
    else:
        return _by_flags(run)
    if "SLURM_JOB_ID" in environment:
        return _by_slurm(run, environment)
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return _by_open_mpi(run, environment)
    if "TPU_WORKER_HOSTNAMES" in environment:
        return _by_tpus(run, environment)
    if (index := environment.get("JOB_COMPLETION_INDEX")) is not None:
        logger.warning(
            "pod %s of a Kubernetes job, alone: with --coordinator the pods are one run, as launch/gke shows", index
        )
        return ClusterSpec()
    return _by_tpu_vm(run, environment)


def _by_flags(run: RunConfig) -> ClusterSpec:
    assert run.coordinator
    assert run.num_processes
    assert run.process_id is not None
    host, _, port = run.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {run.coordinator}: expected host:port, such as node1:12345")
    if run.process_id >= run.num_processes:
        raise UserError(f"--process_id {run.process_id}: must be 0 to {run.num_processes - 1}, see --num_processes")
    return ClusterSpec(run.coordinator, run.num_processes, run.process_id, found="--coordinator")


def _by_slurm(run: RunConfig, environment: Mapping[str, str]) -> ClusterSpec:
    step, job = _number(environment, "SLURM_STEP_ID", NO_STEP), _number(environment, "SLURM_JOB_ID")
    if step >= NO_STEP or "SLURM_STEP_NODELIST" not in environment:  # sbatch or salloc without srun
        names = ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
        tasks, hosts = (_number(environment, name, 1) for name in names)
        if max(tasks, hosts) > 1:
            logger.warning(
                "one process of %d was started, on one node of %d; srun starts all", max(tasks, hosts), hosts
            )
        return ClusterSpec()
    count = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
    if count == 1:
        return ClusterSpec()
    nodes = expand_node_list(environment["SLURM_STEP_NODELIST"])
    port = run.main_port if run.main_port != -1 else FIRST_PORT + (job + 1009 * step) % PORTS
    here = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID", 0)
    devices = task_devices(environment, _number(environment, "SLURM_LOCALID"), here[node] if node < len(here) else 1)
    known = tuple(nodes) if len(nodes) == count else ()
    return ClusterSpec(f"{nodes[0]}:{port}", count, _number(environment, "SLURM_PROCID"), devices, "SLURM", known)


def _by_open_mpi(run: RunConfig, environment: Mapping[str, str]) -> ClusterSpec:
    count, index = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count == 1:
        return ClusterSpec()
    uris = (environment.get(name, "") for name in ("OMPI_MCA_orte_hnp_uri", "PMIX_SERVER_URI41", "PMIX_SERVER_URI4"))
    matches = (re.search(r"(\d+)[^;]*;tcp[46]?://\[?([^,\]:]+)", uri) for uri in uris)
    job, host = next(((int(match[1]), match[2]) for match in matches if match), (0, ""))
    host = environment.get("MASTER_ADDR", host)
    if not host:
        raise UserError("Open MPI: no address of process 0; set MASTER_ADDR to its host")
    port = run.main_port if run.main_port != -1 else FIRST_PORT + job % PORTS
    local, here = (
        _number(environment, f"OMPI_COMM_WORLD_LOCAL_{name}", other) for name, other in (("RANK", 0), ("SIZE", 1))
    )
    return ClusterSpec(f"{host}:{port}", count, index, task_devices(environment, local, here), "Open MPI")


def _by_tpus(run: RunConfig, environment: Mapping[str, str], found: str = "GKE") -> ClusterSpec:
    """What GKE tells the pods of TPU slices; with several slices, MEGASCALE_* says which this one is."""
    names = environment["TPU_WORKER_HOSTNAMES"].split(",")
    numbers = (("NUM_SLICES", 1), ("SLICE_ID", 0))
    slices, this = (_number(environment, f"MEGASCALE_{name}", otherwise) for name, otherwise in numbers)
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).partition(":")[0]
    count, index = len(names) * slices, len(names) * this + _number(environment, "TPU_WORKER_ID")
    if count == 1:
        return ClusterSpec()
    port = run.main_port if run.main_port != -1 else FIRST_PORT
    return ClusterSpec(f"{first}:{port}", count, index, None, found, tuple(names) if slices == 1 else ())


def _by_tpu_vm(run: RunConfig, environment: Mapping[str, str]) -> ClusterSpec:
    """A machine with TPUs asks Google's metadata server for what GKE would have told it."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm:
        return ClusterSpec()
    try:
        workers, lines = (_metadata(environment, name) for name in ("worker-network-endpoints", "tpu-env"))
        told = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", lines, re.MULTILINE))
        names = ",".join(worker.split(":")[-1] for worker in workers.split(","))  # name:number:address, or a name alone
        told |= {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": _metadata(environment, "agent-worker-number")}
    except urllib.error.HTTPError:  # Google's, but without TPUs of its own, or not Google's
        return ClusterSpec()
    except OSError as error:
        by_hand = "--coordinator, --num_processes and --process_id say it by hand"
        raise UserError(
            f"the other machines of this TPU: no answer of Google's metadata server ({error}); {by_hand}"
        ) from None
    return _by_tpus(run, told, "Cloud TPU")


def _metadata(environment: Mapping[str, str], name: str) -> str:
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name)
    if text is None and otherwise is not None:
        return otherwise
    if text is None or not text.isdecimal():
        raise UserError(f"{name} {text or ''}: expected a number from the program that starts the processes")
    return int(text)


def expand_node_list(nodes: str) -> list[str]:
    """The nodes of a SLURM list, such as `rack[1-2]n[01-03],login`, in SLURM's order: the last bracket runs first.

    `scontrol show hostnames` says the same, but containers lack it.
    """
    if not nodes or not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])*", nodes):
        raise UserError(f"SLURM's node list {nodes!r}: brackets do not match, or it is empty")
    names = []
    for item in re.split(r",(?![^\[]*\])", nodes):
        parts = [_range(part[1:-1], nodes) if part[:1] == "[" else [part] for part in re.split(r"(\[[^\]]*\])", item)]
        names += ["".join(one) for one in itertools.product(*parts)]
    if not all(names):
        raise UserError(f"SLURM's node list {nodes!r}: a name is empty")
    return names


def _range(text: str, nodes: str) -> list[str]:
    numbers = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"SLURM's node list {nodes!r}: {piece!r} is no range")
        low, high = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """The tasks of each node, from SLURM's `8(x3),4`."""
    pieces = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pieces for _ in range(int(times or 1))]


def task_devices(environment: Mapping[str, str], local: int, tasks: int) -> tuple[int, ...] | None:
    """Which of the GPUs that it sees are this task's, the `local`-th of so many on its node; None is all."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    names = sorted(file.name for file in DEVICE_FILES.glob("nvidia[0-9]*")) if chosen is None else chosen.split(",")
    visible = [name for name in names if name]
    if tasks == 1 or len(visible) < 2:  # with --gpus-per-task=1 each sees its own
        return None
    if len(visible) % tasks:
        raise UserError(
            f"GPUs {','.join(visible)} do not divide among the {tasks} tasks of the node; set CUDA_VISIBLE_DEVICES"
        )
    each = len(visible) // tasks
    return tuple(range(local * each, (local + 1) * each))


@contextlib.contextmanager
def connect(run: RunConfig) -> Iterator[ProcessGroup]:
    """Within the block JAX knows the devices of all processes; UserError names a process that is missing or different.

    Before the first use of a device. A process that is lost later ends all others, see `roll_call`.
    """
    place = detect_cluster(run)
    if place.count == 1:
        yield process_group()
        return
    import jax
    from jax._src.distributed import global_state

    membership = rendezvous(
        place.coordinator, place.count, place.index, _process_info(), run.host_timeout, place.names, differences
    )
    host = place.coordinator.rpartition(":")[0]
    error: BaseException | None = None
    try:
        jax.config.update("jax_enable_preemption_service", False)  # `Interrupts` has the signals
        platforms: str | None = jax.config.values["jax_platforms"]
        if (platforms or "").split(",")[0] == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"{host}:{membership.port}",
            place.count,
            place.index,
            place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=run.host_timeout,
            heartbeat_timeout_seconds=run.host_timeout + 60,  # `membership` shall notice first
            shutdown_timeout_seconds=24 * 3600,  # it also notices who is lost while one still writes
        )
        group = ProcessGroup(
            place.index, [card["host"] for card in membership.cards], global_state.client, run.host_timeout
        )
        _compare_devices(group, place)
        with use_process_group(group):
            yield group
        jax.distributed.shutdown()
    except BaseException as failure:
        error = failure
        raise
    finally:
        if error:  # JAX would wait at the exit for the others, and then abort
            for connection in (global_state.client, global_state.service):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # so that none is ever closed
            global_state.client = global_state.service = None
        membership.leave(error)


def _process_info() -> ProcessInfo:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    packages = {package: of(package) for package in ("atlas-jax", "jax", "jaxlib")}
    return {"host": socket.gethostname(), **packages, "command line": command_hash(sys.argv[1:])}


def command_hash(arguments: Sequence[str]) -> str:
    """A short fingerprint of a command line, but for `PER_PROCESS_FLAGS`."""
    joined = re.sub(rf"\0(?:{'|'.join(PER_PROCESS_FLAGS)})(?:=|\0)[^\0]*", "", "\0" + "\0".join(arguments))
    return hashlib.sha256(joined.encode()).hexdigest()[:12]


def differences(cards: Sequence[ProcessInfo]) -> str:
    """Who is unlike process 0, and in what; empty if nobody is."""
    found = [
        f"process {index} ({card['host']}) has {what} {card[what]}, process 0 ({cards[0]['host']}) {cards[0][what]}"
        for index, card in enumerate(cards)
        for what in cards[0]
        if what != "host" and card.get(what) != cards[0][what]
    ]
    return "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


def _compare_devices(group: ProcessGroup, place: ClusterSpec) -> None:
    """All have as many devices of the same kind; process 0 logs them."""
    import jax

    kinds = [device.device_kind for device in jax.local_devices()]
    own = " and ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    everyone = [one.decode() for one in group.all_gather(own.encode(), channel="devices")]
    if text := differences([{"host": n, "devices": d} for n, d in zip(group.names, everyone, strict=True)]):
        raise UserError(text)
    if place.index == 0:
        logger.info("%d processes, found by %s:", place.count, place.found)
        for index, (name, devices) in enumerate(zip(group.names, everyone, strict=True)):
            logger.info("  %d  %s  %s", index, name, devices)
