"""Process discovery: flags, SLURM, Open MPI or Google's TPU environment.

No other file reads these environments. Importing this file initializes no devices.
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
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from atlas_jax.config import RunConfig
from atlas_jax.errors import UserError
from atlas_jax.runtime.backend import start_backend
from atlas_jax.runtime.membership import ProcessInfo, rendezvous
from atlas_jax.runtime.process_group import ProcessGroup, process_group, use_process_group

logger = logging.getLogger(__name__)

PORTS, FIRST_PORT = 12_000, 20_000  # number and first of the ports to choose from, below Linux's ephemeral ports
DEVICE_FILES = Path("/dev")  # holds one file per GPU: nvidia0, nvidia1, ...
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # step ids from here on are not srun's: the batch script, an interactive shell
# Flags that may differ between the processes of a run
PER_PROCESS_FLAGS = ("--process_id", "--local_rank", "--cache_dir", "--compile_cache")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # environment variables whose proxy gRPC takes


@dataclass(frozen=True)
class ClusterSpec:
    """The processes of a run, and this process's index and devices."""

    coordinator: str = ""  # host:port of process 0
    count: int = 1  # processes
    index: int = 0  # of this process
    devices: tuple[int, ...] | None = None  # local ids of the GPUs that this process uses; None: all visible
    source: str = "a single process"  # where these values come from, for the log
    host_names: tuple[str, ...] = ()  # of all processes, by index; empty unless known beforehand


def detect_cluster(run: RunConfig, environment: Mapping[str, str] = os.environ) -> ClusterSpec:
    """Reads the first of these that is present: flags, SLURM, Open MPI, Google's TPUs; otherwise a single process."""
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
    match = re.fullmatch(r"(?:[^:\[\]\s]+|\[[^\[\]\s]+\]):(\d+)", run.coordinator)
    if not match or not 0 < int(match[1]) < 65536:
        expected = "expected host:port, such as node1:12345, or [2001:db8::1]:12345 for an IPv6 address"
        raise UserError(f"--coordinator {run.coordinator}: {expected}")
    if run.process_id >= run.num_processes:
        raise UserError(f"--process_id {run.process_id}: must be 0 to {run.num_processes - 1}, see --num_processes")
    return ClusterSpec(run.coordinator, run.num_processes, run.process_id, source="--coordinator")


def _by_slurm(run: RunConfig, environment: Mapping[str, str]) -> ClusterSpec:
    step, job = _number(environment, "SLURM_STEP_ID", FIRST_SPECIAL_STEP), _number(environment, "SLURM_JOB_ID")
    if step >= FIRST_SPECIAL_STEP or "SLURM_STEP_NODELIST" not in environment:  # sbatch or salloc without srun
        variables = ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")
        tasks, hosts = (_number(environment, name, 1) for name in variables)
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
    counts = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID", 0)
    devices = task_devices(
        environment, _number(environment, "SLURM_LOCALID"), counts[node] if node < len(counts) else 1
    )
    host_names = tuple(nodes) if len(nodes) == count else ()
    return ClusterSpec(f"{nodes[0]}:{port}", count, _number(environment, "SLURM_PROCID"), devices, "SLURM", host_names)


def _by_open_mpi(run: RunConfig, environment: Mapping[str, str]) -> ClusterSpec:
    count, index = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    if count == 1:
        return ClusterSpec()
    uris = (environment.get(name, "") for name in ("OMPI_MCA_orte_hnp_uri", "PMIX_SERVER_URI41", "PMIX_SERVER_URI4"))
    matches = (re.search(r"(\d+)[^;]*;tcp[46]?://\[?([^,\]:]+)", uri) for uri in uris)
    job, host = next(((int(match[1]), match[2]) for match in matches if match), (0, ""))
    host = environment.get("MASTER_ADDR", host)
    host = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
    if not host:
        raise UserError("Open MPI: no address of process 0; set MASTER_ADDR to its host")
    port = run.main_port if run.main_port != -1 else FIRST_PORT + job % PORTS
    local_rank, tasks = (
        _number(environment, f"OMPI_COMM_WORLD_LOCAL_{name}", default) for name, default in (("RANK", 0), ("SIZE", 1))
    )
    return ClusterSpec(f"{host}:{port}", count, index, task_devices(environment, local_rank, tasks), "Open MPI")


def _by_tpus(run: RunConfig, environment: Mapping[str, str], source: str = "GKE") -> ClusterSpec:
    """Reads the variables that GKE sets in the pods of TPU slices; for several slices also MEGASCALE_*."""
    names = environment["TPU_WORKER_HOSTNAMES"].split(",")
    defaults = (("NUM_SLICES", 1), ("SLICE_ID", 0))
    slices, slice_id = (_number(environment, f"MEGASCALE_{name}", default) for name, default in defaults)
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).partition(":")[0]
    count, index = len(names) * slices, len(names) * slice_id + _number(environment, "TPU_WORKER_ID")
    if count == 1:
        return ClusterSpec()
    port = run.main_port if run.main_port != -1 else FIRST_PORT
    return ClusterSpec(f"{first}:{port}", count, index, None, source, tuple(names) if slices == 1 else ())


def _by_tpu_vm(run: RunConfig, environment: Mapping[str, str]) -> ClusterSpec:
    """Asks Google's metadata server, on a Cloud TPU VM, for the variables that GKE would set."""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm:
        return ClusterSpec()
    try:
        workers, lines = (_metadata(environment, name) for name in ("worker-network-endpoints", "tpu-env"))
        variables = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", lines, re.MULTILINE))
        names = ",".join(worker.split(":")[-1] for worker in workers.split(","))  # name:number:address, or a name alone
        variables |= {"TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": _metadata(environment, "agent-worker-number")}
    except urllib.error.HTTPError:  # a Google VM without TPUs of its own, or another metadata server
        return ClusterSpec()
    except OSError as error:
        remedy = "--coordinator, --num_processes and --process_id say it by hand"
        raise UserError(
            f"the other machines of this TPU: no answer of Google's metadata server ({error}); {remedy}"
        ) from None
    return _by_tpus(run, variables, "Cloud TPU")


def _metadata(environment: Mapping[str, str], name: str) -> str:
    server = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Reads a number from an environment variable; UserError if it is no number, or is not set and has no default."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise UserError(f"{name} {text or ''}: expected a number from the program that starts the processes")
    return int(text)


def expand_node_list(nodes: str) -> list[str]:
    """Expands a SLURM node list such as `rack[1-2]n[01-03],login`, in SLURM's order: the last bracket varies fastest.

    `scontrol show hostnames` does the same, but containers lack it. UserError if the list is malformed.
    """
    if not nodes or not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])*", nodes):
        raise UserError(f"SLURM's node list {nodes!r}: brackets do not match, or it is empty")
    names = []
    for item in re.split(r",(?![^\[]*\])", nodes):
        parts = [_range(part[1:-1], nodes) if part[:1] == "[" else [part] for part in re.split(r"(\[[^\]]*\])", item)]
        names += ["".join(name) for name in itertools.product(*parts)]
    if not all(names):
        raise UserError(f"SLURM's node list {nodes!r}: a name is empty")
    return names


def _range(text: str, nodes: str) -> list[str]:
    """Expands the inside of a bracket of the list `nodes`, such as `01-03,7`."""
    numbers = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"SLURM's node list {nodes!r}: {piece!r} is no range")
        low, high = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    return numbers


def tasks_per_node(text: str) -> list[int]:
    """Returns the number of tasks of each node: for SLURM's `8(x3),4`, `[8, 8, 8, 4]`."""
    pieces = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in pieces for _ in range(int(times or 1))]


def task_devices(environment: Mapping[str, str], local_rank: int, tasks: int) -> tuple[int, ...] | None:
    """Returns the share of task `local_rank` in the node's visible GPUs, split evenly among its `tasks`; None: all."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    names = sorted(file.name for file in DEVICE_FILES.glob("nvidia[0-9]*")) if chosen is None else chosen.split(",")
    visible = [name for name in names if name]
    if tasks == 1 or len(visible) < 2:  # with --gpus-per-task=1 each task sees its own GPU
        return None
    if len(visible) % tasks:
        raise UserError(
            f"GPUs {','.join(visible)} do not divide among the {tasks} tasks of the node; set CUDA_VISIBLE_DEVICES"
        )
    gpus_per_task = len(visible) // tasks
    return tuple(range(local_rank * gpus_per_task, (local_rank + 1) * gpus_per_task))


@contextlib.contextmanager
def connect(run: RunConfig) -> Iterator[ProcessGroup]:
    """Initializes `jax.distributed` among the processes of the run; within the block they form `process_group()`.

    Call before the first use of a device. UserError names a process that is missing, or differs from process 0. When a
    process is lost later, all others end, see `membership`.
    """
    cluster = detect_cluster(run)
    if cluster.count == 1:
        start_backend()
        yield process_group()
        return
    import jax
    from jax._src.distributed import global_state

    membership = rendezvous(
        cluster.coordinator,
        cluster.count,
        cluster.index,
        _process_info(),
        run.host_timeout,
        cluster.host_names,
        differences,
    )
    host = cluster.coordinator.rpartition(":")[0]
    if bypass_proxy(host.strip("[]"), os.environ) and not cluster.index:
        logger.info("%s goes into no_proxy for this process: JAX would ask the proxy of the environment for it", host)
    error: BaseException | None = None
    try:
        jax.config.update("jax_check_proxy_envs", False)  # a warning that `bypass_proxy` has made untrue
        jax.config.update("jax_enable_preemption_service", False)  # `Interrupts` handles the signals
        platforms: str | None = jax.config.values["jax_platforms"]
        if (platforms or "").split(",")[0] == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"{host}:{membership.port}",
            cluster.count,
            cluster.index,
            cluster.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=run.host_timeout,
            heartbeat_timeout_seconds=run.host_timeout + 60,  # so that `membership` notices first
            shutdown_timeout_seconds=24 * 3600,  # `membership` notices processes lost while another still writes
        )
        group = ProcessGroup(
            cluster.index, [info["host"] for info in membership.processes], global_state.client, run.host_timeout
        )
        start_backend()
        _compare_devices(group, cluster)
        with use_process_group(group):
            yield group
        jax.distributed.shutdown()
    except BaseException as failure:
        error = failure
        raise
    finally:
        if error:  # else JAX would wait for the other processes at exit, and then abort
            for connection in (global_state.client, global_state.service):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # so that it is never destroyed
            global_state.client = global_state.service = None
        membership.leave(error)


def bypass_proxy(host: str, environment: MutableMapping[str, str]) -> bool:
    """Adds `host` to no_proxy if the environment has a proxy that gRPC would take for it; returns whether it did.

    gRPC reads no_grpc_proxy or else no_proxy, in lower case only, and compares the ends of names: `*` means nothing.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in PROXIES):
        return False
    name = "no_grpc_proxy" if environment.get("no_grpc_proxy") else "no_proxy"
    excepted = environment.get(name) or environment.get("NO_PROXY") or ""
    if any(host.lower().endswith(entry.lower()) for entry in excepted.replace(" ", "").split(",") if entry):
        return False
    environment[name] = f"{excepted},{host}".lstrip(",")
    return True


def _process_info() -> ProcessInfo:
    """Returns the host name, package versions and command line fingerprint of this process."""

    def package_version(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    packages = {package: package_version(package) for package in ("atlas-jax", "jax", "jaxlib")}
    return {"host": socket.gethostname(), **packages, "command line": command_hash(sys.argv[1:])}


def command_hash(arguments: Sequence[str]) -> str:
    """Returns a fingerprint of a command line without its `PER_PROCESS_FLAGS`: 12 hexadecimal digits."""
    joined = re.sub(rf"\0(?:{'|'.join(PER_PROCESS_FLAGS)})(?:=|\0)[^\0]*", "", "\0" + "\0".join(arguments))
    return hashlib.sha256(joined.encode(errors="surrogateescape")).hexdigest()[:12]


def differences(infos: Sequence[ProcessInfo]) -> str:
    """Describes properties, except hosts, in which processes differ from process 0: at most five; empty if in none."""
    lines = [
        f"process {index} ({info['host']}) has {key} {info[key]}, process 0 ({infos[0]['host']}) {infos[0][key]}"
        for index, info in enumerate(infos)
        for key in infos[0]
        if key != "host" and info.get(key) != infos[0][key]
    ]
    return "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")


def _compare_devices(group: ProcessGroup, cluster: ClusterSpec) -> None:
    """Logs the devices of all processes, on process 0; UserError if their number or kind differs."""
    import jax

    kinds = [device.device_kind for device in jax.local_devices()]
    local_devices = " and ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    all_devices = [d.decode() for d in group.all_gather(local_devices.encode(), channel="devices")]
    if text := differences([{"host": n, "devices": d} for n, d in zip(group.host_names, all_devices, strict=True)]):
        raise UserError(text)
    if cluster.index == 0:
        logger.info("%d processes, found by %s:", cluster.count, cluster.source)
        for index, (name, devices) in enumerate(zip(group.host_names, all_devices, strict=True)):
            logger.info("  %d  %s  %s", index, name, devices)
