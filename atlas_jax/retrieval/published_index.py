"""Takes over the published shards of an index: converts them once, for all runs that read them.

The copy is beside the shards, or else in the cache folder, and its name holds a fingerprint of the shards and of the
kind of index that was made from them.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.index_folder import FORMAT
from atlas_jax.retrieval.formats.torch_shards import TorchShards, shard_files
from atlas_jax.storage.cache import (
    GIGABYTE,
    cache_folder,
    find_or_make,
    fingerprint_files,
    sample_digest,
)
from atlas_jax.storage.files import atomic_folder, fsync, read_json, write_json

logger = logging.getLogger(__name__)

PREFIX = "atlas_index-"  # of a copy's folder, before the fingerprint
RECORD = "copy.json"  # in that folder: digests of samples of its files, by which damage is seen
REMEDY = "name a folder that can be written and has room with --cache_dir"


def take_over(
    folder: Path, cache_dir: str | None, kind: dict[str, Any], convert: Callable[[TorchShards, Path], None]
) -> Path:
    """Returns a copy of the published shards in our own format, which is made first if there is none.

    `kind`: what decides the form of the copy; `convert(shards, draft)` writes it. Each host of a run has to call this;
    hosts that share the storage share the copy. UserError if there is no place for it, or the shards are damaged.
    """
    shards, files = TorchShards(folder), shard_files(folder)
    name = f"{PREFIX}{fingerprint_files(files, format=FORMAT, **kind)}"
    places = [folder / name, cache_folder(cache_dir) / "indexes" / name]

    def make(place: Path) -> None:
        if others := sorted(path.name for path in folder.glob(f"{PREFIX}*") if path.is_dir()):
            logger.info("%s: the shards or the kind of index are others than those of %s", folder, ", ".join(others))
        logger.info("%s: taken over once for all runs, %.3g GB in %s", folder, size / GIGABYTE, place)
        with atomic_folder(place, REMEDY, replace=True) as draft:
            convert(shards, draft)
            write_json(draft / RECORD, {"samples": _samples(draft)})
            fsync(*(path for path in draft.rglob("*") if path.is_file()))

    # Text and vectors; pickles and arrays of them have about that size, and each passage has two offsets
    size = sum(path.stat().st_size for path in files) + 16 * shards.count
    return find_or_make(places, size, f"{folder}: a copy in our own format", lambda: _complete(places), make)


def _samples(copy: Path) -> dict[str, str]:
    """A digest of samples of each file of a copy, but for RECORD and the token ids that runs add."""
    paths = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.name != RECORD]
    names = {str(path.relative_to(copy)): path for path in paths}
    return {name: sample_digest(path) for name, path in names.items() if "tokens-" not in name}


def _complete(places: list[Path]) -> Path | None:
    """The first of these that is a whole copy; a damaged one is logged and made again."""
    for place in filter(Path.is_dir, places):
        try:
            if read_json(place / RECORD).get("samples") == _samples(place):
                return place
            logger.warning("%s: damaged; made again", place)
        except UserError as error:
            logger.warning("%s; made again", error)
    return None
