"""Speed of importing and opening indexes and passages, each against a baseline, measured alternately in one run.

    python benchmarks/ingest.py --passages wikipedia-vital.jsonl [--vectors 400000]

Prints a line per comparison: our seconds ("ours"), those of the baseline ("plain"), the best of --rounds, and their
ratio. Converting published shards is compared with a copy of the same files from a cold page cache, and with their
passages with the copy and the parser of the passages; opening an index with reading its bytes; building a passage store
with `json.loads`, and with tokenizing by both tokenizers alone.
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
from atlas_jax.data.reader_inputs import ReaderInputEncoder, render
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.mesh import make_mesh
from atlas_jax.retrieval.faiss_index import FaissIndex
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.formats.convert import convert, write_vectors
from atlas_jax.retrieval.formats.index_folder import Origin, read_metadata, read_vectors
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
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        compare_passages(args.passages, folder, args.rounds)
        compare_indexes(args.passages, args.vectors, folder, args.rounds)


def compare_passages(passages: str, folder: Path, rounds: int) -> None:
    """Compares building a passage store from a jsonl file, and tokenizing it for both models, with the baselines."""
    retriever, reader = Tokenizer.load(SAMPLE / "retriever"), Tokenizer.load(SAMPLE / "reader")
    reader_text = ReaderInputEncoder(reader, ENCODER_FORMAT, 512)
    rows = parse_jsonl(passages)
    rendered = {retriever: [render(RETRIEVER_FORMAT, row) for row in rows]}
    rendered[reader] = [render(ENCODER_FORMAT.removeprefix("{query}"), row) for row in rows]

    def build_and_tokenize() -> None:
        shutil.rmtree(folder / "store")
        store = build_passages([passages], folder / "store")
        store.tokens(retriever, RETRIEVER_FORMAT, "retriever")
        reader_text.prepare(store)

    compare(
        "passages in, against json.loads",
        lambda: build_passages([passages], folder / "store"),
        lambda: parse_jsonl(passages),
        rounds,
    )
    compare(
        "passages in and tokenized twice, against both tokenizers",
        build_and_tokenize,
        lambda: [tokenizer.ids(texts) for tokenizer, texts in rendered.items()],
        rounds,
    )


def compare_indexes(passages: str, count: int, folder: Path, rounds: int) -> None:
    """Compares converting published shards, and opening a flat and a faiss index, with the baselines."""
    shards, index_folder, copies, vectors = (folder / name for name in ("shards", "ours", "copy", "vectors.npy"))
    export_torch_shards(shards, parse_jsonl(passages), count)
    files = sorted(shards.glob("embeddings.*"))
    copies.mkdir()

    def drop_shards_from_cache() -> None:
        drop_page_cache(shards)

    compare(
        "vectors of shards in, against a copy of their files",
        lambda: write_vectors(TorchShards(shards), vectors),
        lambda: [shutil.copyfile(file, copies / file.name) for file in files],
        rounds,
        drop_shards_from_cache,
    )
    compare(
        "shards in, against a copy of the vectors and the parser of the passages",
        lambda: convert(TorchShards(shards), index_folder, Origin()),
        lambda: [
            *(shutil.copyfile(file, copies / file.name) for file in files),
            *(len(load_pickle(file)) for file in shards.glob("passages.*")),
        ],
        rounds,
        drop_shards_from_cache,
    )
    metadata, mesh = read_metadata(index_folder), make_mesh()
    compare(
        "flat opened, against reading its bytes",
        lambda: FlatIndex.load(index_folder, metadata, mesh).rows.block_until_ready(),
        lambda: (index_folder / "embeddings.npy").read_bytes(),
        rounds,
    )
    faiss_folder = folder / "small"
    faiss_folder.mkdir()
    faiss_metadata = FaissIndex.build(read_vectors(index_folder, metadata)[:100_000], "ivfsq").save(faiss_folder)
    compare(
        "faiss ivfsq opened, against reading its bytes",
        lambda: FaissIndex.load(faiss_folder, faiss_metadata),
        lambda: [file.read_bytes() for file in faiss_folder.iterdir()],
        rounds,
    )


def compare(what: str, measured: Callable, baseline: Callable, rounds: int, before: Callable = lambda: None) -> None:
    """Runs both `rounds` times alternately, after `before`; prints the best seconds of each and their ratio."""
    best = [float("inf")] * 2
    for _ in range(rounds):
        for i, work in enumerate((measured, baseline)):
            before()
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    line = {"what": what, "ours": round(best[0], 3), "plain": round(best[1], 3), "ratio": round(best[0] / best[1], 2)}
    print(json.dumps(line), flush=True)


def parse_jsonl(passages: str) -> list[dict]:
    """Baseline: parses the lines of a jsonl file and does nothing else."""
    with open(passages, "rb") as lines:
        return [json.loads(line) for line in lines]


def export_torch_shards(folder: Path, rows: list[dict], count: int) -> None:
    """Writes `count` random vectors, and as many of the passages `rows`, as SHARDS shards in the published format."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(SHARDS):
        pickles.save(folder / f"embeddings.{n}.pt", rng.random((DIM, count // SHARDS), np.float32).astype(np.float16))
        shard_rows = [dict(rows[i % len(rows)]) for i in range(count // SHARDS)]
        (folder / f"passages.{n}.pt").write_bytes(pickle.dumps(shard_rows))


def drop_page_cache(folder: Path) -> None:
    """Drops the files of a folder from the page cache, so that the next read is from the disk."""
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
