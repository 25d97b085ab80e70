"""Kills training runs at random moments and starts them again; `make soak` does so a hundred times.

    python tests/training/killing.py --kills 100 [--processes 2]

A killed run must end with the parameters, bit for bit, and the metrics of an uninterrupted run. Of several processes
one is killed, and the others must end by themselves.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 12


def command(name: str, folder: Path, *extra_flags: str) -> list[str]:
    """The command of a run with shuffling and dropout that trains both models, refreshes, evaluates and saves."""
    flags = {
        "--name": name,
        "--checkpoint_dir": str(folder),
        "--task": "qa",
        "--train_data": str(GOLDEN / "qa.jsonl"),
        "--eval_data": str(folder / "eval.jsonl"),
        "--model_path": str(GOLDEN / "checkpoint_initial"),
        "--reader_model_type": str(GOLDEN / "assets/reader"),
        "--retriever_model_path": str(GOLDEN / "assets/retriever"),
        "--passages": str(GOLDEN / "passages.jsonl"),
        "--per_gpu_batch_size": "5",  # which does not divide the 24 rows
        "--n_context": "2",
        "--retriever_n_context": "3",
        "--text_maxlength": "64",
        "--target_maxlength": "16",
        "--generation_max_length": "4",
        "--temperature_gold": "0.1",
        "--temperature_score": "0.1",
        "--freeze_retriever_steps": "3",  # during which passages are retrieved a step ahead
        "--refresh_index": "4",
        "--total_steps": str(STEPS),
        "--warmup_steps": "2",
        "--lr": "1e-3",
        "--lr_retriever": "1e-3",
        "--log_freq": "3",
        "--save_freq": "2",
        "--eval_freq": "5",
        "--select_by": "eval:eval_loss",  # differs at each evaluation
        "--compile_cache": str(folder / "programs"),
    }
    arguments = [text for flag, value in flags.items() for text in (flag, value)]
    return [sys.executable, "-m", "atlas_jax", "train", *arguments, "--shuffle", "--train_retriever", *extra_flags]


def start(name: str, folder: Path, *extra_flags: str, processes: int = 1) -> list[subprocess.Popen]:
    """The run, with one device a process."""
    return start_processes(command(name, folder, *extra_flags), folder / f"{name}.log", processes)


def start_processes(command: list[str], log: Path, processes: int, devices: int = 1) -> list[subprocess.Popen]:
    """Starts processes of one run, each with a log file of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hosts = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(processes), "--host_timeout", "60"]
    started = []
    for index in range(processes):
        extra_flags = [*hosts, "--process_id", str(index)] if processes > 1 else []
        with log.with_suffix(f".{index}{log.suffix}" if index else log.suffix).open("a") as out:
            started.append(subprocess.Popen([*command, *extra_flags], stdout=out, stderr=out, env=environment))
    return started


def prepare(folder: Path) -> Path:
    """Writes the files that the runs read."""
    rows = (GOLDEN / "qa.jsonl").read_text().splitlines(keepends=True)[:3]
    (folder / "eval.jsonl").write_text("".join(rows))
    return folder


def finish(name: str, folder: Path, *extra_flags: str, processes: int = 1) -> float:
    """Runs to the end; returns the seconds it took."""
    began = time.monotonic()
    statuses = [process.wait() for process in start(name, folder, *extra_flags, processes=processes)]
    assert not any(statuses), (statuses, (folder / f"{name}.log").read_text()[-3000:])
    return time.monotonic() - began


def run_with_kills(
    name: str,
    folder: Path,
    kills: int,
    seconds: float,
    rng: random.Random,
    signals=(signal.SIGKILL,),
    processes: int = 1,
) -> int:
    """Kills the run at random moments of its first `seconds`, then lets it end; returns how often it was killed."""
    kill_count = 0
    for _ in range(kills):
        run = start(name, folder, processes=processes)
        victim = rng.choice(run)
        try:
            status = victim.wait(rng.uniform(0.0, seconds))
            assert status == 0, (status, (folder / f"{name}.log").read_text()[-3000:])  # the run had finished
            break
        except subprocess.TimeoutExpired:
            victim.send_signal(rng.choice(signals))
            for process in run:
                process.wait(120)
            kill_count += 1
    finish(name, folder, processes=processes)
    return kill_count


def outcome(run: Path) -> tuple[dict[str, np.ndarray], list[dict], dict]:
    """The last parameters, the metrics without times, and the best step, to which `checkpoint/best` links."""
    from atlas_jax.checkpoints.store import load

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("runtime/")} for line in lines]
    best = json.loads((run / "best.json").read_text())
    assert os.readlink(run / "checkpoint/best") == f"step-{best['step']}"
    assert load(run / "checkpoint/best").step == best["step"]
    return load(run / f"checkpoint/step-{STEPS}").params, metrics, best


def same(first: Path, second: Path) -> bool:
    """Whether two runs have bitwise equal parameters, equal metrics, and the same best step with the same scores."""
    (params, *rest), (others, *other_rest) = outcome(first), outcome(second)
    equal = params.keys() == others.keys() and all(x.tobytes() == others[p].tobytes() for p, x in params.items())
    return equal and rest == other_rest


def main() -> None:
    """Kills until --kills kills are done; exit status 1 if a run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    rng, kills, runs, different = random.Random(arguments.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(Path(temporary))
        finish("warm", folder, processes=arguments.processes)
        seconds = finish("whole", folder, processes=arguments.processes)
        signals = signal.SIGKILL, signal.SIGTERM
        while kills < arguments.kills:
            name = f"killed-{runs}"
            limit = min(10, arguments.kills - kills)
            kills += run_with_kills(name, folder, limit, 1.1 * seconds, rng, signals, arguments.processes)
            runs += 1
            different += not same(folder / "whole", folder / name)
            print(f"{kills} kills, {runs} runs, {different} different", flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
