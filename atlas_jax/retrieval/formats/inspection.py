"""What the folder of an index holds, of any form, without reading its vectors; a file that is not whole is an error."""

import json
from pathlib import Path
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.retrieval.faiss_index import map_arrays
from atlas_jax.retrieval.formats.index_folder import PASSAGES, is_index, read_about, read_vectors
from atlas_jax.retrieval.formats.torch_shards import TorchShards
from atlas_jax.retrieval.passage_store import PassageStore


def inspect(folder: Path) -> dict[str, Any]:
    """Name to value, in the order to be read."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of an index")
    found = _ours(folder) if is_index(folder) else _published(folder)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    passages = sum(size for path, size in sizes.items() if path.relative_to(folder).parts[0].startswith("passages"))
    vectors = sum(sizes.values()) - passages
    return found | {
        "bytes": sum(sizes.values()),
        "bytes of vectors": vectors,
        "bytes of passages": passages,
        "bytes a vector": round(vectors / found["passages"], 1),
    }


def _ours(folder: Path) -> dict[str, Any]:
    about = read_about(folder)
    if about.get("index_mode") == "flat":
        read_vectors(folder, about)
    else:
        map_arrays(folder, about)
    store = PassageStore.open(folder / PASSAGES)
    if len(store) != about["count"]:
        raise UserError(f"{folder}: {about['count']} vectors, but {len(store)} passages; build the index again")
    code_size = about.get("code_size")
    return {
        "form": "ours",
        "kind": "flat (exact)" if about["index_mode"] == "flat" else f"faiss {about['kind']}",
        **({"bytes of a code": code_size} if code_size else {}),
        "passages": about["count"],
        "dim": about["dim"],
        "retriever": about.get("retriever") or "unknown",
        "retriever_format": about.get("retriever_format") or "unknown",
        "max_length": about.get("max_length") or "unknown",
        "tokenized for": ", ".join(sorted(_tokenized(store.folder))) or "nothing yet",
        "first passage": store.take([0])[0]["title"],
    }


def _tokenized(passages: Path) -> list[str]:
    """What the passages have been tokenized for: the retriever, the reader."""
    return [json.loads(file.read_text())["format"].strip() for file in passages.glob("tokens-*/tokens.json")]


def _published(folder: Path) -> dict[str, Any]:
    shards = TorchShards(folder)
    for n in range(len(shards.counts)):
        _check_end(folder / f"passages.{n}.pt")
    return {
        "form": "published",
        "kind": "flat (exact)",
        "passages": shards.count,
        "dim": shards.dim,
        "shards": f"{len(shards.counts)} of {min(shards.counts)} to {max(shards.counts)} passages",
        "retriever": "unknown",
    }


def _check_end(file: Path) -> None:
    """A whole pickle ends in its opcode STOP, a dot."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - 1))
        if opened.read() != b".":
            raise UserError(f"{file}: cut short; fetch it again")
