"""The folder of an index of ours: `index.json`, the arrays of its kind, `passages/`."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.npy_files import read_array
from atlas_jax.storage.files import read_json, write_json

FORMAT = 1
ABOUT = "index.json"
PASSAGES = "passages"
VECTORS = "embeddings.npy"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Origin:
    """How the vectors were made; None: nobody knows, as with the published form."""

    retriever: str | None = None  # fingerprint of the passage encoder
    retriever_format: str | None = None
    max_length: int | None = None


def write_about(folder: Path, arrays: Mapping[str, Any], origin: Origin) -> None:
    """Writes index.json: what `save` said of the arrays, and where they are from."""
    write_json(folder / ABOUT, {"format": FORMAT, **dataclasses.asdict(origin), **arrays})


def is_index(folder: Path) -> bool:
    """Whether an index of ours is there, whole or not."""
    return (folder / ABOUT).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """What index.json says, if this program can read such an index."""
    about = read_json(folder / ABOUT)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / ABOUT}: format {about.get('format')!r}, not {FORMAT}; build the index again")
    if not all(type(about.get(name)) is int and about[name] > 0 for name in ("count", "dim")):
        raise UserError(f"{folder / ABOUT}: does not say how many vectors there are, and how wide; build it again")
    return about


def origin_of(about: Mapping[str, Any]) -> Origin:
    """Where the vectors are from, by index.json."""
    return Origin(*(about.get(field.name) for field in dataclasses.fields(Origin)))


def check_retriever(folder: Path, about: Mapping[str, Any], dim: int, retrievers: Sequence[str]) -> None:
    """Refuses vectors of another width than this retriever's, or of another passage encoder than one of these."""
    if about["dim"] != dim:
        raise UserError(
            f"{folder}: vectors of width {about['dim']}, but this retriever's are {dim} wide; "
            "load the index that belongs to --model_path, or build one with --passages"
        )
    if about.get("retriever", "") is None:
        logger.info("%s: does not say which retriever built it; make sure it is this one", folder)
    elif about.get("retriever") not in retrievers:
        raise UserError(
            f"{folder}: built by another retriever than this one; load the index that belongs to --model_path, "
            "or build one with --passages"
        )


def read_vectors(folder: Path, about: Mapping[str, Any]) -> np.ndarray:
    """The vectors (float16, "p d") of an index that has them, memory-mapped: a slice reads those rows and no others.

    So any number of hosts share one file, each with its own rows.
    """
    if about.get("index_mode") != "flat":
        raise UserError(f"{folder}: a faiss {about.get('kind')} index, without the vectors; take the flat one")
    return read_array(folder / VECTORS, np.float16, (about["count"], about["dim"]))


def check_replaceable(folder: Path, flag: str = "--save_index_path") -> None:
    """Only an index, an empty folder or nothing gives way to a new index."""
    replaceable = is_index(folder) and "retriever" in read_json(folder / ABOUT)
    if folder.exists() and not replaceable and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{flag} {folder}: holds something else than an index; choose a new folder")
    if folder == Path.cwd():
        raise UserError(f"{flag} {folder}: is the folder that this runs in; choose a new folder")


def link_tree(source: Path, target: Path, *, copy: bool) -> None:
    """The same files in a second place, without their bytes where that is possible; `copy`: never by a symlink."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):  # another file system
        shutil.rmtree(target, ignore_errors=True)
        if copy:
            shutil.copytree(source, target)
        else:
            target.symlink_to(source)
