"""Does it learn? A small reader and retriever from scratch on real text, with and without retrieval.

    python benchmarks/learning.py --passages wikipedia-vital.jsonl

The question is an article's short description, the answer its title. Articles whose description no other has are split:
most are learnt from, the rest are asked; all are in the index. `atlas train` runs twice, once with passages and once
closed-book, everything else being equal. Prints a line for each evaluation: run, step, losses since the line before,
exact match and F1 on the articles that are asked.
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

from shapes import contriever_folder, t5_folder

from atlas_jax import cli
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config

READER = T5Config(64, 4, 16, 256, 2, 2, vocab_size=2048, gated=False, tied=True)
RETRIEVER = ContrieverConfig(d_model=64, num_heads=4, d_ff=256, num_layers=2, vocab_size=1500)

LOSSES = ("loss/reader_loss", "loss/retriever_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", required=True, help="jsonl rows with id, title, text, description")
    parser.add_argument("--asked", type=int, default=500, help="articles that are asked and not learnt from")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--evaluations", type=int, default=6)
    parser.add_argument("--words", type=int, default=12, help="of an article's text that are kept")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--n_context", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--keep", metavar="FOLDER", help="keep the two runs there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(given.keep or temporary)
        make_data(given, work)
        every = given.steps // given.evaluations
        flags = {
            "reader_model_type": t5_folder(READER, work / "reader"),
            "retriever_model_path": contriever_folder(RETRIEVER, work / "retriever"),
            "train_data": work / "learnt.jsonl",
            "eval_data": work / "asked.jsonl",
            "task": "qa",
            "qa_prompt_format": "{question}",
            "target_maxlength": 16,
            "generation_max_length": 16,
            "text_maxlength": 48,
            "per_gpu_batch_size": given.batch,
            "total_steps": given.steps,
            "warmup_steps": given.steps // 20,
            "lr": given.lr,
            "dropout": 0,
            "log_freq": max(1, every // 10),
            "eval_freq": every,
            "save_freq": given.steps,
            "keep": 1,
            "checkpoint_dir": work,
        }
        with_passages = {
            "passages": work / "passages.jsonl",
            "n_context": given.n_context,
            "retriever_n_context": given.n_context,
            "gold_score_mode": "ppmean",
            "temperature_gold": 0.1,
            "temperature_score": 0.1,
            "lr_retriever": given.lr / 10,
            "refresh_index": every,
        }
        run(work, "retrieval", flags | with_passages, ["--shuffle", "--train_retriever"], every)
        run(work, "closed-book", flags, ["--shuffle", "--closed_book"], every)


def make_data(given: argparse.Namespace, work: Path) -> None:
    """Writes the passages, and the questions that are learnt and that are asked."""
    work.mkdir(parents=True, exist_ok=True)
    with open(given.passages, encoding="utf-8") as file:
        articles = [json.loads(line) for line in file]
    count = collections.Counter(article["description"] for article in articles)
    questions = [
        {"question": article["description"], "answers": [article["title"]]}
        for article in articles
        if article["description"] and count[article["description"]] == 1
    ]
    random.Random(0).shuffle(questions)
    passages = [
        {"id": a["id"], "title": a["title"], "text": " ".join(a["text"].split()[: given.words])} for a in articles
    ]
    parts = {"passages": passages, "asked": questions[: given.asked], "learnt": questions[given.asked :]}
    for name, rows in parts.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(work: Path, name: str, flags: dict[str, object], switches: Sequence[str], every: int) -> None:
    """Trains, and prints the curve."""
    argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    if cli.main(["train", "--name", name, *argv, *switches]):
        sys.exit(2)
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    for step in range(every, int(str(flags["total_steps"])) + 1, every):
        since = [line for line in lines if step - every < line["step"] <= step]
        scores = json.loads((work / name / f"asked-step-{step}.metrics.json").read_text())
        losses = {key: [line[key] for line in since if key in line] for key in LOSSES}
        row = {key: round(statistics.mean(values), 4) for key, values in losses.items() if values}
        print(json.dumps({"run": name, "step": step} | row | {k: scores[k] for k in ("exact_match", "f1")}), flush=True)


if __name__ == "__main__":
    main()
