"""Processes find each other, and a run whose process is missing, different or gone ends with a line that names it."""

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_jax.config import RunConfig
from atlas_jax.errors import UserError
from atlas_jax.hosts import Place, command_hash, expand, find, own_devices, tasks_per_node

PROGRAM = Path(__file__).parent / "hosts_program.py"
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


def start(mode: str, indices, count: int, **environment: str) -> dict[int, subprocess.Popen]:
    """Processes of one run, on a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1]), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment
    return {
        index: subprocess.Popen(
            [sys.executable, PROGRAM, mode, address, str(count), str(index), "3"],
            **{"env": own, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        for index in indices
    }


def last_lines(processes: dict[int, subprocess.Popen]) -> dict[int, tuple[int, str]]:
    """The status and the last line of each."""
    outputs = {index: process.communicate(timeout=40)[0] for index, process in processes.items()}
    return {index: (processes[index].returncode, text.strip().splitlines()[-1]) for index, text in outputs.items()}


@pytest.mark.parametrize("missing", [0, 2])
def test_a_missing_process_is_named(missing):
    """Those that came end in time, with the same line, and without JAX's abort."""
    ended = last_lines(start("sleep", {0, 1, 2} - {missing}, 3))
    assert {status for status, _ in ended.values()} == {2}
    assert all(line.startswith(f"atlas: process {missing} ") and "did not come" in line for _, line in ended.values())


@pytest.mark.parametrize("mode", ["version", "devices"])
def test_a_different_process_is_named(mode):
    ended = last_lines(start(mode, range(2), 2))
    what = {"version": "has jax 9.9, process 0", "devices": "has devices 2 x cpu, process 0"}[mode]
    assert all(status == 2 and "process 1" in line and what in line for status, line in ended.values()), ended


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_is_lost_is_named(signum, victim):
    """Killed: at once; stopped: when it has been silent too long."""
    processes = start("sleep", range(3), 3)
    for process in processes.values():
        while process.stdout.readline().strip() != "up":
            assert process.poll() is None
    lost = processes.pop(victim)
    lost.send_signal(signum)
    ended = last_lines(processes)
    lost.kill()
    lost.communicate()
    what = "is gone" if signum == signal.SIGKILL else "has been silent for 3 s"
    assert all(status == 75 and f"process {victim} " in line and what in line for status, line in ended.values()), ended


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_ends_all(who):
    """It says what is wrong, with its own status; the others repeat it."""
    ended = last_lines(start("error", range(2), 2, WHO=str(who)))
    assert ended.pop(who) == (2, "atlas: bad.jsonl, line 3: no question")
    assert all(status == 75 and f"process {who} " in line and "no question" in line for status, line in ended.values())


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
def test_node_lists(text, names):
    """As `scontrol show hostnames` writes them."""
    assert expand(text) == names


@pytest.mark.parametrize("text", ["", "n[1-2", "n1-2]", "n[]", "n[3-1]", "n[1-]", "a,,b", "n[[1]]"])
def test_wrong_node_lists(text):
    with pytest.raises(UserError, match="node list"):
        expand(text)


def test_slurm():
    """The first node of the step, a port of the job, and an equal share of the GPUs."""
    four = STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert find(RunConfig(), four) == Place("n7:21234", 4, 3, (2, 3), "SLURM")
    assert find(RunConfig(main_port=15000), STEP).coordinator == "n7:15000"
    assert find(RunConfig(), STEP | {"SLURM_JOB_ID": "1235"}).coordinator == "n7:21235"
    assert find(RunConfig(), STEP | {"SLURM_NTASKS": "1"}) == Place()
    one_each = STEP | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1"}
    assert find(RunConfig(), one_each | {"SLURM_LOCALID": "0"}) == Place("n7:21234", 2, 1, None, "SLURM", ("n7", "n8"))


@pytest.mark.parametrize("step", [{"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}, {}])
def test_without_srun_is_one_process(step, caplog):
    """The batch script's and the shell's step, and none at all: a warning that names srun."""
    plain = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}
    with caplog.at_level(logging.WARNING):
        assert find(RunConfig(), plain | step) == Place()
    assert "one process of 8" in caplog.text
    assert "srun" in caplog.text
    caplog.clear()
    assert find(RunConfig(), plain | {"SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}) == Place()
    assert not caplog.records


def test_open_mpi():
    """The address of mpirun's host, or MASTER_ADDR; without either an error."""
    ompi = {f"OMPI_COMM_WORLD_{name}": value for name, value in {"SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items()}
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    assert find(RunConfig(main_port=7000), ompi | uri) == Place("10.96.0.1:7000", 2, 1, None, "Open MPI")
    assert find(RunConfig(main_port=7000), ompi | uri | {"MASTER_ADDR": "h"}).coordinator == "h:7000"
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find(RunConfig(), ompi)


def test_flags_come_first_and_together():
    run = RunConfig(coordinator="h:1", num_processes=2, process_id=1)
    assert find(run, STEP) == Place("h:1", 2, 1, None, "--coordinator")
    assert find(RunConfig(), {}) == Place()
    with pytest.raises(UserError, match=r"^--num_processes, --process_id missing"):
        find(RunConfig(coordinator="h:1"), {})
    with pytest.raises(UserError, match="host:port"):
        find(RunConfig(coordinator="h", num_processes=2, process_id=1), {})
    with pytest.raises(UserError, match="--process_id 2: must be 0 to 1"):
        find(RunConfig(coordinator="h:1", num_processes=2, process_id=2), {})


def test_own_devices():
    """One task: all; as many tasks as GPUs: one each; a share; one visible: that; an uneven number: refused."""
    eight = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
    assert own_devices(eight, 0, 1) is None
    assert own_devices(eight, 5, 8) == (5,)
    assert own_devices(eight, 1, 2) == (4, 5, 6, 7)
    assert own_devices({"CUDA_VISIBLE_DEVICES": "3"}, 1, 2) is None
    with pytest.raises(UserError, match="3 tasks"):
        own_devices(eight, 1, 3)
    assert tasks_per_node("8(x2),4") == [8, 8, 4]


def test_the_process_number_is_no_difference():
    base = command_hash(["train", "--lr", "1"])
    assert (
        command_hash(["train", "--process_id", "3", "--lr", "1"])
        == base
        == command_hash(["train", "--lr", "1", "--process_id=4"])
    )
    assert command_hash(["train", "--lr", "2"]) != base
