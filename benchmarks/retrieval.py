"""How often a passage's own description finds it, with a pretrained encoder, for flat and for each faiss type.

    python benchmarks/retrieval.py --encoder MINILM_FOLDER --passages wikipedia-vital.jsonl

Prints the rate of embedding, then a line for each index: hits@1, @5, @20 over all passages with a description, recall
at 20 against flat, milliseconds a query, bytes a passage on disk.
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import atlas_jax
from atlas_jax.checkpoints.restore import place_on_mesh, restore, retriever_fingerprint
from atlas_jax.config import Config, IndexConfig, ModelConfig, RetrievalConfig, TaskConfig, TextConfig
from atlas_jax.data.jsonl import read_rows
from atlas_jax.mesh import make_mesh
from atlas_jax.retrieval.embedder import Embedder
from atlas_jax.retrieval.passage_index import open_passage_index

SAMPLE = Path(atlas_jax.__file__).parent / "sample"
KINDS = (("flat", None), ("ivfflat", None), ("ivfsq", None), ("ivfpq", 64), ("pq", 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder of a pretrained encoder")
    parser.add_argument("--passages", required=True, help="jsonl rows with id, title, text, description")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a text; MiniLM was trained with 256")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    described = [
        (number, row["description"])
        for number, (_, row) in enumerate(read_rows(given.passages))
        if row.get("description")
    ]
    own = np.asarray([number for number, _ in described])
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "index"
        config = Config(
            ModelConfig(str(SAMPLE / "reader"), given.encoder),
            TaskConfig("qa"),
            text=TextConfig(text_maxlength=given.max_length),
            retrieval=RetrievalConfig(retrieve_only=True),
            index=IndexConfig(passages=(given.passages,), save_index_path=str(saved)),
        )
        weights, mesh = restore(config), make_mesh()
        model = place_on_mesh(weights, config, mesh)
        queries, passages = (
            Embedder(model.retriever, side, weights.retriever_tokenizer, mesh, given.max_length)
            for side in ("query", "passage")
        )
        fingerprint = retriever_fingerprint(weights.params)
        start = time.perf_counter()
        index = open_passage_index(config, passages, [fingerprint], mesh, Path(temporary))
        seconds = time.perf_counter() - start - passages.program.compile_seconds
        count = index.vectors.count
        print(json.dumps({"passages": count, "built_in_seconds": seconds, "passages_per_second": count / seconds}))
        vectors = np.concatenate(
            [embedded(queries, [text for _, text in described[at : at + 64]]) for at in range(0, len(described), 64)]
        )
        exact = report("flat on the devices", index.vectors, vectors, own, saved, None)
        for kind, code_size in KINDS:
            folder = Path(temporary) / kind
            options = IndexConfig(
                load_index_path=str(saved), index_mode="faiss", faiss_index_type=kind, faiss_code_size=code_size
            )
            compressed = open_passage_index(
                dataclasses.replace(config, index=options), passages, [fingerprint], mesh, Path(temporary)
            ).vectors
            folder.mkdir()
            compressed.save(folder)
            report(f"faiss {kind}" + (f" {code_size}" if code_size else ""), compressed, vectors, own, folder, exact)


def embedded(queries, texts):
    """Vectors of at most 64 texts."""
    return np.asarray(queries.embed_queries(texts, 64))[: len(texts)]


def report(name, index, vectors, own, folder, exact):
    """Prints a line about an index; returns the numbers it found."""
    index.search(vectors[:64], 20)  # compiled, pages read
    start = time.perf_counter()
    found = np.concatenate([index.search(vectors[at : at + 64], 20).numbers for at in range(0, len(vectors), 64)])
    milliseconds = 1e3 * (time.perf_counter() - start) / len(vectors)
    hits = {f"hits@{k}": round(float((found[:, :k] == own[:, None]).any(1).mean()), 4) for k in (1, 5, 20)}
    recall = 1.0
    if exact is not None:
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(found, exact, strict=True)]))
    size = sum(file.stat().st_size for file in folder.glob("*.npy")) / index.count
    line = {"index": name, **hits, "recall@20": round(recall, 4), "ms_a_query": round(milliseconds, 3)}
    print(json.dumps(line | {"bytes_a_passage": round(size, 1)}), flush=True)
    return found


if __name__ == "__main__":
    main()
