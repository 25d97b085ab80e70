"""Detecting the cluster, and one-line errors that name a process which is missing, different, lost or stuck."""

import contextlib
import http.server
import logging
import signal
import socket
import threading
import time

import pytest

from atlas_jax.config import RunConfig
from atlas_jax.errors import UserError
from atlas_jax.runtime import cluster
from atlas_jax.runtime.cluster import (
    ClusterSpec,
    bypass_proxy,
    command_hash,
    detect_cluster,
    differences,
    expand_node_list,
    task_devices,
    tasks_per_node,
)
from tests.runtime.processes import exit_lines, free_port

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "n[7-8]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def gpus(tmp_path, monkeypatch):
    """The folder of the host's GPU device files, replaced by an empty one."""
    monkeypatch.setattr(cluster, "DEVICE_FILES", tmp_path)
    return tmp_path


@pytest.mark.parametrize("missing", [0, 2])
def test_a_missing_process_is_named(processes, missing):
    """The processes that are present end in time, with the same line, and without JAX's abort."""
    results = exit_lines(processes.start("sleep", {0, 1, 2} - {missing}, 3))
    assert {status for status, _ in results.values()} == {2}
    assert all(line.startswith(f"atlas: process {missing} ") and "did not come" in line for _, line in results.values())


def test_a_process_id_used_twice_is_named(processes):
    """Every process of the run names the duplicate id."""
    port = free_port()
    started = [*processes.start("sleep", [0, 1], 3, port=port).values()]
    results = [process.end() for process in [*started, *processes.start("sleep", [1], 3, port=port).values()]]
    for status, lines in results:
        assert status == 2
        assert lines[-1].startswith("atlas: --process_id 1 of ")
        assert lines[-1].endswith(": there are 3 processes, each with its own")


def test_a_connection_of_another_program_is_closed(processes):
    """Another program that connects to process 0's port does not count as a process of the run."""
    port = free_port()
    (first,) = processes.start("nothing", [0], 2, port=port, timeout=10).values()
    for message in (b"GET / HTTP/1.0\r\n\r\n", b"[1]\n", b""):
        end = time.monotonic() + 10
        foreign_connection = None
        while foreign_connection is None:
            with contextlib.suppress(ConnectionRefusedError):
                foreign_connection = socket.create_connection(("127.0.0.1", port))
            assert time.monotonic() < end
        with foreign_connection:
            foreign_connection.sendall(message)
    (second,) = processes.start("nothing", [1], 2, port=port).values()
    assert [process.end()[0] for process in (first, second)] == [0, 0]


@pytest.mark.parametrize("mode", ["version", "devices"])
def test_a_process_of_another_version_or_device_count_is_named(processes, mode):
    """Every process names the differing process, its value and the value of process 0."""
    results = exit_lines(processes.start(mode, range(2), 2))
    expected = {"version": "has jax 9.9, process 0", "devices": "has devices 2 x cpu, process 0"}[mode]
    assert all(status == 2 and "process 1" in line and expected in line for status, line in results.values()), results


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_lost_process_is_named(processes, signum, victim):
    """A killed process is named at once; a stopped one (SIGSTOP) when it has sent no heartbeat for too long."""
    started = processes.start("sleep", range(3), 3)
    for process in started.values():
        process.until("up")
    lost = started.pop(victim)
    lost.signal(signum)
    results = exit_lines(started)
    lost.signal(signal.SIGKILL)
    lost.end()
    reason = "is gone" if signum == signal.SIGKILL else "has been silent for 2 s"
    assert all(status == 75 and f"process {victim} " in line and reason in line for status, line in results.values()), (
        results
    )


@pytest.mark.parametrize("stuck", [0, 2])
def test_a_stuck_process_is_named(processes, stuck):
    """A process that sends heartbeats, but whose call does not return; those that wait for it do not count as stuck."""
    results = exit_lines(processes.start("stuck", range(3), 3, target=stuck))
    start = f"atlas: process {stuck} "
    assert all(status == 75 and line.startswith(start) and "is stuck" in line for status, line in results.values()), (
        results
    )
    assert all("worker.py, line " in line for _, line in results.values())


def test_a_slow_process_is_not_stuck(processes):
    """The counter-case: a process that sleeps as long in total, but wakes up now and then."""
    results = exit_lines(processes.start("slow", range(2), 2, seconds=4))
    assert [status for status, _ in results.values()] == [0, 0], results


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_all(processes, failing):
    """The failing process prints its error and has its own exit status; the others repeat the error."""
    results = exit_lines(processes.start("error", range(2), 2, target=failing))
    assert results.pop(failing) == (2, "atlas: bad.jsonl, line 3: no question")
    assert all(
        status == 75 and f"process {failing} " in line and "no question" in line for status, line in results.values()
    )


@pytest.mark.parametrize("slow", [0, 1])
def test_all_interrupted_processes_have_time_to_save(processes, slow):
    """Process 0 waits for a slower process, which JAX would abort if process 0 ended first."""
    started = processes.start("sleep", range(2), 2, target=slow)
    for process in started.values():
        process.until("up")
    for process in started.values():
        process.signal(signal.SIGUSR1)
    for status, lines in (process.end() for process in started.values()):
        assert (status, lines[-2:]) == (138, ["saved", "atlas: interrupted by SIGUSR1"])


def test_a_process_that_leaves_early_is_named(processes):
    """The others first have time to stop; until then process 0 stays alive, so that JAX does not abort them."""
    started = processes.start("sleep", range(2), 2, seconds=0)
    for process in started.values():
        process.until("up")
    started[0].signal(signal.SIGTERM)
    results = exit_lines(started)
    assert results[0] == (143, "atlas: interrupted by SIGTERM")
    assert results[1][0] == 75
    assert "process 0 (" in results[1][1]
    assert "left before the end" in results[1][1]


@pytest.mark.parametrize("index", [0, 1])
def test_waiting_for_other_processes_can_be_interrupted(processes, index):
    """SIGTERM ends the wait at once, with the exit status of the signal."""
    (process,) = processes.start("sleep", [index], 2, timeout=30).values()
    time.sleep(0.3)
    begin = time.monotonic()
    process.signal(signal.SIGTERM)
    status, lines = process.end()
    assert (status, lines[-1]) == (143, "atlas: interrupted by SIGTERM")
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[1-2]-ib", ["node1-ib", "node2-ib"]),
        ("rack1-[2,4-5]n[1-2]", ["rack1-2n1", "rack1-2n2", "rack1-4n1", "rack1-4n2", "rack1-5n1", "rack1-5n2"]),
        ("a,b[01-03]", ["a", "b01", "b02", "b03"]),
        ("gpu[008-011,015]", ["gpu008", "gpu009", "gpu010", "gpu011", "gpu015"]),
        ("n[99-101]", ["n99", "n100", "n101"]),
    ],
)
def test_node_lists_are_expanded(text, names):
    """The names are those that `scontrol show hostnames` prints."""
    assert expand_node_list(text) == names


@pytest.mark.parametrize("text", ["", "n[1-2", "n1-2]", "n[]", "n[3-1]", "n[1-]", "a,,b", "n[[1]]"])
def test_a_malformed_node_list_is_an_error(text):
    with pytest.raises(UserError, match="node list"):
        expand_node_list(text)


def test_slurm_step():
    """The coordinator is the first node of the step at a port computed from the job id; GPUs are shared evenly."""
    four = STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert detect_cluster(RunConfig(), four) == ClusterSpec("n7:21234", 4, 3, (2, 3), "SLURM")
    assert detect_cluster(RunConfig(main_port=15000), STEP).coordinator == "n7:15000"
    assert detect_cluster(RunConfig(), STEP | {"SLURM_JOB_ID": "1235"}).coordinator == "n7:21235"
    assert (
        detect_cluster(RunConfig(), STEP | {"SLURM_STEP_ID": "2"}).coordinator == "n7:23252"
    )  # another port than step 0
    assert detect_cluster(RunConfig(), STEP | {"SLURM_NTASKS": "1"}) == ClusterSpec()
    assert detect_cluster(RunConfig(), STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == ClusterSpec()
    one_each = STEP | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    assert detect_cluster(RunConfig(), one_each | {"SLURM_LOCALID": "0"}) == ClusterSpec(
        "n7:21234", 2, 1, None, "SLURM", ("n7", "n8")
    )


@pytest.mark.parametrize("step", [{"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}, {}])
def test_slurm_without_srun_is_a_single_process(step, caplog):
    """In the step of a batch script, in that of an interactive shell, or in none: a single process, and a warning."""
    plain = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}
    with caplog.at_level(logging.WARNING):
        assert detect_cluster(RunConfig(), plain | step) == ClusterSpec()
    assert "one process of 8" in caplog.text
    assert "srun" in caplog.text
    caplog.clear()
    assert detect_cluster(RunConfig(), plain | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}) == ClusterSpec()
    assert not caplog.records


def test_open_mpi_coordinator():
    """The coordinator is at MASTER_ADDR or else mpirun's host; without either it is an error."""
    ompi = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items()}
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert detect_cluster(RunConfig(main_port=7000), ompi | uri) == ClusterSpec(
        "10.96.0.1:7000", 2, 1, None, "Open MPI"
    )
    assert detect_cluster(RunConfig(main_port=7000), ompi | uri | {"MASTER_ADDR": "h"}).coordinator == "h:7000"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        detect_cluster(RunConfig(), ompi)


def test_gke_tpu_pods():
    """The pods of a TPU slice are the processes; with several slices MEGASCALE_* names process 0."""
    pod = {"TPU_WORKER_HOSTNAMES": "t-0-0.t,t-0-1.t", "TPU_WORKER_ID": "1", "JOB_COMPLETION_INDEX": "1"}
    assert detect_cluster(RunConfig(), pod) == ClusterSpec("t-0-0.t:20000", 2, 1, None, "GKE", ("t-0-0.t", "t-0-1.t"))
    slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first.t:8080"}
    assert detect_cluster(RunConfig(main_port=7), pod | slices) == ClusterSpec("first.t:7", 6, 5, None, "GKE")
    assert detect_cluster(RunConfig(), {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) == ClusterSpec()
    with pytest.raises(UserError, match="TPU_WORKER_ID"):
        detect_cluster(RunConfig(), {"TPU_WORKER_HOSTNAMES": "localhost"})


def test_a_kubernetes_job_without_flags_is_a_single_process(caplog):
    """A warning, not an error, since a single process may be intended."""
    with caplog.at_level(logging.WARNING):
        assert (
            detect_cluster(RunConfig(), {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
            == ClusterSpec()
        )
    assert "pod 3 of a Kubernetes job, alone" in caplog.text


METADATA = {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.5,b:1:10.0.0.6", "tpu-env": "Z: 'x'"}


class Metadata(http.server.BaseHTTPRequestHandler):
    """Google's metadata server, as seen by the second machine of a slice."""

    def do_GET(self):
        name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        self.send_response(200 if name in METADATA and self.headers["Metadata-Flavor"] == "Google" else 404)
        self.end_headers()
        self.wfile.write(METADATA.get(name, "").encode())

    def log_message(self, *_):
        pass


def test_tpu_vms_ask_the_metadata_server(monkeypatch):
    """A VM without attributes of a slice is a single process; no answer is an error with a remedy."""
    monkeypatch.setattr("jax._src.cloud_tpu_init.running_in_cloud_tpu_vm", True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        host_names = ("10.0.0.5", "10.0.0.6")
        assert detect_cluster(RunConfig(), environment) == ClusterSpec(
            "10.0.0.5:20000", 2, 1, None, "Cloud TPU", host_names
        )
        slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n"
        monkeypatch.setitem(METADATA, "tpu-env", slices)
        assert detect_cluster(RunConfig(main_port=7), environment) == ClusterSpec("10.0.0.1:7", 4, 3, None, "Cloud TPU")
        monkeypatch.delitem(METADATA, "tpu-env")
        assert detect_cluster(RunConfig(), environment) == ClusterSpec()
        server.shutdown()
    with pytest.raises(UserError, match=r"^the other machines of this TPU: .*--coordinator"):
        detect_cluster(RunConfig(), environment)


def test_flags_precede_slurm_and_go_together():
    """Only some of the three flags, a coordinator without a port and an index out of range are errors."""
    run = RunConfig(coordinator="h:1", num_processes=2, process_id=1)
    assert detect_cluster(run, STEP) == ClusterSpec("h:1", 2, 1, None, "--coordinator")
    assert detect_cluster(RunConfig(), {}) == ClusterSpec()
    with pytest.raises(UserError, match=r"^--num_processes, --process_id missing"):
        detect_cluster(RunConfig(coordinator="h:1"), {})
    with pytest.raises(UserError, match="host:port"):
        detect_cluster(RunConfig(coordinator="h", num_processes=2, process_id=1), {})
    with pytest.raises(UserError, match="--process_id 2: must be 0 to 1"):
        detect_cluster(RunConfig(coordinator="h:1", num_processes=2, process_id=2), {})


def test_tasks_of_a_node_share_its_gpus():
    """All to one task, one each to eight, four each to two; one visible GPU is not split; an uneven split fails."""
    eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert task_devices(eight, 0, 1) is None
    assert task_devices(eight, 5, 8) == (5,)
    assert task_devices(eight, 1, 2) == (4, 5, 6, 7)
    assert task_devices({"CUDA_VISIBLE_DEVICES": "3"}, 1, 2) is None
    with pytest.raises(UserError, match="3 tasks"):
        task_devices(eight, 1, 3)
    assert tasks_per_node("8(x2),4") == [8, 8, 4]


def test_without_cuda_visible_devices_tasks_share_all_gpus_of_the_host(gpus):
    """As under `mpirun`, all GPUs of the host are shared; if the variable is set but empty, there are none to share."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (gpus / name).touch()
    assert task_devices({}, 1, 2) == (2, 3)
    assert task_devices({}, 1, 1) is None
    assert task_devices({"CUDA_VISIBLE_DEVICES": ""}, 1, 2) is None


def test_differences_name_at_most_five_processes():
    """Host names do not count as differences."""
    infos = [{"host": f"h{index}", "jax": "1", "flags": "a" if index < 3 else "b"} for index in range(9)]
    text = differences(infos)
    assert text.startswith("process 3 (h3) has flags b, process 0 (h0) a; process 4 ")
    assert text.endswith("process 7 (h7) has flags b, process 0 (h0) a; and 1 more")
    assert not differences(infos[:3])


def test_per_process_flags_do_not_change_the_command_hash():
    """--process_id, --cache_dir and --compile_cache may differ between processes, no other flag may."""
    base = command_hash(["train", "--lr", "1"])
    assert (
        command_hash(["train", "--process_id", "3", "--lr", "1"])
        == base
        == command_hash(["train", "--lr", "1", "--process_id=4"])
    )
    assert command_hash(["train", "--compile_cache", "/scratch/3", "--cache_dir", "/scratch/3", "--lr", "1"]) == base
    assert command_hash(["train", "--lr", "2"]) != base
    assert command_hash(["train", "--lr", "1", "--process_ids", "4"]) != base


PROXY = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}


@pytest.mark.parametrize(("host", "environment"), [("127.0.0.1", PROXY), ("[::1]", PROXY), ("[::1]", {})])
def test_processes_meet_at_ipv6_addresses_and_beside_a_proxy(processes, host, environment):
    """A proxy of the environment, at which nobody listens, is not asked for the coordinator; process 0 says so once."""
    results = {}
    for index, process in processes.start("nothing", [0, 1], 2, host=host, environment=environment).items():
        status, lines = process.end()
        results[index] = (status, sum("goes into no_proxy" in line for line in lines), lines[-1])
    assert results == {0: (0, len(environment) // 2, "done"), 1: (0, 0, "done")}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (PROXY, "node1"),
        ({"HTTPS_PROXY": "http://p:1"}, "node1"),
        (PROXY | {"no_proxy": "localhost,.org"}, "localhost,.org,node1"),
        (PROXY | {"NO_PROXY": "localhost"}, "localhost,node1"),
        (PROXY | {"no_proxy": "*"}, "*,node1"),
        (PROXY | {"no_proxy": "a, NODE1"}, None),
        (PROXY | {"https_proxy": "", "http_proxy": ""}, None),
        ({"no_proxy": "localhost"}, None),
        ({}, None),
    ],
)
def test_the_coordinator_is_added_to_no_proxy(environment, expected):
    """Only if there is a proxy and it is not excepted, as gRPC reads no_proxy; what is there already stays."""
    changed = dict(environment)
    assert bypass_proxy("node1", changed) == (expected is not None)
    assert changed == environment | ({"no_proxy": expected} if expected else {})


def test_the_variable_of_grpc_goes_before_no_proxy():
    """With no_grpc_proxy, gRPC does not read no_proxy."""
    changed = PROXY | {"no_grpc_proxy": "a", "no_proxy": "node1"}
    assert bypass_proxy("node1", changed)
    assert changed["no_grpc_proxy"] == "a,node1"


@pytest.mark.parametrize("host", ["nosuch.invalid", "a..b"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_coordinator_that_cannot_be_resolved_is_named(processes, host, index):
    """Both sides end in time, with the name and why; a name that no resolver takes is no traceback either."""
    (process,) = processes.start("nothing", [index], 2, host=host, timeout=1).values()
    status, lines = process.end()
    assert status == 2
    assert lines[0].startswith(f"{host}: the name cannot be resolved (")
    assert lines[-1].startswith("atlas: process ")
    assert f"{host}" in lines[-1]
    assert "the name cannot be resolved (" in lines[-1]


@pytest.mark.parametrize("text", ["node1", "node1:", ":1", "node1:0", "node1:65536", "::1:12345", "[]:1", "a b:1"])
def test_a_coordinator_without_host_or_port_is_refused(text):
    """An IPv6 address without brackets too: where its port begins cannot be told."""
    with pytest.raises(UserError, match=r"--coordinator .*: expected host:port, such as .* or \[2001:db8::1\]:12345"):
        detect_cluster(RunConfig(coordinator=text, num_processes=2, process_id=0))
    assert detect_cluster(RunConfig(coordinator="[::1]:5", num_processes=2, process_id=1)).coordinator == "[::1]:5"
