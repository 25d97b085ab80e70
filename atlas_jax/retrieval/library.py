"""An index with its passages on disk (`index.json`, arrays, `passages/`): opened, taken over from shards, or built."""

import dataclasses
import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from atlas_jax.checkpoints.plain_pickle import load_pickle
from atlas_jax.checkpoints.pretrained import read_json
from atlas_jax.checkpoints.torch_file import load_torch
from atlas_jax.config import Config
from atlas_jax.errors import UserError
from atlas_jax.files import new_folder, write_json
from atlas_jax.progress import progress
from atlas_jax.retrieval.embed import Embedder, embed_corpus
from atlas_jax.retrieval.faiss_index import FaissIndex, FaissKind
from atlas_jax.retrieval.flat_index import FlatIndex
from atlas_jax.retrieval.interface import Index, read_array
from atlas_jax.retrieval.passages import PassageStore, build_passages

logger = logging.getLogger(__name__)

FORMAT = 1
ABOUT = "index.json"
PASSAGES = "passages"
VECTORS = "embeddings.npy"


@dataclasses.dataclass(frozen=True)
class Library:
    """What can be searched, and what the hits are."""

    index: Index
    passages: PassageStore
    retriever: str  # fingerprint of the passage encoder that built it


def open_library(config: Config, embedder: Embedder, retrievers: Sequence[str], mesh: Mesh, scratch: Path) -> Library:
    """The library that the flags name.

    `retrievers`: fingerprints of the passage encoder, and of others whose index will do as well. What has to be built
    goes to --save_index_path, or into the folder `scratch`, and is opened from there.
    """
    folder = Path(config.index.load_index_path or "")
    if not config.index.load_index_path or not (folder / ABOUT).is_file():
        vectors = _published_vectors(folder, embedder.dim) if config.index.load_index_path else None
        folder = Path(os.path.abspath(config.index.save_index_path or scratch / "index"))
        _check_replaceable(folder)
        with new_folder(folder, "pass --save_index_path with a folder that can be written", replace=True) as draft:
            if vectors is not None:
                about = _take_published(Path(config.index.load_index_path or ""), vectors, config, draft)
            else:
                about = _build(config, embedder, draft)
            _describe(draft, about, config, retrievers[0])
    return _open(folder, config, embedder.dim, retrievers, mesh)


def rebuild_library(
    library: Library, config: Config, embedder: Embedder, retriever: str, mesh: Mesh, scratch: Path
) -> Library:
    """The same passages embedded again; goes to --save_index_path, or into the folder `scratch`."""
    folder = Path(os.path.abspath(config.index.save_index_path or scratch / "index"))
    with new_folder(folder, "pass --save_index_path with a folder that can be written", replace=True) as draft:
        _share(library.passages.folder, draft / PASSAGES, copy=config.index.save_index_path is not None)
        _describe(draft, _embed(config, embedder, PassageStore.open(draft / PASSAGES), draft), config, retriever)
    return _open(folder, config, embedder.dim, [retriever], mesh)


def is_index_of(folder: str | None, retriever: str) -> bool:
    """Whether the folder holds an index of ours that this retriever built."""
    path = Path(folder or "") / ABOUT
    return folder is not None and path.is_file() and read_json(path).get("retriever") == retriever


def _share(source: Path, target: Path, *, copy: bool) -> None:
    """The same files in a second place, without their bytes where that is possible."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):  # another file system
        shutil.rmtree(target, ignore_errors=True)
        if copy:
            shutil.copytree(source, target)
        else:
            target.symlink_to(source)


def _describe(folder: Path, about: Mapping[str, Any], config: Config, retriever: str) -> None:
    text = {"retriever_format": config.text.retriever_format, "max_length": config.text.retriever_maxlength}
    write_json(folder / ABOUT, {"format": FORMAT, "retriever": retriever, **text, **about})


def check_library(config: Config) -> None:
    """What can be known of the library before any weights are loaded."""
    folder = Path(config.index.load_index_path or "")
    if config.index.load_index_path and (folder / ABOUT).is_file():
        check_count(config, read_json(folder / ABOUT).get("count"))
    elif config.index.save_index_path:
        _check_replaceable(Path(os.path.abspath(config.index.save_index_path)))


def check_count(config: Config, count: Any) -> None:
    """Refuses to look for more passages than there are."""
    flag, wanted = config.retrieval.searched
    if isinstance(count, int) and wanted > count:
        raise UserError(f"--{flag} {wanted}: the index holds {count} passages; ask for at most that many")


def _check_replaceable(folder: Path) -> None:
    """Only an index, an empty folder or nothing gives way to a new index."""
    is_index = (folder / ABOUT).is_file() and "retriever" in read_json(folder / ABOUT)
    if folder.exists() and not is_index and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--save_index_path {folder}: holds something else than an index; choose a new folder")
    if folder == Path.cwd():
        raise UserError(f"--save_index_path {folder}: is the folder that this runs in; choose a new folder")


def _open(folder: Path, config: Config, dim: int, retrievers: Sequence[str], mesh: Mesh) -> Library:
    """An index of ours; refuses the queries of another retriever than the one that built it."""
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / ABOUT}: format {about.get('format')!r}, not {FORMAT}; build the index again")
    if about.get("dim") != dim:
        raise UserError(
            f"{folder}: vectors of width {about.get('dim')}, but this retriever's are {dim} wide; "
            "load the index that belongs to --model_path, or build one with --passages"
        )
    if about.get("retriever") not in retrievers:
        raise UserError(
            f"{folder}: built by another retriever than this one; load the index that belongs to --model_path, "
            "or build one with --passages"
        )
    _warn(folder, about, config)
    passages = PassageStore.open(folder / PASSAGES)
    if len(passages) != about.get("count"):
        raise UserError(f"{folder}: {about.get('count')} vectors, but {len(passages)} passages; build the index again")
    check_count(config, len(passages))
    return Library(_load(folder, about, config, mesh), passages, about["retriever"])


def _warn(folder: Path, about: dict[str, Any], config: Config) -> None:
    """Says what differs between the index and the flags without making a search wrong."""
    text = config.text
    for flag, now in (("retriever_format", text.retriever_format), ("max_length", text.retriever_maxlength)):
        if about.get(flag) != now:
            logger.warning(
                "%s: its passages were embedded with %s %r, this run says %r", folder, flag, about.get(flag), now
            )
    if config.index.save_index_path and folder != Path(os.path.abspath(config.index.save_index_path)):
        logger.warning("--save_index_path has no effect: %s is there already", folder)


def _load(folder: Path, about: dict[str, Any], config: Config, mesh: Mesh) -> Index:
    """The kind of index that the flags ask for: the one that is there, or made from its vectors."""
    mode, kind, code_size = config.index.index_mode, about.get("kind"), about.get("code_size")
    if about.get("index_mode") == "flat":
        if mode == "flat":
            return FlatIndex.load(folder, about, mesh)
        return _faiss(read_array(folder / VECTORS, np.float16, (about["count"], about["dim"])), config)
    if (about.get("index_mode"), kind, code_size) == (mode, *_faiss_kind(config)):
        return FaissIndex.load(folder, about)
    had = f"--index_mode faiss --faiss_index_type {kind}" + (f" --faiss_code_size {code_size}" if code_size else "")
    raise UserError(f"{folder}: holds {had}, and no vectors to make another index from; ask for that one")


def _arrays(vectors: np.ndarray, config: Config, folder: Path) -> dict[str, Any]:
    """Writes the arrays of the kind of index that the flags ask for; returns what index.json must say of them."""
    count, dim = vectors.shape
    if config.index.index_mode == "flat":
        if not (folder / VECTORS).exists():
            np.save(folder / VECTORS, vectors)
        return {"index_mode": "flat", "kind": FlatIndex.kind, "count": count, "dim": dim}
    about = _faiss(vectors, config).save(folder)
    (folder / VECTORS).unlink(missing_ok=True)  # the codes are what is searched
    return about


def _faiss_kind(config: Config) -> tuple[FaissKind, int | None]:
    """The kind of faiss index that the flags ask for; a code size belongs to "pq" alone."""
    kind = config.index.faiss_index_type
    return kind, config.index.faiss_code_size if "pq" in kind else None


def _faiss(vectors: np.ndarray, config: Config) -> FaissIndex:
    kind, code_size = _faiss_kind(config)
    with progress(f"filling faiss {kind}", "vectors", len(vectors)) as more:
        return FaissIndex.build(vectors, kind, code_size, seed=config.run.seed, progress=more)


def _build(config: Config, embedder: Embedder, folder: Path) -> dict[str, Any]:
    """Passages from jsonl, embedded."""
    with progress("reading passages", "passages") as more:
        passages = build_passages(config.index.passages, folder / PASSAGES, config.index.max_passages, more)
    return _embed(config, embedder, passages, folder)


def _embed(config: Config, embedder: Embedder, passages: PassageStore, folder: Path) -> dict[str, Any]:
    """Vectors of the passages, in the kind of index that the flags ask for."""
    with progress("tokenizing for the retriever", "passages", len(passages)) as more:
        tokens = passages.tokens(embedder.tokenizer, config.text.retriever_format, "retriever", more)
    vectors = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float16, (len(passages), embedder.dim))
    with progress("embedding", "passages", len(passages)) as more:
        embed_corpus(embedder, tokens, vectors, config.index.per_gpu_embedder_batch_size, more)
    vectors.flush()
    return _arrays(vectors, config, folder)


def _count_shards(folder: Path) -> int:
    """The number of the reference's shards, once every one of them is known to be there."""
    names = [re.fullmatch(r"(?:embeddings|passages)\.(\d+)\.pt", file.name) for file in folder.iterdir()]
    count = 1 + max((int(name[1]) for name in names if name), default=-1)
    if not count:
        raise UserError(f"{folder}: neither {ABOUT} nor embeddings.0.pt in this folder; is it an index?")
    for n, kind in itertools.product(range(count), ("embeddings", "passages")):
        file = folder / f"{kind}.{n}.pt"
        if not file.is_file():
            raise UserError(f"{file}: missing, one of {count} shards; copy it from where the others are")
    return count


def _published_vectors(folder: Path, dim: int) -> list[np.ndarray]:
    """The reference's `embeddings.N.pt` (float16, "d p"), whatever their number, as views on the files."""
    arrays = []
    for n in range(_count_shards(folder)):
        file = folder / f"embeddings.{n}.pt"
        array = load_torch(file)
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype not in (np.float16, np.float32):
            raise UserError(f"{file}: holds no matrix of vectors; fetch it again")
        if array.shape[0] != dim:
            raise UserError(
                f"{file}: vectors of width {array.shape[0]}, but this retriever's are {dim} wide; "
                "load the index that belongs to --model_path"
            )
        arrays.append(array)
    return arrays


def _take_published(source: Path, arrays: list[np.ndarray], config: Config, folder: Path) -> dict[str, Any]:
    """Vectors and passages of the published form in ours."""
    logger.info("%s: the published form does not say which retriever built it; make sure it is this one", source)
    count = sum(array.shape[1] for array in arrays)
    vectors = np.lib.format.open_memmap(folder / VECTORS, "w+", np.float16, (count, arrays[0].shape[0]))
    with progress("reading vectors", "vectors", count) as more:
        start = 0
        for array in arrays:
            vectors[start : start + array.shape[1]] = array.T
            start += array.shape[1]
            more(array.shape[1])
    vectors.flush()
    with progress("reading passages", "passages", count) as more:
        counts = [array.shape[1] for array in arrays]
        PassageStore.build(_published_passages(source, counts), folder / PASSAGES, more)
    return _arrays(vectors, config, folder)


def _published_passages(folder: Path, counts: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """The passages of each shard, once they are known to be as many as its vectors."""
    for n, count in enumerate(counts):
        file = folder / f"passages.{n}.pt"
        passages = load_pickle(file)
        if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
            raise UserError(f"{file}: holds no list of passages; fetch it again")
        if len(passages) != count:
            raise UserError(
                f"{file}: {len(passages)} passages, but embeddings.{n}.pt has {count} vectors; fetch both again"
            )
        yield from passages
