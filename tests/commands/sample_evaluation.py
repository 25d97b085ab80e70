"""Command lines of `atlas evaluate` on a part of the bundled sample, and helpers for the files around them."""

import json
import shutil
from pathlib import Path

import atlas_jax

ROOT = Path(atlas_jax.__file__).parents[1]
SAMPLE = ROOT / "atlas_jax" / "sample"
ROWS = [json.loads(line) for line in (SAMPLE / "mmlu.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
ROWS[1] |= {
    "options": {"A": "25", "B": "5", "C": "6", "D": "5"},
    "answer": "D",
}  # B and D are equal, as in 9 questions of MMLU
PASSAGES = [json.loads(line) for line in (SAMPLE / "passages.jsonl").read_text(encoding="utf-8").splitlines()[:30]]


def to_jsonl(rows: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def write_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def evaluate_argv(folder: Path, **flags: object) -> list[str]:
    """Arguments of `atlas evaluate` on two questions and thirty passages, which are written into `folder`.

    `flags` replace the defaults; None or False leaves a flag out, True passes it without a value.
    """
    eval_data, passages = folder / "eval.jsonl", folder / "passages.jsonl"
    for file, rows in ((eval_data, ROWS), (passages, PASSAGES)):
        if not file.exists():
            write_file(file, to_jsonl(rows))
    all_flags: dict[str, object] = {
        **{"name": "run", "checkpoint_dir": folder / "runs", "eval_data": eval_data, "passages": passages},
        **{"model_path": SAMPLE / "model", "task": "multiple_choice", "multiple_choice_eval_permutations": "cyclic"},
        **{"reader_model_type": SAMPLE / "reader", "retriever_model_path": SAMPLE / "retriever"},
        **{"n_context": 2, "text_maxlength": 64, "generation_max_length": 3, "write_results": True},
        **flags,
    }
    argv = ["evaluate"]
    for flag, value in all_flags.items():
        if value is not None and value is not False:
            argv += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return argv


def omit(flags: str) -> dict[str, None]:
    """Flags of `evaluate_argv` to leave out."""
    return dict.fromkeys(flags.split())


CLOSED_BOOK = {"closed_book": True, **omit("passages retriever_model_path")}  # no retriever, no index


def unfinished_files(folder: Path) -> list[Path]:
    """Temporary files, predictions and scores, none of which a run that fails may leave behind."""
    temporary = [path for path in folder.rglob(".*") if path.suffix in (".draft", ".old") or ".scratch-" in path.name]
    return temporary + list(folder.rglob("*-step-1.jsonl")) + list(folder.rglob("*.metrics.json"))


def copy_published_index(folder: Path, golden: Path, **changes: bytes | None) -> Path:
    """Copies the golden index of four shards, with the content of some files changed or, by None, the file left out.

    Keys of `changes` are file names with _ for dots.
    """
    shutil.copytree(golden / "index_4shards", folder)
    for name, content in changes.items():
        path = folder / name.replace("_", ".")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return folder
