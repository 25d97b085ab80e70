"""`atlas train` against the reference: six steps of four questions, float32, without dropout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.store import load
from atlas_jax.checkpoints.weights import export_weights

RUNS = {
    "linear": ["--scheduler", "linear"],
    "cosine_refresh": ["--scheduler", "cosine", "--refresh_index", "2"],
    "fixed_queryside": ["--scheduler", "fixed", "--query_side_retriever_training", "--gold_score_mode", "adist"],
    "accumulate": ["--scheduler", "linear", "--accumulation_steps", "2", "--freeze_retriever_steps", "2"],
}
SEPARATE = ["--scheduler", "linear", "--shard_optim", "--clip", "0.05"]
FOUR_DEVICES = ["--per_gpu_batch_size", "1", "--mesh", "fsdp=4"]
SEVERAL_DEVICES = {  # the reference's runs on four devices with one question each, and where each is repeated here
    "published": [*SEPARATE, "--loss_group", "1"],
    "published_emdr": [*SEPARATE, "--gold_score_mode", "emdr", *FOUR_DEVICES],
}
COLUMNS = ("loss/reader_loss", "loss/retriever_loss", "lr", "grad_norm")


def train(folder: Path, name: str, *flags: str, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs `atlas train` on CPU devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "atlas_jax", "train", "--name", name, "--checkpoint_dir", str(folder), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "cosine_refresh"])
def test_a_trajectory_equals_the_reference(golden, tmp_path, flags, name):
    """Losses and gradient norms of all six steps, the learning rates exactly, and parameters after them."""
    done = train(tmp_path, name, *flags, *RUNS[name])
    assert done.returncode == 0, done.stderr
    compare(golden, tmp_path, name)


@pytest.mark.parametrize(("name", "devices"), [("published", 1), ("published_emdr", 4)])
def test_a_trajectory_on_several_devices_equals_the_reference(golden, tmp_path, flags, name, devices):
    """A mean loss for each of four questions, and separate clips: on one device with --loss_group 1, and on four."""
    done = train(tmp_path, name, *flags, *SEVERAL_DEVICES[name], devices=devices)
    assert done.returncode == 0, done.stderr
    compare(golden, tmp_path, name)


def compare(golden: Path, folder: Path, name: str) -> None:
    """Compares a run with the reference's trace and parameters."""
    expected = np.load(golden / f"train_{name}.npz")
    rows = metrics(folder / name)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    refreshed = [row["step"] for row in rows if "runtime/refresh_index" in row]
    assert refreshed == ([3, 5] if name == "cosine_refresh" else [])
    for row in (row for row in rows if "runtime/compile" not in row):
        parts = sum(row[f"runtime/{part}"] for part in ("retrieve", "batch", "device"))
        assert 0 < parts <= row["runtime/train_step"]
    found = np.asarray([[row.get(column, np.nan) for column in COLUMNS] for row in rows])
    np.testing.assert_allclose(found, expected["trace"], rtol=3e-4)
    assert found[:, 2].tolist() == expected["trace"][:, 2].tolist()
    weights = load(folder / name / "checkpoint" / "step-6")
    exported = export_weights(weights.params, weights.cfg)
    names = [name for name in expected.files if name.startswith("param/")]
    assert len(names) > 15
    for path in names:
        reference_name = path.removeprefix("param/").replace("/", ".")
        np.testing.assert_allclose(exported[reference_name], expected[path], rtol=1e-4, atol=2e-5, err_msg=path)


def test_the_trajectories_differ(golden):
    """The counter-case: the reference's runs differ from each other by more than the tolerance."""
    traces = [np.load(golden / f"train_{name}.npz")["trace"][-1, 0] for name in (*RUNS, *SEVERAL_DEVICES)]
    assert min(abs(a - b) / a for i, a in enumerate(traces) for b in traces[:i]) > 1e-3


def test_a_run_that_diverges_stops(tmp_path, flags, monkeypatch):
    """A huge learning rate: steps that are not finite are counted and saved, and the run ends with one line."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in less time
    done = train(tmp_path, "run", *flags, "--lr", "1e38", "--scheduler", "linear", "--max_bad_steps", "3")
    assert done.returncode == 2
    assert "not finite in 3 steps in a row" in done.stderr.splitlines()[-1]
    assert metrics(tmp_path / "run")[-1]["skipped_steps"] >= 3
    assert load(tmp_path / "run/checkpoint/latest").step == metrics(tmp_path / "run")[-1]["step"]
