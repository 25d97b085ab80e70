"""Retrieval quality and speed of flat and faiss indexes: how often a passage's description retrieves that passage.

    python benchmarks/retrieval.py --encoder MINILM_FOLDER --passages wikipedia-vital.jsonl

Needs a pretrained encoder. Prints passages embedded per second, then a line for each index: hits@1, @5, @20 over all
passages with a description, recall@20 against the flat index, milliseconds per query, bytes per passage on the disk.
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
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
    described = [
        (number, row["description"])
        for number, (_, row) in enumerate(read_rows(args.passages))
        if row.get("description")
    ]
    described_numbers = np.asarray([number for number, _ in described])
    with tempfile.TemporaryDirectory() as temporary:
        flat_folder = Path(temporary) / "index"
        config = Config(
            ModelConfig(str(SAMPLE / "reader"), args.encoder),
            TaskConfig("qa"),
            text=TextConfig(text_maxlength=args.max_length),
            retrieval=RetrievalConfig(retrieve_only=True),
            index=IndexConfig(passages=(args.passages,), save_index_path=str(flat_folder)),
        )
        weights, mesh = restore(config), make_mesh()
        model = place_on_mesh(weights, config.model, mesh)
        query_embedder, passage_embedder = (
            Embedder(model.retriever, side, weights.retriever_tokenizer, mesh, args.max_length)
            for side in ("query", "passage")
        )
        fingerprint = retriever_fingerprint(weights.params)
        start = time.perf_counter()
        index = open_passage_index(config, passage_embedder, [fingerprint], mesh, Path(temporary))
        seconds = time.perf_counter() - start - passage_embedder.program.compile_seconds
        count = index.vectors.count
        print(json.dumps({"passages": count, "built_in_seconds": seconds, "passages_per_second": count / seconds}))
        vectors = np.concatenate(
            [embed(query_embedder, [text for _, text in described[i : i + 64]]) for i in range(0, len(described), 64)]
        )
        exact_numbers = report("flat on the devices", index.vectors, vectors, described_numbers, flat_folder, None)
        for kind, code_size in KINDS:
            folder = Path(temporary) / kind
            options = IndexConfig(
                load_index_path=str(flat_folder), index_mode="faiss", faiss_index_type=kind, faiss_code_size=code_size
            )
            faiss_index = open_passage_index(
                dataclasses.replace(config, index=options), passage_embedder, [fingerprint], mesh, Path(temporary)
            ).vectors
            folder.mkdir()
            faiss_index.save(folder)
            report(
                f"faiss {kind}" + (f" {code_size}" if code_size else ""),
                faiss_index,
                vectors,
                described_numbers,
                folder,
                exact_numbers,
            )


def embed(embedder, texts):
    """Returns the query vectors of at most 64 texts, which are padded to 64 for one compiled program."""
    return np.asarray(embedder.embed_queries(texts, 64))[: len(texts)]


def report(name, index, vectors, expected, folder, exact_numbers):
    """Prints a line about an index; returns the numbers of the 20 passages retrieved for each query."""
    index.search(vectors[:64], 20)  # warm-up: compiles, and reads the index into memory
    start = time.perf_counter()
    numbers = np.concatenate([index.search(vectors[i : i + 64], 20).numbers for i in range(0, len(vectors), 64)])
    milliseconds = 1e3 * (time.perf_counter() - start) / len(vectors)
    hits = {f"hits@{k}": round(float((numbers[:, :k] == expected[:, None]).any(1).mean()), 4) for k in (1, 5, 20)}
    recall = 1.0
    if exact_numbers is not None:
        recall = float(np.mean([np.isin(a, b).mean() for a, b in zip(numbers, exact_numbers, strict=True)]))
    bytes_per_passage = sum(file.stat().st_size for file in folder.glob("*.npy")) / index.count
    line = {"index": name, **hits, "recall@20": round(recall, 4), "ms_a_query": round(milliseconds, 3)}
    print(json.dumps(line | {"bytes_a_passage": round(bytes_per_passage, 1)}), flush=True)
    return numbers


if __name__ == "__main__":
    main()
