"""Inspects the folder of an index, our own format or published shards, without reading its vectors."""

import json
from pathlib import Path
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.retrieval.faiss_index import map_arrays
from atlas_jax.retrieval.formats.index_folder import PASSAGES, is_index, read_metadata, read_vectors
from atlas_jax.retrieval.formats.torch_shards import TorchShards, shard_files
from atlas_jax.retrieval.passage_store import PassageStore


def inspect(folder: Path) -> dict[str, Any]:
    """Returns the figures that `atlas index inspect` prints, by name; UserError if a file is missing or cut short."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of an index")
    found = _inspect_index(folder) if is_index(folder) else _inspect_shards(folder)
    files = folder.rglob("*") if is_index(folder) else shard_files(folder)  # beside shards there may be a copy of them
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    passages = sum(size for path, size in sizes.items() if path.relative_to(folder).parts[0].startswith("passages"))
    vectors = sum(sizes.values()) - passages
    return found | {
        "bytes": sum(sizes.values()),
        "bytes of vectors": vectors,
        "bytes of passages": passages,
        "bytes a vector": round(vectors / found["passages"], 1),
    }


def _inspect_index(folder: Path) -> dict[str, Any]:
    """Inspects an index in our own format, flat or faiss."""
    metadata = read_metadata(folder)
    if metadata.get("index_mode") == "flat":
        read_vectors(folder, metadata)
    else:
        map_arrays(folder, metadata)
    store = PassageStore.open(folder / PASSAGES)
    if len(store) != metadata["count"]:
        raise UserError(f"{folder}: {metadata['count']} vectors, but {len(store)} passages; build the index again")
    code_size = metadata.get("code_size")
    return {
        "form": "ours",
        "kind": "flat (exact)" if metadata["index_mode"] == "flat" else f"faiss {metadata['kind']}",
        **({"bytes of a code": code_size} if code_size else {}),
        "passages": metadata["count"],
        "dim": metadata["dim"],
        "retriever": metadata.get("retriever") or "unknown",
        "retriever_format": metadata.get("retriever_format") or "unknown",
        "max_length": metadata.get("max_length") or "unknown",
        "tokenized for": ", ".join(sorted(_token_formats(store.folder))) or "nothing yet",
        "first passage": store.take([0])[0]["title"],
    }


def _token_formats(passages: Path) -> list[str]:
    """Returns the format strings that the passages have been tokenized with: those of the retriever, of the reader."""
    return [json.loads(file.read_text())["format"].strip() for file in passages.glob("tokens-*/tokens.json")]


def _inspect_shards(folder: Path) -> dict[str, Any]:
    """Inspects published shards."""
    shards = TorchShards(folder)
    for n in range(len(shards.counts)):
        _check_pickle_is_whole(folder / f"passages.{n}.pt")
    return {
        "form": "published",
        "kind": "flat (exact)",
        "passages": shards.count,
        "dim": shards.dim,
        "shards": f"{len(shards.counts)} of {min(shards.counts)} to {max(shards.counts)} passages",
        "retriever": "unknown",
    }


def _check_pickle_is_whole(file: Path) -> None:
    """UserError unless the file ends in a pickle's STOP opcode, a dot."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - 1))
        if opened.read() != b".":
            raise UserError(f"{file}: cut short; fetch it again")
