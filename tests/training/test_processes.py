"""Several processes train and evaluate one model with the results of one process; a killed one is named."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.training.resume import batch_flags
from tests.training import killing
from tests.training.test_loop import RUNS, compare

ATLAS = [sys.executable, "-m", "atlas_jax"]

pytestmark = pytest.mark.usefixtures("quick_compiler_in_subprocesses")


def wait_and_read(processes: list[subprocess.Popen], log: Path) -> tuple[list[int], str]:
    """Waits until the processes end by themselves; returns their exit statuses and the output of the first."""
    return [process.wait(180) for process in processes], log.read_text()


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen], log: Path) -> None:
    """Waits until the condition holds; fails if a process ends before."""
    while not condition():
        assert all(process.poll() is None for process in processes), log.read_text()
        time.sleep(0.02)


def test_a_trajectory_does_not_depend_on_processes_and_devices(golden, tmp_path, flags):
    """A run started by two processes with four devices each, and finished by one with one device, equals the reference.

    On the way a process is killed, a bit of the newest checkpoint is flipped, and SIGTERM is sent: each time the run
    resumes from the newest complete checkpoint. The counter-case: another number of queries a step is refused.
    """
    name, log, run = "cosine_refresh", tmp_path / "log.txt", tmp_path / "cosine_refresh"
    command = [
        *ATLAS,
        "train",
        "--name",
        name,
        "--checkpoint_dir",
        str(tmp_path),
        *flags,
        *RUNS[name],
        "--loss_group",
        "4",
    ]
    parallel_command = [*command, "--per_gpu_batch_size", "1", "--mesh", "data=2,fsdp=2,model=2", "--save_freq", "1"]

    processes = killing.start_processes(parallel_command, log, 2, devices=4)
    wait_for((run / "checkpoint/step-2").exists, processes, log)
    processes[1].kill()
    statuses, output = wait_and_read(processes, log)
    assert statuses == [75, -signal.SIGKILL]
    assert output.splitlines()[-1].startswith("atlas: process 1 (")
    assert "is gone: it was killed or its host failed" in output.splitlines()[-1]

    newest = max((run / "checkpoint").glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))
    chunk = max((newest / "training/reader/nu/reader/embed/embedding").glob("0*"))
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])

    processes = killing.start_processes(parallel_command, log, 2, devices=4)
    wait_for(lambda: f"going on from {run}/checkpoint/step-" in log.read_text(), processes, log)
    refused = rf"{newest.name} is damaged, step-\d is tried next: .*/nu/.* is not what was saved"
    assert re.search(refused, log.read_text())
    processes[1].send_signal(signal.SIGTERM)
    statuses, output = wait_and_read(processes, log)
    assert statuses == [128 + signal.SIGTERM] * 2
    assert "interrupted by SIGTERM; the same command goes on from its newest checkpoint" in output.splitlines()[-1]

    mismatched = killing.start_processes([*command, "--per_gpu_batch_size", "8"], tmp_path / "other.txt", 1)
    statuses, output = wait_and_read(mismatched, tmp_path / "other.txt")
    assert statuses == [2]
    assert "a run of 4 queries a step, not 8; go on with --per_gpu_batch_size" in output
    statuses, output = wait_and_read(killing.start_processes(command, log, 1), log)
    assert statuses == [0]
    assert output.count("going on from") == 2
    compare(golden, tmp_path, name)


def test_an_evaluation_does_not_depend_on_processes(golden, tmp_path):
    """Three processes and a number of rows that 3 does not divide: each row once, with the passages of one process."""
    rows = (golden / "qa.jsonl").read_text().splitlines(keepends=True)[:7]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = ["--task", "qa", "--eval_data", str(tmp_path / "rows.jsonl"), "--write_results", "--n_context", "3"]
    flags += ["--model_path", str(golden / "checkpoint_initial"), "--passages", str(golden / "passages.jsonl")]
    flags += ["--reader_model_type", str(golden / "assets/reader"), "--generation_max_length", "6"]
    flags += ["--retriever_model_path", str(golden / "assets/retriever"), "--text_maxlength", "64"]
    flags += ["--index_mode", "faiss", "--faiss_index_type", "ivfsq", "--checkpoint_dir", str(tmp_path)]
    found = []
    for count in (1, 3):
        command = [*ATLAS, "evaluate", *flags, "--name", f"run-{count}", "--per_gpu_batch_size", str(6 // count)]
        log = tmp_path / f"log-{count}.txt"
        statuses, output = wait_and_read(killing.start_processes(command, log, count), log)
        assert statuses == [0] * count, output
        run = tmp_path / f"run-{count}"
        lines = [json.loads(line) for line in (run / "rows-step-1.jsonl").read_text().splitlines()]
        assert len(lines) == len(rows)
        assert all(json.loads(row)["question"] in line["query"] for line, row in zip(lines, rows, strict=True))
        scores = json.loads((run / "rows-step-1.metrics.json").read_text())
        selected = {name: scores[name] for name in ("exact_match", "f1", "examples", "prompts")}
        passages = [[passage["id"] for passage in line["passages"]] for line in lines]
        found.append((selected, [line["generation"] for line in lines], passages, scores["eval_loss"]))
        assert sorted(path.name for path in run.iterdir()) == [
            "config.json",
            "rows-step-1.jsonl",
            "rows-step-1.metrics.json",
            "run.log",
        ]
    (*results, loss), (*other_results, other_loss) = found
    assert results == other_results
    assert abs(loss - other_loss) < 1e-4 * loss
    assert len({str(ids) for ids in results[2]}) > 1


@pytest.mark.parametrize("mode", ["flat", "faiss"])
def test_a_process_killed_in_a_search_is_named(golden, tmp_path, mode):
    """The other process ends without results; the same command run again writes them, and no other files."""
    run, log, rows = tmp_path / "run", tmp_path / "log.txt", tmp_path / "rows.jsonl"
    rows.write_text(30 * (golden / "qa.jsonl").read_text())
    flags = ["--task", "qa", "--eval_data", str(rows), "--retrieve_only", "--write_results"]
    flags += ["--model_path", str(golden / "checkpoint_initial"), "--passages", str(golden / "passages.jsonl")]
    flags += ["--reader_model_type", str(golden / "assets/reader"), "--text_maxlength", "64", "--n_context", "3"]
    flags += ["--retriever_model_path", str(golden / "assets/retriever"), "--index_mode", mode]
    command = [*ATLAS, "evaluate", *flags, "--checkpoint_dir", str(tmp_path), "--name", "run"]
    processes = killing.start_processes(command, log, 2)
    wait_for(lambda: "compiled query encoder" in log.read_text(), processes, log)
    processes[1].kill()
    statuses, output = wait_and_read(processes, log)
    assert statuses == [75, -signal.SIGKILL], output
    assert "atlas: process 1 (" in output.splitlines()[-1]
    assert not list(run.glob("rows*"))
    statuses, output = wait_and_read(killing.start_processes(command, log, 2), log)
    assert statuses == [0, 0], output
    results = {"rows-step-1.jsonl", "rows-step-1.metrics.json"}
    assert {path.name for path in run.iterdir()} == {"config.json", "run.log"} | results
    lines = [json.loads(line) for line in (run / "rows-step-1.jsonl").read_text().splitlines()]
    assert len(lines) == 30 * 24
    assert {len(line["passages"]) for line in lines} == {3}


@pytest.mark.parametrize(
    ("queries", "devices", "flags"),
    [
        (8, 64, "--per_gpu_batch_size 1 --mesh fsdp=8,passages=8"),
        (8, 2, "--per_gpu_batch_size 4 --mesh fsdp=2"),
        (6, 4, "--per_gpu_batch_size 3 --mesh fsdp=2,passages=2"),
    ],
)
def test_the_message_names_flags_for_another_number_of_devices(queries, devices, flags):
    """The named flags keep the queries of a step, also if there are more devices than queries."""
    assert batch_flags(queries, devices) == flags
    sizes = [int(size) for size in re.findall(r"=(\d+)", flags)]
    assert (int(flags.split()[1]) * sizes[0], np.prod(sizes)) == (queries, devices)
