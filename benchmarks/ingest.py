"""How fast indexes and passages come in, each against the plain thing, measured in turns in one run.

    python benchmarks/ingest.py --passages wikipedia-vital.jsonl [--vectors 400000]

Prints a line a comparison: seconds of ours and of the plain thing, the best of --rounds, and their ratio. Published
shards to our form against a copy of the same files, from a cold cache, and with the passages against their parser;
opening an index against reading its bytes; passages against `json.loads`, and with all tokens against the tokenizers.
"""

import argparse
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import atlas_jax
from atlas_jax.checkpoints.formats.safe_pickle import load_pickle
from atlas_jax.data.reader_inputs import ReaderText, render
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.mesh import make_mesh
from atlas_jax.retrieval.faiss_index import FaissIndex
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.formats.convert import convert, write_vectors
from atlas_jax.retrieval.formats.index_folder import Origin, read_about, read_vectors
from atlas_jax.retrieval.formats.torch_shards import TorchShards
from atlas_jax.retrieval.passage_store import build_passages

sys.path.insert(0, str(Path(atlas_jax.__file__).parents[1]))
from tests.checkpoints.formats import pickles

SAMPLE = Path(atlas_jax.__file__).parent / "sample"
DIM, SHARDS = 768, 4
ENCODER_FORMAT = "{query} title: {title} context: {text}"
RETRIEVER_FORMAT = "{title} {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", required=True, help="jsonl rows with id, title, text")
    parser.add_argument("--vectors", type=int, default=400_000, help="vectors of the index, of width 768")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ingest(given.passages, folder, given.rounds)
        index(given.passages, given.vectors, folder, given.rounds)


def ingest(passages: str, folder: Path, rounds: int) -> None:
    """Passages of a jsonl file into a store, and into tokens for both models."""
    retriever, reader = Tokenizer.load(SAMPLE / "retriever"), Tokenizer.load(SAMPLE / "reader")
    text = ReaderText(reader, ENCODER_FORMAT, 512)
    rows = parse(passages)
    rendered = {retriever: [render(RETRIEVER_FORMAT, row) for row in rows]}
    rendered[reader] = [render(ENCODER_FORMAT.removeprefix("{query}"), row) for row in rows]

    def everything() -> None:
        shutil.rmtree(folder / "store")
        store = build_passages([passages], folder / "store")
        store.tokens(retriever, RETRIEVER_FORMAT, "retriever")
        text.prepare(store)

    compare(
        "passages in, against json.loads",
        lambda: build_passages([passages], folder / "store"),
        lambda: parse(passages),
        rounds,
    )
    compare(
        "passages in and tokenized twice, against both tokenizers",
        everything,
        lambda: [tokenizer.ids(texts) for tokenizer, texts in rendered.items()],
        rounds,
    )


def index(passages: str, count: int, folder: Path, rounds: int) -> None:
    """Published shards into our form; both kinds of index opened."""
    shards, ours, copy, vectors = (folder / name for name in ("shards", "ours", "copy", "vectors.npy"))
    export_torch_shards(shards, parse(passages), count)
    files = sorted(shards.glob("embeddings.*"))
    copy.mkdir()

    def cold() -> None:
        forget(shards)

    compare(
        "vectors of shards in, against a copy of their files",
        lambda: write_vectors(TorchShards(shards), vectors),
        lambda: [shutil.copyfile(file, copy / file.name) for file in files],
        rounds,
        cold,
    )
    compare(
        "shards in, against a copy of the vectors and the parser of the passages",
        lambda: convert(TorchShards(shards), ours, Origin()),
        lambda: [
            *(shutil.copyfile(file, copy / file.name) for file in files),
            *(len(load_pickle(file)) for file in shards.glob("passages.*")),
        ],
        rounds,
        cold,
    )
    about, mesh = read_about(ours), make_mesh()
    compare(
        "flat opened, against reading its bytes",
        lambda: FlatIndex.load(ours, about, mesh).rows.block_until_ready(),
        lambda: (ours / "embeddings.npy").read_bytes(),
        rounds,
    )
    small = folder / "small"
    small.mkdir()
    meta = FaissIndex.build(read_vectors(ours, about)[:100_000], "ivfsq").save(small)
    compare(
        "faiss ivfsq opened, against reading its bytes",
        lambda: FaissIndex.load(small, meta),
        lambda: [file.read_bytes() for file in small.iterdir()],
        rounds,
    )


def compare(what: str, ours: Callable, plain: Callable, rounds: int, before: Callable = lambda: None) -> None:
    """Prints the seconds of both, run in turns."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, work in enumerate((ours, plain)):
            before()
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    line = {"what": what, "ours": round(best[0], 3), "plain": round(best[1], 3), "ratio": round(best[0] / best[1], 2)}
    print(json.dumps(line), flush=True)


def parse(passages: str) -> list[dict]:
    """What a JSON parser alone takes."""
    with open(passages, "rb") as lines:
        return [json.loads(line) for line in lines]


def export_torch_shards(folder: Path, rows: list[dict], count: int) -> None:
    """Random vectors and as many of these passages in the published form."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(SHARDS):
        pickles.save(folder / f"embeddings.{n}.pt", rng.random((DIM, count // SHARDS), np.float32).astype(np.float16))
        few = [dict(rows[i % len(rows)]) for i in range(count // SHARDS)]
        (folder / f"passages.{n}.pt").write_bytes(pickle.dumps(few))


def forget(folder: Path) -> None:
    """The next to read these files reads the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
