"""`atlas evaluate` on pieces of the sample, as tests call it."""

import json
import shutil
from pathlib import Path

import atlas_jax

ROOT = Path(atlas_jax.__file__).parents[1]
SAMPLE = ROOT / "atlas_jax" / "sample"
ROWS = [json.loads(line) for line in (SAMPLE / "mmlu.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
ROWS[1] |= {"options": {"A": "25", "B": "5", "C": "6", "D": "5"}, "answer": "D"}  # B and D are equal, as in 9 of MMLU
PASSAGES = [json.loads(line) for line in (SAMPLE / "passages.jsonl").read_text(encoding="utf-8").splitlines()[:30]]


def lines(rows: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def put(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def command(folder: Path, **flags: object) -> list[str]:
    """`atlas evaluate` on two questions and thirty passages in `folder`; `flags` win, None leaves one out."""
    eval_data, passages = folder / "eval.jsonl", folder / "passages.jsonl"
    for file, rows in ((eval_data, ROWS), (passages, PASSAGES)):
        if not file.exists():
            put(file, lines(rows))
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


def without(flags: str) -> dict[str, None]:
    return dict.fromkeys(flags.split())


CLOSED_BOOK = {"closed_book": True, **without("passages retriever_model_path")}  # no retriever, no index


def leftovers(folder: Path) -> list[Path]:
    """What an interrupted run must not leave."""
    hidden = [path for path in folder.rglob(".*") if path.suffix in (".draft", ".old") or ".scratch-" in path.name]
    return hidden + list(folder.rglob("*-step-1.jsonl")) + list(folder.rglob("*.metrics.json"))


def published(folder: Path, golden: Path, **changes: bytes | None) -> Path:
    """The golden index of four shards with files changed or, by None, left out; keys are file names with _ for dots."""
    shutil.copytree(golden / "index_4shards", folder)
    for name, content in changes.items():
        path = folder / name.replace("_", ".")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return folder
