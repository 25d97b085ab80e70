"""The folder of an index in our own format: `index.json` (metadata), .npy arrays, `passages/` (a `PassageStore`)."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.npy_files import read_array
from atlas_jax.storage.files import can_write, copy_tree, is_empty, read_json, remove_tree, write_json

FORMAT = 1
METADATA = "index.json"
PASSAGES = "passages"
VECTORS = "embeddings.npy"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Provenance of the vectors, as index.json holds it; None: unknown, as for the published shards."""

    retriever: str | None = None  # fingerprint of the passage encoder
    retriever_format: str | None = None  # format string of the embedded text: --retriever_format
    max_length: int | None = None  # tokens of a text at most


def write_metadata(folder: Path, arrays: Mapping[str, Any], origin: Origin) -> None:
    """Writes index.json: the format version, the origin, and the fields that describe the arrays."""
    write_json(folder / METADATA, {"format": FORMAT, **dataclasses.asdict(origin), **arrays})


def is_index(folder: Path) -> bool:
    """True if the folder holds an index in our own format; its files may still be missing or damaged."""
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads index.json; UserError if its format version is another one or it lacks `count` or `dim`."""
    metadata = read_json(folder / METADATA)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{folder / METADATA}: format {metadata.get('format')!r}, not {FORMAT}; build the index again")
    if not all(type(metadata.get(name)) is int and metadata[name] > 0 for name in ("count", "dim")):
        raise UserError(f"{folder / METADATA}: does not say how many vectors there are, and how wide; build it again")
    return metadata


def origin_from_metadata(metadata: Mapping[str, Any]) -> Origin:
    """Extracts the origin of the vectors from the content of index.json."""
    return Origin(*(metadata.get(field.name) for field in dataclasses.fields(Origin)))


def check_retriever(folder: Path, metadata: Mapping[str, Any], dim: int, fingerprints: Sequence[str]) -> None:
    """UserError unless the vectors are `dim` wide and come from a passage encoder with one of these fingerprints.

    An index of unknown origin passes and is logged; `folder` is named in the messages.
    """
    if metadata["dim"] != dim:
        raise UserError(
            f"{folder}: vectors of width {metadata['dim']}, but this retriever's are {dim} wide; "
            "load the index that belongs to --model_path, or build one (atlas index build, or --passages of a run)"
        )
    if metadata.get("retriever", "") is None:
        logger.info("%s: does not say which retriever built it; make sure it is this one", folder)
    elif metadata.get("retriever") not in fingerprints:
        raise UserError(
            f"{folder}: built by another retriever than this one; load the index that belongs to --model_path, "
            "or build one (atlas index build, or --passages of a run)"
        )


def read_vectors(folder: Path, metadata: Mapping[str, Any]) -> np.ndarray:
    """Memory-maps the vectors of a flat index: float16 "p d"; UserError for a faiss index, which has no vectors.

    A slice reads only its rows from disk, so any number of hosts can share one file, each reading its own rows.
    """
    if metadata.get("index_mode") != "flat":
        raise UserError(f"{folder}: a faiss {metadata.get('kind')} index, without the vectors; take the flat one")
    return read_array(folder / VECTORS, np.float16, (metadata["count"], metadata["dim"]))


def check_replaceable(folder: Path, flag: str = "--save_index_path") -> None:
    """UserError unless `folder` is an index, is empty or does not exist, and can be written.

    Also if it is the working directory.
    """
    replaceable = is_index(folder) and "retriever" in read_json(folder / METADATA)
    if folder.exists() and not replaceable and not is_empty(folder):
        raise UserError(f"{flag} {folder}: holds something else than an index; choose a new folder")
    if folder.resolve() == Path.cwd():
        raise UserError(f"{flag} {folder}: is the folder that this runs in; choose a new folder")
    if not can_write(folder):
        raise UserError(f"{flag} {folder}: cannot be written; choose another folder")


def link_tree(source: Path, target: Path, *, copy: bool) -> None:
    """Recreates a folder with hard links; where there are none, copies it if `copy` or else links to it if possible."""
    try:
        copy_tree(source, target, os.link)
    except OSError:  # another file system, or one without hard links
        remove_tree(target)
        try:
            if copy:
                raise
            target.symlink_to(source)
        except OSError:
            copy_tree(source, target)
