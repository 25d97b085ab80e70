"""Opens, converts, builds and rebuilds the index of a run: vectors and passages in one folder, see `index_folder`."""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atlas_jax.config import Config, IndexConfig, RetrievalConfig, TextConfig
from atlas_jax.errors import UserError
from atlas_jax.retrieval.embedder import Embedder, embed_corpus
from atlas_jax.retrieval.faiss_index import FaissIndex, FaissKind
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.formats.convert import write_flat_index
from atlas_jax.retrieval.formats.index_folder import (
    METADATA,
    PASSAGES,
    VECTORS,
    Origin,
    check_replaceable,
    check_retriever,
    is_index,
    link_tree,
    read_metadata,
    read_vectors,
    write_metadata,
)
from atlas_jax.retrieval.formats.npy_files import VectorFile, read_array
from atlas_jax.retrieval.formats.torch_shards import TorchShards
from atlas_jax.retrieval.passage_store import REMEDY, PassageStore, build_passages
from atlas_jax.retrieval.published_index import take_over
from atlas_jax.retrieval.search import VectorIndex
from atlas_jax.retrieval.sharded_faiss_index import ShardedFaissIndex
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.cache import cache_folder
from atlas_jax.storage.files import atomic_folder, read_json
from atlas_jax.storage.shared_files import atomic_shared_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PassageIndex:
    """Passage vectors to search, and the passages by the same numbers."""

    vectors: VectorIndex
    passages: PassageStore
    fingerprint: str  # of the passage encoder that built it


def open_passage_index(
    config: Config, embedder: Embedder, fingerprints: Sequence[str], mesh: Mesh, scratch: Path
) -> PassageIndex:
    """Opens the index that the flags name, or builds it first.

    `fingerprints`: accepted fingerprints; the first is the current passage encoder's. A built index is written to
    --save_index_path, or into the folder `scratch`, and opened from there; published shards without --save_index_path
    are taken over once for all runs. UserError if the index was built by another retriever, holds too few passages, or
    is damaged.
    """
    folder = Path(config.index.load_index_path or "")
    if not config.index.load_index_path or not process_group().run_on_first(lambda: is_index(folder)):
        if config.index.load_index_path and not config.index.save_index_path:
            folder = _take_over(config, embedder.dim, folder)
        else:
            folder = Path(os.path.abspath(config.index.save_index_path or scratch / "index"))
            build_passage_index(config, embedder, fingerprints[0], folder)
    return _open(folder, config, embedder.dim, fingerprints, mesh, scratch)


def build_passage_index(
    config: Config, embedder: Embedder, fingerprint: str, folder: Path, remedy: str = REMEDY
) -> None:
    """Writes an index in our own format: from the published shards in --load_index_path, else by embedding --passages.

    `fingerprint`: of the passage encoder. Replaces an index in `folder`; UserError if it holds anything else, or, with
    `remedy` at its end, if it cannot be written.
    """
    if config.index.load_index_path:
        process_group().run_on_first(lambda: _convert_shards(config, embedder.dim, fingerprint, folder))
        return
    with atomic_shared_folder(folder, remedy, check=_check(config, folder)) as draft:
        process_group().run_on_first(lambda: _write_passages(config.index, draft, remedy))
        _embed(config, embedder, fingerprint, draft)


def _convert_shards(config: Config, dim: int, fingerprint: str, folder: Path) -> None:
    """Writes the published shards in --load_index_path as the kind of index that the flags ask for."""
    shards = TorchShards(Path(config.index.load_index_path or ""))
    with atomic_folder(folder, REMEDY, replace=True, check=_check(config, folder)) as draft:
        _convert(shards, config, dim, _origin(config.text, fingerprint), draft)


def _convert(shards: TorchShards, config: Config, dim: int, origin: Origin, draft: Path) -> None:
    """Writes shards of vectors that are `dim` wide into a folder, as the kind of index that the flags ask for."""
    check_retriever(shards.folder / "embeddings.0.pt", {"dim": shards.dim, "retriever": None}, dim, [])
    metadata = write_flat_index(shards, draft)
    write_metadata(draft, _write_arrays(read_vectors(draft, metadata), config, draft), origin)


def _take_over(config: Config, dim: int, folder: Path) -> Path:
    """The copy of the published shards in `folder` that all runs share. Its origin stays unknown, as theirs is."""
    kind: dict[str, Any] = {"mode": config.index.index_mode}
    if config.index.index_mode == "faiss":
        kind |= {"kind": _requested_faiss_kind(config.index), "seed": config.run.seed}
    with process_group().process_0_first():
        return take_over(
            folder, config.run.cache_dir, kind, lambda shards, draft: _convert(shards, config, dim, Origin(), draft)
        )


def rebuild_passage_index(
    index: PassageIndex, config: Config, embedder: Embedder, fingerprint: str, mesh: Mesh, scratch: Path
) -> PassageIndex:
    """Embeds the passages of an index again; writes to --save_index_path, or into the folder `scratch`, and opens that.

    `fingerprint`: of the passage encoder, with its current parameters.
    """
    folder = Path(os.path.abspath(config.index.save_index_path or scratch / "index"))
    copy = config.index.save_index_path is not None
    with atomic_shared_folder(folder, REMEDY, check=_check(config, folder)) as draft:
        process_group().run_on_first(lambda: link_tree(index.passages.folder, draft / PASSAGES, copy=copy))
        _embed(config, embedder, fingerprint, draft)
    return _open(folder, config, embedder.dim, [fingerprint], mesh, scratch)


def is_built_by(folder: str | None, fingerprint: str) -> bool:
    """True if the folder holds an index in our own format, built by the passage encoder with this fingerprint."""
    path = Path(folder or "") / METADATA
    return folder is not None and path.is_file() and read_json(path).get("retriever") == fingerprint


def _check(config: Config, folder: Path) -> Callable[[], None]:
    """A function that raises UserError if an index must not be written to `folder`."""
    return functools.partial(
        check_replaceable, folder, "--save_index_path" if config.index.save_index_path else "--output"
    )


def _origin(text: TextConfig, fingerprint: str) -> Origin:
    return Origin(fingerprint, text.retriever_format, text.retriever_maxlength)


def check_passage_index(config: Config) -> None:
    """Checks index flags before weights are loaded; UserError if the index is too small or the save path is taken."""
    folder = Path(config.index.load_index_path or "")
    if config.index.load_index_path and is_index(folder):
        check_count(config.retrieval, read_json(folder / METADATA).get("count"))
    if config.index.save_index_path:
        check_replaceable(Path(os.path.abspath(config.index.save_index_path)))


def check_count(retrieval: RetrievalConfig, count: Any) -> None:
    """UserError if the flags ask to retrieve more passages per query than `count`, the size of the index."""
    flag, wanted = retrieval.searched
    if isinstance(count, int) and wanted > count:
        raise UserError(f"--{flag} {wanted}: the index holds {count} passages; ask for at most that many")


def _open(
    folder: Path, config: Config, dim: int, fingerprints: Sequence[str], mesh: Mesh, scratch: Path
) -> PassageIndex:
    """Opens an index in our own format; UserError if its fingerprint is not among `fingerprints`."""
    metadata = read_metadata(folder)
    check_retriever(folder, metadata, dim, fingerprints)
    _warn_of_differences(folder, metadata, config)
    passages = PassageStore.open(folder / PASSAGES, cache_folder(config.run.cache_dir))
    if len(passages) != metadata.get("count"):
        raise UserError(
            f"{folder}: {metadata.get('count')} vectors, but {len(passages)} passages; build the index again"
        )
    check_count(config.retrieval, len(passages))
    return PassageIndex(
        _load_vectors(folder, metadata, config, mesh, scratch), passages, metadata["retriever"] or fingerprints[0]
    )


def _warn_of_differences(folder: Path, metadata: dict[str, Any], config: Config) -> None:
    """Logs flags that differ from those the index was built with, but do not make it unusable."""
    text = config.text
    for flag, value in (("retriever_format", text.retriever_format), ("max_length", text.retriever_maxlength)):
        if metadata.get(flag) not in (None, value):
            logger.warning(
                "%s: its passages were embedded with %s %r, this run says %r", folder, flag, metadata.get(flag), value
            )
    if config.index.save_index_path and folder != Path(os.path.abspath(config.index.save_index_path)):
        logger.warning("--save_index_path has no effect: %s is there already", folder)


def _load_vectors(folder: Path, metadata: dict[str, Any], config: Config, mesh: Mesh, scratch: Path) -> VectorIndex:
    """Loads the vector index, or builds a faiss index in memory or in `scratch` from a flat one, as the flags ask.

    UserError if a faiss index on disk is of another kind: its vectors are gone, so it cannot be rebuilt.
    """
    mode, kind, code_size = config.index.index_mode, metadata.get("kind"), metadata.get("code_size")
    if metadata.get("index_mode") == "flat":
        if mode == "flat":
            return FlatIndex.load(folder, metadata, mesh)
        return _build_faiss_from_flat(folder, metadata, config, scratch / "faiss")
    if (metadata.get("index_mode"), kind, code_size) == (mode, *_requested_faiss_kind(config.index)):
        return FaissIndex.load(folder, metadata) if process_group().count == 1 else ShardedFaissIndex(folder, metadata)
    flags = f"--index_mode faiss --faiss_index_type {kind}" + (f" --faiss_code_size {code_size}" if code_size else "")
    raise UserError(f"{folder}: holds {flags}, and no vectors to make another index from; ask for that one")


def _build_faiss_from_flat(folder: Path, metadata: dict[str, Any], config: Config, shared: Path) -> VectorIndex:
    """Builds the faiss index that the flags ask for from the vectors of a flat index.

    With several processes, process 0 builds it, since all need the same centroids, and writes it to the folder
    `shared`, from which each loads its shard.
    """
    if process_group().count == 1:
        return build_faiss_index(read_vectors(folder, metadata), config)
    with atomic_shared_folder(shared, REMEDY) as draft:
        faiss_metadata = process_group().run_on_first(
            lambda: build_faiss_index(read_vectors(folder, metadata), config).save(draft)
        )
    return ShardedFaissIndex(shared, faiss_metadata)


def _write_arrays(vectors: np.ndarray, config: Config, folder: Path) -> dict[str, Any]:
    """Writes the arrays of the kind of index that the flags ask for; returns their fields in index.json."""
    count, dim = vectors.shape
    if config.index.index_mode == "flat":
        if not (folder / VECTORS).exists():
            np.save(folder / VECTORS, vectors)
        return {"index_mode": "flat", "kind": FlatIndex.kind, "count": count, "dim": dim}
    metadata = build_faiss_index(vectors, config).save(folder)
    (folder / VECTORS).unlink(missing_ok=True)  # a search reads the codes only
    return metadata


def _requested_faiss_kind(config: IndexConfig) -> tuple[FaissKind, int | None]:
    """Returns the kind of faiss index that the flags ask for and its code size, None for kinds without "pq"."""
    kind = config.faiss_index_type
    return kind, config.faiss_code_size if "pq" in kind else None


def build_faiss_index(vectors: np.ndarray, config: Config) -> FaissIndex:
    """Builds the faiss index that the flags ask for from vectors "p d", with progress."""
    kind, code_size = _requested_faiss_kind(config.index)
    with progress(f"filling faiss {kind}", "vectors", len(vectors)) as advance:
        return FaissIndex.build(vectors, kind, code_size, seed=config.run.seed, progress=advance)


def _write_passages(config: IndexConfig, folder: Path, remedy: str) -> None:
    """Writes the store of the passages in the --passages files."""
    with progress("reading passages", "passages") as advance:
        build_passages(config.passages, folder / PASSAGES, config.max_passages, advance, remedy)


def _embed(config: Config, embedder: Embedder, fingerprint: str, folder: Path) -> None:
    """Embeds the passages in the folder and writes the arrays and metadata beside them; all processes take part."""
    passages = PassageStore.open(folder / PASSAGES)
    count = len(passages)
    with process_group().process_0_first(), progress("tokenizing for the retriever", "passages", count) as advance:
        tokens = passages.tokens(embedder.tokenizer, config.text.retriever_format, "retriever", advance)
    process_group().run_on_first(lambda: VectorFile.create(folder / VECTORS, count, embedder.dim).close())
    with (
        contextlib.closing(VectorFile(folder / VECTORS, count, embedder.dim)) as vectors,
        progress("embedding", "passages", count) as advance,
    ):
        embed_corpus(embedder, tokens, vectors, config.index.per_gpu_embedder_batch_size, advance)
        vectors.sync()
    process_group().barrier()

    def write_index() -> None:
        written = read_array(folder / VECTORS, np.float16, (count, embedder.dim))
        write_metadata(folder, _write_arrays(written, config, folder), _origin(config.text, fingerprint))

    process_group().run_on_first(write_index)
