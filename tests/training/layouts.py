"""Trains and evaluates on every mesh with 1, 2 and 4 processes, and compares with one device: `make layouts`.

    python -m tests.training.layouts --runs linear flat --meshes model=4 --processes 2

Eight questions a step, shuffled, with dropout, on eight devices (`model=4`: four). A run is begun and ended on a
layout, and then ended once more by the layout after it, from the checkpoint in the middle.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.training import killing
from tests.training.test_loop import COLUMNS, RUNS

GOLDEN = killing.GOLDEN
# and their questions a device of the batch axes
MESHES = {"data=8": 1, "fsdp=8": 1, "model=4": 8, "data=2,fsdp=2,model=2": 2, "fsdp=4,passages=2": 2}
# Codes that centroids decide would change with the last bit of a vector, so training has the exact kind
FAISS = "--index_mode faiss --refresh_index 2 --freeze_retriever_steps 2"
TRAININGS = RUNS | {"linear_faiss": ["--scheduler", "linear", *FAISS.split()]}
INDEXES = {"flat": ["--index_mode", "flat"], "faiss": ["--index_mode", "faiss", "--faiss_index_type", "ivfsq"]}
ATLAS = [sys.executable, "-m", "atlas_jax"]
MODEL = {
    "--task": "qa",
    "--model_path": str(GOLDEN / "checkpoint_initial"),
    "--reader_model_type": str(GOLDEN / "assets/reader"),
    "--retriever_model_path": str(GOLDEN / "assets/retriever"),
    "--passages": str(GOLDEN / "passages.jsonl"),
    "--n_context": "4",
    "--retriever_n_context": "4",
    "--text_maxlength": "96",
    "--target_maxlength": "16",
}
TRAINING = {
    "--train_data": str(GOLDEN / "qa.jsonl"),
    "--temperature_gold": "0.1",
    "--temperature_score": "0.1",
    "--total_steps": "6",
    "--save_freq": "3",
    "--warmup_steps": "3",
    "--lr": "1e-3",
    "--lr_retriever": "3e-4",
    "--log_freq": "1",
}
EVALUATION = {"--generation_max_length": "6"}
LEARNT = "learnt/"  # before the path of a parameter: by how much its last three steps changed it


def listed(flags: dict[str, str]) -> list[str]:
    return [text for flag, value in flags.items() for text in (flag, value)]


def run(command: list[str], folder: Path, mesh: str, processes: int) -> None:
    """Runs a command on a mesh, or on one device if `mesh` is empty; an exit status other than 0 is an error."""
    folder.mkdir(parents=True, exist_ok=True)
    devices = int(np.prod([int(axis.split("=")[1]) for axis in mesh.split(",")])) if mesh else 1
    queries = MESHES.get(mesh, 8)
    layout = ["--per_gpu_batch_size", str(queries), *(["--mesh", mesh] if mesh else [])]
    started = killing.start_processes([*command, *layout], folder / "log.txt", processes, devices // processes)
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise AssertionError(f"{statuses}: {(folder / 'log.txt').read_text()[-2000:]}")


def train(name: str, folder: Path, mesh: str = "", processes: int = 1) -> dict[str, np.ndarray]:
    """Resumes the run of that folder or starts it; returns its last parameters and metrics."""
    from atlas_jax.checkpoints.store import load

    flags = [*listed(MODEL | TRAINING), "--train_retriever", "--shuffle", *TRAININGS[name]]
    command = [*ATLAS, "train", "--name", "run", "--checkpoint_dir", str(folder), *flags]
    run(command, folder, mesh, processes)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    trace = {column: np.asarray([row[column] for row in rows if column in row]) for column in COLUMNS}
    middle, end = (load(folder / f"run/checkpoint/step-{step}").params for step in (3, 6))
    return trace | dict(end) | {LEARNT + path: array - middle[path] for path, array in end.items()}


def back_to_the_middle(folder: Path) -> None:
    """Restores the files of a run that was killed after it had saved step 3."""
    checkpoints = folder / "run/checkpoint"
    shutil.rmtree(checkpoints / "step-6")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step-3")


def evaluate(name: str, folder: Path, mesh: str = "", processes: int = 1) -> dict[str, np.ndarray]:
    """Evaluates seven questions, a number that no axis divides; returns answers and passages."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = (GOLDEN / "qa.jsonl").read_text().splitlines(keepends=True)[:7]
    (folder / "rows.jsonl").write_text("".join(rows))
    flags = [*listed(MODEL | EVALUATION), "--eval_data", str(folder / "rows.jsonl"), *INDEXES[name], "--write_results"]
    command = [*ATLAS, "evaluate", "--name", "run", "--checkpoint_dir", str(folder), *flags]
    run(command, folder, mesh, processes)
    lines = [json.loads(line) for line in (folder / "run/rows-step-1.jsonl").read_text().splitlines()]
    scores = json.loads((folder / "run/rows-step-1.metrics.json").read_text())
    passages = [passage for line in lines for passage in line["passages"]]
    return {
        "answers": np.asarray([line["generation"] for line in lines]),
        "passages": np.asarray([passage["id"] for passage in passages]),
        "eval_loss": np.asarray(scores["eval_loss"]),
        "exact_match": np.asarray(scores["exact_match"]),
    }


def difference(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference, in units of its tolerance, and where it is.

    That is 3e-4 of each number, and of a parameter 5e-3 of what it has learnt, as norms: AdamW makes whole steps of
    gradients that are nothing but rounding, and one device with other options of its compiler comes to 2.3e-3. What
    learns nothing has to be the same.
    """
    assert found.keys() == wanted.keys()
    worst = 0.0, ""
    for name, array in wanted.items():
        if name.startswith(LEARNT):
            continue
        if array.dtype.kind in "US":
            assert (found[name] == array).all(), name
            continue
        assert found[name].shape == array.shape, name
        apart = found[name] - array
        if LEARNT + name in wanted:
            apart, allowed = np.linalg.norm(apart), 5e-3 * np.linalg.norm(wanted[LEARNT + name])
        else:
            allowed = 3e-4 * np.abs(array)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(apart == 0, 0.0, np.abs(apart) / allowed)
        worst = max(worst, (float(np.max(np.where(np.isnan(shares), np.inf, shares), initial=0.0)), name))
    return worst


def main() -> None:
    """Prints a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=[*TRAININGS, *INDEXES], choices=[*TRAININGS, *INDEXES])
    parser.add_argument("--meshes", nargs="+", default=[*MESHES], choices=[*MESHES])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    given = parser.parse_args()
    layouts, failed = list(itertools.product(given.meshes, given.processes)), 0

    def report(name: str, layout: str, worst: tuple[float, str]) -> None:
        nonlocal failed
        equal = worst[0] < 1
        failed += not equal
        said = f"{worst[0]:.2f} of the tolerance at {worst[1]}"
        print(f"{'equal' if equal else 'DIFFERENT'} ({said}): {name}, {layout}", flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        for name in given.runs:
            here = train if name in TRAININGS else evaluate
            wanted = here(name, Path(temporary) / name / "one")
            before = None
            for number, (mesh, processes) in enumerate(layouts):
                layout, folder = f"{mesh} on {processes} processes", Path(temporary) / name / str(number)
                report(name, layout, difference(here(name, folder, mesh, processes), wanted))
                if before and name in TRAININGS:
                    back_to_the_middle(before[1])
                    worst = difference(here(name, before[1], mesh, processes), wanted)
                    report(name, f"begun by {before[0]}, ended by {layout}", worst)
                before = layout, folder
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
