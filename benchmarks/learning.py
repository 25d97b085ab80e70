"""Learning curves: a small reader and retriever trained from scratch on real text, with and without retrieval.

    python benchmarks/learning.py --passages wikipedia-vital.jsonl

The question is an article's short description, the answer its title. The articles whose description is unique are split
into training ("learnt") and evaluation ("asked"); all articles are in the index. `atlas train` runs three times: the
reader learns to read, given the article itself; then it trains on jointly with an untrained retriever, or closed-book
with the same settings. Prints a line for each evaluation: run, step, mean losses since the line before, exact match and
F1 on the evaluation questions, and the percentage of them whose article was among the passages that the reader got.
"""

import argparse
import collections
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from shapes import contriever_folder, t5_folder

from atlas_jax.checkpoints.formats.safetensors_file import write_safetensors
from atlas_jax.checkpoints.weights import export_weights
from atlas_jax.commands.main import main as atlas
from atlas_jax.models.atlas import AtlasConfig, AtlasModel
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config

READER = T5Config(64, 4, 16, 256, 2, 2, vocab_size=2048, gated=False, tied=True)
RETRIEVER = ContrieverConfig(d_model=128, num_heads=2, d_ff=128, num_layers=1, vocab_size=1500)

LOSSES = ("loss/reader_loss", "loss/retriever_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", required=True, help="jsonl rows with id, title, text, description")
    parser.add_argument("--asked", type=int, default=500, help="articles that are asked and not learnt from")
    parser.add_argument("--reading_steps", type=int, default=1500, help="of learning to read, before anything is found")
    parser.add_argument("--steps", type=int, default=2000, help="of each of the two runs that follow")
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--words", type=int, default=16, help="of an article's text that are kept")
    parser.add_argument("--text_maxlength", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--n_context", type=int, default=1, help="passages that the reader reads")
    parser.add_argument("--retriever_n_context", type=int, default=8, help="passages that the retriever learns from")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--lr_retriever", type=float, default=1e-3)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the runs there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        write_data(args, folder)
        common_flags = {
            "task": "qa",
            "qa_prompt_format": "{question}",
            "target_maxlength": 16,
            "generation_max_length": 16,
            "text_maxlength": args.text_maxlength,
            "per_gpu_batch_size": 2 * args.batch,
            "dropout": 0,
            "keep": 1,
            "checkpoint_dir": folder,
        }
        reading_flags = {
            "reader_model_type": t5_folder(READER, folder / "reader"),
            "train_data": folder / "learnt-read.jsonl",
            "eval_data": folder / "asked-read.jsonl",
            "n_context": 1,
            "lr": 3e-3,
        }
        train(
            folder,
            "reading",
            common_flags | reading_flags | schedule_flags(args.reading_steps, 1),
            ["--shuffle", "--use_file_passages", "--random_weights"],
        )
        trained_reader = ["--model_path", str(folder / "reading/checkpoint/latest"), "--output", str(folder / "read")]
        atlas(["convert", *trained_reader, "--to", "huggingface"])
        task_flags = common_flags | {
            "reader_model_type": folder / "read/reader",
            "train_data": folder / "learnt.jsonl",
            "eval_data": folder / "asked.jsonl",
            "lr": args.lr,
            "per_gpu_batch_size": args.batch,
            **schedule_flags(args.steps, args.evaluations),
        }
        retrieval_flags = {
            "retriever_model_path": init_retriever(contriever_folder(RETRIEVER, folder / "retriever")),
            "passages": folder / "passages.jsonl",
            "n_context": args.n_context,
            "retriever_n_context": args.retriever_n_context,
            "gold_score_mode": "ppmean",
            "temperature_gold": 0.1,
            "temperature_score": 0.1,
            "lr_retriever": args.lr_retriever,
            "refresh_index": args.steps // args.evaluations // 4,
        }
        train(folder, "retrieval", task_flags | retrieval_flags, ["--shuffle", "--train_retriever"])
        train(folder, "closed-book", task_flags, ["--shuffle", "--closed_book"])


def schedule_flags(total: int, evaluations: int) -> dict[str, object]:
    """Returns the flags for a run of `total` steps with evenly spaced evaluations."""
    eval_freq = total // evaluations
    return {
        "total_steps": total,
        "warmup_steps": total // 20,
        "log_freq": max(1, eval_freq // 10),
        "eval_freq": eval_freq,
        "save_freq": total,
    }


def init_retriever(folder: Path) -> Path:
    """Writes weights with random word embeddings and no positions, which retrieve texts that share words with a query.

    Vectors of a fully random encoder hardly depend on the text: for 300 questions, it retrieves the article of none.
    """
    cfg = AtlasConfig(None, RETRIEVER)
    model = AtlasModel(cfg, rngs=nnx.Rngs(0))
    encoder = model.retriever.encoder
    encoder.words.embedding[...] *= 5
    for table in (encoder.positions, encoder.token_types):
        table.embedding[...] *= 0
    params = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    arrays = {name.split(".", 2)[2]: array for name, array in export_weights(params, cfg).items()}
    write_safetensors(folder / "model.safetensors", arrays, lambda _: None)
    return folder


def write_data(args: argparse.Namespace, folder: Path) -> None:
    """Writes passages, training questions (learnt*.jsonl) and evaluation questions (asked*.jsonl) to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(args.passages, encoding="utf-8") as file:
        articles = [json.loads(line) for line in file]
    description_counts = collections.Counter(article["description"] for article in articles)
    questions = [
        {"question": article["description"], "answers": [article["title"]]}
        for article in articles
        if article["description"] and description_counts[article["description"]] == 1
    ]
    random.Random(0).shuffle(questions)
    passages = [
        {"id": article["id"], "title": article["title"], "text": " ".join(article["text"].split()[: args.words])}
        for article in articles
    ]
    parts = {"passages": passages, "asked": questions[: args.asked], "learnt": questions[args.asked :]}
    passage_by_title = {passage["title"]: passage for passage in passages}
    for name in ("asked", "learnt"):
        parts[f"{name}-read"] = [row | {"passages": [passage_by_title[row["answers"][0]]]} for row in parts[name]]
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(folder: Path, name: str, flags: dict[str, object], switches: Sequence[str]) -> None:
    """Runs `atlas train` and prints a line of scores for each evaluation."""
    argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    if atlas(["train", "--name", name, *argv, *switches, "--write_results"]):
        sys.exit(2)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    eval_freq, total_steps = int(str(flags["eval_freq"])), int(str(flags["total_steps"]))
    for step in range(eval_freq, total_steps + 1, eval_freq):
        since_last = [line for line in lines if step - eval_freq < line["step"] <= step]
        losses = {key: [line[key] for line in since_last if key in line] for key in LOSSES}
        row = {key: round(statistics.mean(values), 4) for key, values in losses.items() if values}
        results = folder / name / f"{Path(str(flags['eval_data'])).stem}-step-{step}"
        scores = json.loads(Path(f"{results}.metrics.json").read_text())
        row |= {key: round(scores[key], 1) for key in ("exact_match", "f1")}
        print(
            json.dumps({"run": name, "step": step} | row | {"found": retrieval_hit_rate(Path(f"{results}.jsonl"))}),
            flush=True,
        )


def retrieval_hit_rate(path: Path) -> float:
    """Returns the percentage of questions whose article was among the passages that the reader got."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    hits = [any(passage["title"] in row["answers"] for passage in row["passages"]) for row in rows]
    return round(100 * statistics.mean(hits), 1)


if __name__ == "__main__":
    main()
