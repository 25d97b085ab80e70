"""Does it learn? A small reader and a small retriever from scratch on real text, with and without retrieval.

    python benchmarks/learning.py --passages wikipedia-vital.jsonl

The question is an article's short description, the answer its title. Articles whose description no other has are split:
most are learnt from, the rest are asked; all are in the index. `atlas train` runs three times: the reader learns to
read, given the article itself; then it goes on together with a retriever that has learnt nothing, or, everything else
being equal, closed-book. Prints a line for each evaluation: run, step, losses since the line before, on the articles
that are asked exact match and F1, and for how many of them the article was among the passages read.
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
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(given.keep or temporary)
        make_data(given, work)
        base = {
            "task": "qa",
            "qa_prompt_format": "{question}",
            "target_maxlength": 16,
            "generation_max_length": 16,
            "text_maxlength": given.text_maxlength,
            "per_gpu_batch_size": 2 * given.batch,
            "dropout": 0,
            "keep": 1,
            "checkpoint_dir": work,
        }
        reading = {
            "reader_model_type": t5_folder(READER, work / "reader"),
            "train_data": work / "learnt-read.jsonl",
            "eval_data": work / "asked-read.jsonl",
            "n_context": 1,
            "lr": 3e-3,
        }
        run(work, "reading", base | reading | steps(given.reading_steps, 1), ["--shuffle", "--use_file_passages"])
        trained = ["--model_path", str(work / "reading/checkpoint/latest"), "--output", str(work / "read")]
        atlas(["convert", *trained, "--to", "huggingface"])
        flags = base | {
            "reader_model_type": work / "read/reader",
            "train_data": work / "learnt.jsonl",
            "eval_data": work / "asked.jsonl",
            "lr": given.lr,
            "per_gpu_batch_size": given.batch,
            **steps(given.steps, given.evaluations),
        }
        with_passages = {
            "retriever_model_path": untrained(contriever_folder(RETRIEVER, work / "retriever")),
            "passages": work / "passages.jsonl",
            "n_context": given.n_context,
            "retriever_n_context": given.retriever_n_context,
            "gold_score_mode": "ppmean",
            "temperature_gold": 0.1,
            "temperature_score": 0.1,
            "lr_retriever": given.lr_retriever,
            "refresh_index": given.steps // given.evaluations // 4,
        }
        run(work, "retrieval", flags | with_passages, ["--shuffle", "--train_retriever"])
        run(work, "closed-book", flags, ["--shuffle", "--closed_book"])


def steps(total: int, evaluations: int) -> dict[str, object]:
    """The flags for so many steps and evaluations."""
    every = total // evaluations
    return {
        "total_steps": total,
        "warmup_steps": total // 20,
        "log_freq": max(1, every // 10),
        "eval_freq": every,
        "save_freq": total,
    }


def untrained(folder: Path) -> Path:
    """Gives the encoder random words and no positions: until it learns, it finds texts that share words with a query.

    All random, its vectors say next to nothing of their texts: of 300 questions it finds the article of none.
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
    article = {passage["title"]: passage for passage in passages}
    for name in ("asked", "learnt"):
        parts[f"{name}-read"] = [row | {"passages": [article[row["answers"][0]]]} for row in parts[name]]
    for name, rows in parts.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(work: Path, name: str, flags: dict[str, object], switches: Sequence[str]) -> None:
    """Trains, and prints the curve."""
    argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    if atlas(["train", "--name", name, *argv, *switches, "--write_results"]):
        sys.exit(2)
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    every, total = int(str(flags["eval_freq"])), int(str(flags["total_steps"]))
    for step in range(every, total + 1, every):
        since = [line for line in lines if step - every < line["step"] <= step]
        losses = {key: [line[key] for line in since if key in line] for key in LOSSES}
        row = {key: round(statistics.mean(values), 4) for key, values in losses.items() if values}
        results = work / name / f"{Path(str(flags['eval_data'])).stem}-step-{step}"
        scores = json.loads(Path(f"{results}.metrics.json").read_text())
        row |= {key: round(scores[key], 1) for key in ("exact_match", "f1")}
        print(json.dumps({"run": name, "step": step} | row | {"found": found(Path(f"{results}.jsonl"))}), flush=True)


def found(path: Path) -> float:
    """Of the questions, the percentage whose article was among the passages read."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    hits = [any(passage["title"] in row["answers"] for passage in row["passages"]) for row in rows]
    return round(100 * statistics.mean(hits), 1)


if __name__ == "__main__":
    main()
