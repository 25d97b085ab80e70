"""Merges flat indexes built by the same retriever into one: for a corpus that was embedded in parts."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.convert import FlatIndexFolder
from atlas_jax.retrieval.formats.index_folder import is_index
from atlas_jax.retrieval.formats.torch_shards import split_range
from atlas_jax.runtime.progress import progress

logger = logging.getLogger(__name__)


class MergedIndexes:
    """`IndexSource` of several flat indexes in our own format, concatenated."""

    def __init__(self, folders: Sequence[Path]):
        for folder in folders:
            if not is_index(folder):
                raise UserError(f"{folder}: no index of ours; `atlas index convert` makes one of published shards")
        self.folders, self.parts = list(folders), [FlatIndexFolder(folder) for folder in folders]
        first = self.parts[0]
        for folder, part in zip(folders, self.parts, strict=True):
            _check_compatible(folders[0], first.metadata, folder, part.metadata)
        self.origin = first.origin
        self.count, self.dim = sum(part.count for part in self.parts), first.dim

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """Returns the vectors of passages `start` to `stop` (exclusive), numbered through all parts."""
        ranges = split_range([part.count for part in self.parts], start, stop)
        return np.concatenate([self.parts[n].read(begin, end) for n, begin, end, _ in ranges])

    def passages_json(self) -> Iterator[bytes]:
        """Yields the JSON of every passage, part after part, without parsing."""
        return itertools.chain.from_iterable(part.passages_json() for part in self.parts)


def check_disjoint(merged: MergedIndexes) -> None:
    """UserError if two parts are one folder, or have the same passage; logs ids that mean different passages.

    Passages are compared by hashes: 16 bytes of memory for each.
    """
    for folder, other in itertools.combinations(merged.folders, 2):
        if folder.samefile(other):
            raise UserError(f"{folder}: is to be merged with itself ({other}); name each part once")
    hashes = np.empty((merged.count, 2), np.uint64)  # of the id and of the whole JSON of each passage
    with progress("comparing passages", "passages", merged.count) as advance:
        for number, text in enumerate(merged.passages_json()):
            passage_id = json.dumps(json.loads(text).get("id")).encode()
            digests = (hashlib.blake2b(column, digest_size=8).digest() for column in (passage_id, text))
            hashes[number] = [int.from_bytes(digest) for digest in digests]
            advance(1)
    part = np.repeat(np.arange(len(merged.parts)), [part.count for part in merged.parts])
    order = np.argsort(hashes[:, 0], kind="stable")
    before, after = order[:-1], order[1:]
    repeated = (hashes[before, 0] == hashes[after, 0]) & (part[before] != part[after])
    same_text = repeated & (hashes[before, 1] == hashes[after, 1])
    if not repeated.any():
        return
    pair = int(np.flatnonzero(same_text if same_text.any() else repeated)[0])
    first, second = part[before[pair]], part[after[pair]]
    count = int((repeated & (part[after] == second)).sum())
    number = after[pair] - np.searchsorted(part, second)  # in the second part
    passage_id = merged.parts[second].store.take(np.array([number]))[0]["id"]
    which = f"{merged.folders[second]}: ids of {count} of its passages, such as {passage_id!r:.60},"
    if same_text.any():
        raise UserError(f"{which} are in {merged.folders[first]} too, with the same text; build parts of other files")
    logger.warning("%s are those of other passages in %s", which, merged.folders[first])


def _check_compatible(first: Path, expected: Mapping[str, Any], folder: Path, metadata: Mapping[str, Any]) -> None:
    """UserError unless both indexes have vectors of the same width from the same retriever, format and length."""
    for name, remedy in (
        ("dim", "merge indexes of one retriever"),
        ("retriever", "merge indexes of one retriever; convert the shards again with --model_path to say which it was"),
        ("retriever_format", "embed both with the same --retriever_format"),
        ("max_length", "embed both with the same --text_maxlength"),
    ):
        if metadata.get(name) != expected.get(name):
            actual, wanted = (
                value if value is not None else "unknown" for value in (metadata.get(name), expected.get(name))
            )
            raise UserError(f"{folder}: its {name} is {actual!s:.40}, but {first} has {wanted!s:.40}; {remedy}")
