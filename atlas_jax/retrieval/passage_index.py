"""An index with its passages on disk (`index.json`, arrays, `passages/`): opened, taken over from shards, or built."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atlas_jax.config import Config
from atlas_jax.errors import UserError
from atlas_jax.retrieval.embedder import Embedder, embed_corpus
from atlas_jax.retrieval.faiss_index import FaissIndex, FaissKind
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.formats.convert import take
from atlas_jax.retrieval.formats.index_folder import (
    ABOUT,
    PASSAGES,
    VECTORS,
    Origin,
    check_replaceable,
    check_retriever,
    is_index,
    link_tree,
    read_about,
    read_vectors,
    write_about,
)
from atlas_jax.retrieval.formats.npy_files import VectorFile, read_array
from atlas_jax.retrieval.formats.torch_shards import TorchShards
from atlas_jax.retrieval.passage_store import PassageStore, build_passages
from atlas_jax.retrieval.search import VectorIndex
from atlas_jax.retrieval.sharded_faiss_index import ShardedFaissIndex
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import atomic_folder, read_json
from atlas_jax.storage.shared_files import atomic_shared_folder

logger = logging.getLogger(__name__)

_ELSEWHERE = "pass --save_index_path with a folder that can be written and has room"


@dataclasses.dataclass(frozen=True)
class PassageIndex:
    """What can be searched, and what the hits are."""

    vectors: VectorIndex
    passages: PassageStore
    fingerprint: str  #  of the passage encoder that built it


def open_passage_index(
    config: Config, embedder: Embedder, retrievers: Sequence[str], mesh: Mesh, scratch: Path
) -> PassageIndex:
    """The library that the flags name.

    `retrievers`: fingerprints of the passage encoder, and of others whose index will do as well. What has to be built
    goes to --save_index_path, or into the folder `scratch`, and is opened from there.
    """
    folder = Path(config.index.load_index_path or "")
    if not config.index.load_index_path or not process_group().run_on_first(lambda: is_index(folder)):
        folder = Path(os.path.abspath(config.index.save_index_path or scratch / "index"))
        build_passage_index(config, embedder, retrievers[0], folder)
    return _open(folder, config, embedder.dim, retrievers, mesh, scratch)


def build_passage_index(config: Config, embedder: Embedder, retriever: str, folder: Path) -> None:
    """Writes an index of ours: of the published shards in --load_index_path, or else of --passages.

    `retriever` is the fingerprint of the passage encoder. What is there is replaced if it is an index.
    """
    if config.index.load_index_path:
        process_group().run_on_first(lambda: _take_shards(config, embedder.dim, retriever, folder))
        return
    process_group().run_on_first(lambda: check_replaceable(folder))
    with atomic_shared_folder(folder, _ELSEWHERE) as draft:
        process_group().run_on_first(lambda: _read_passages(config, draft))
        _embed(config, embedder, retriever, draft)


def _take_shards(config: Config, dim: int, retriever: str, folder: Path) -> None:
    shards = TorchShards(Path(config.index.load_index_path or ""))
    check_retriever(shards.folder / "embeddings.0.pt", {"dim": shards.dim, "retriever": None}, dim, [])
    check_replaceable(folder)
    with atomic_folder(folder, _ELSEWHERE, replace=True) as draft:
        about = take(shards, draft)
        write_about(draft, _arrays(read_vectors(draft, about), config, draft), _origin(config, retriever))


def rebuild_passage_index(
    library: PassageIndex, config: Config, embedder: Embedder, retriever: str, mesh: Mesh, scratch: Path
) -> PassageIndex:
    """The same passages embedded again; goes to --save_index_path, or into the folder `scratch`."""
    folder = Path(os.path.abspath(config.index.save_index_path or scratch / "index"))
    copy = config.index.save_index_path is not None
    with atomic_shared_folder(folder, _ELSEWHERE) as draft:
        process_group().run_on_first(lambda: link_tree(library.passages.folder, draft / PASSAGES, copy=copy))
        _embed(config, embedder, retriever, draft)
    return _open(folder, config, embedder.dim, [retriever], mesh, scratch)


def is_built_by(folder: str | None, retriever: str) -> bool:
    """Whether the folder holds an index of ours that this retriever built."""
    path = Path(folder or "") / ABOUT
    return folder is not None and path.is_file() and read_json(path).get("retriever") == retriever


def _origin(config: Config, retriever: str) -> Origin:
    return Origin(retriever, config.text.retriever_format, config.text.retriever_maxlength)


def check_passage_index(config: Config) -> None:
    """What can be known of the library before any weights are loaded."""
    folder = Path(config.index.load_index_path or "")
    if config.index.load_index_path and is_index(folder):
        check_count(config, read_json(folder / ABOUT).get("count"))
    elif config.index.save_index_path:
        check_replaceable(Path(os.path.abspath(config.index.save_index_path)))


def check_count(config: Config, count: Any) -> None:
    """Refuses to look for more passages than there are."""
    flag, wanted = config.retrieval.searched
    if isinstance(count, int) and wanted > count:
        raise UserError(f"--{flag} {wanted}: the index holds {count} passages; ask for at most that many")


def _open(folder: Path, config: Config, dim: int, retrievers: Sequence[str], mesh: Mesh, scratch: Path) -> PassageIndex:
    """An index of ours; refuses the queries of another retriever than the one that built it."""
    about = read_about(folder)
    check_retriever(folder, about, dim, retrievers)
    _warn(folder, about, config)
    passages = PassageStore.open(folder / PASSAGES)
    if len(passages) != about.get("count"):
        raise UserError(f"{folder}: {about.get('count')} vectors, but {len(passages)} passages; build the index again")
    check_count(config, len(passages))
    return PassageIndex(_load(folder, about, config, mesh, scratch), passages, about["retriever"] or retrievers[0])


def _warn(folder: Path, about: dict[str, Any], config: Config) -> None:
    """Says what differs between the index and the flags without making a search wrong."""
    text = config.text
    for flag, now in (("retriever_format", text.retriever_format), ("max_length", text.retriever_maxlength)):
        if about.get(flag) not in (None, now):
            logger.warning(
                "%s: its passages were embedded with %s %r, this run says %r", folder, flag, about.get(flag), now
            )
    if config.index.save_index_path and folder != Path(os.path.abspath(config.index.save_index_path)):
        logger.warning("--save_index_path has no effect: %s is there already", folder)


def _load(folder: Path, about: dict[str, Any], config: Config, mesh: Mesh, scratch: Path) -> VectorIndex:
    """The kind of index that the flags ask for: the one that is there, or made from its vectors."""
    mode, kind, code_size = config.index.index_mode, about.get("kind"), about.get("code_size")
    if about.get("index_mode") == "flat":
        if mode == "flat":
            return FlatIndex.load(folder, about, mesh)
        return _faiss_of_vectors(folder, about, config, scratch / "faiss")
    if (about.get("index_mode"), kind, code_size) == (mode, *_faiss_kind(config)):
        return FaissIndex.load(folder, about) if process_group().count == 1 else ShardedFaissIndex(folder, about)
    had = f"--index_mode faiss --faiss_index_type {kind}" + (f" --faiss_code_size {code_size}" if code_size else "")
    raise UserError(f"{folder}: holds {had}, and no vectors to make another index from; ask for that one")


def _faiss_of_vectors(folder: Path, about: dict[str, Any], config: Config, shared: Path) -> VectorIndex:
    """Made by process 0, which alone can choose centroids for all; several processes take their parts from files."""
    if process_group().count == 1:
        return build_faiss_index(read_vectors(folder, about), config)
    with atomic_shared_folder(shared, _ELSEWHERE) as draft:
        meta = process_group().run_on_first(lambda: build_faiss_index(read_vectors(folder, about), config).save(draft))
    return ShardedFaissIndex(shared, meta)


def _arrays(vectors: np.ndarray, config: Config, folder: Path) -> dict[str, Any]:
    """Writes the arrays of the kind of index that the flags ask for; returns what index.json must say of them."""
    count, dim = vectors.shape
    if config.index.index_mode == "flat":
        if not (folder / VECTORS).exists():
            np.save(folder / VECTORS, vectors)
        return {"index_mode": "flat", "kind": FlatIndex.kind, "count": count, "dim": dim}
    about = build_faiss_index(vectors, config).save(folder)
    (folder / VECTORS).unlink(missing_ok=True)  # the codes are what is searched
    return about


def _faiss_kind(config: Config) -> tuple[FaissKind, int | None]:
    """The kind of faiss index that the flags ask for; a code size belongs to "pq" alone."""
    kind = config.index.faiss_index_type
    return kind, config.index.faiss_code_size if "pq" in kind else None


def build_faiss_index(vectors: np.ndarray, config: Config) -> FaissIndex:
    """The faiss index that the flags ask for, of these vectors."""
    kind, code_size = _faiss_kind(config)
    with progress(f"filling faiss {kind}", "vectors", len(vectors)) as more:
        return FaissIndex.build(vectors, kind, code_size, seed=config.run.seed, progress=more)


def _read_passages(config: Config, folder: Path) -> None:
    """Passages from jsonl."""
    with progress("reading passages", "passages") as more:
        build_passages(config.index.passages, folder / PASSAGES, config.index.max_passages, more)


def _embed(config: Config, embedder: Embedder, retriever: str, folder: Path) -> None:
    """Embeds the passages in the folder, and writes the kind of index that the flags ask for beside them."""
    passages = PassageStore.open(folder / PASSAGES)
    count = len(passages)
    with process_group().process_0_first(), progress("tokenizing for the retriever", "passages", count) as more:
        tokens = passages.tokens(embedder.tokenizer, config.text.retriever_format, "retriever", more)
    process_group().run_on_first(lambda: VectorFile.create(folder / VECTORS, count, embedder.dim).close())
    with (
        contextlib.closing(VectorFile(folder / VECTORS, count, embedder.dim)) as vectors,
        progress("embedding", "passages", count) as more,
    ):
        embed_corpus(embedder, tokens, vectors, config.index.per_gpu_embedder_batch_size, more)
        vectors.sync()
    process_group().barrier()

    def finish() -> None:
        written = read_array(folder / VECTORS, np.float16, (count, embedder.dim))
        write_about(folder, _arrays(written, config, folder), _origin(config, retriever))

    process_group().run_on_first(finish)
