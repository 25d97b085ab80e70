"""Merges flat indexes built by the same retriever into one: for a corpus that was embedded in parts."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.convert import FlatIndexFolder
from atlas_jax.retrieval.formats.index_folder import is_index
from atlas_jax.retrieval.formats.torch_shards import split_range


class MergedIndexes:
    """`IndexSource` of several flat indexes in our own format, concatenated."""

    def __init__(self, folders: Sequence[Path]):
        for folder in folders:
            if not is_index(folder):
                raise UserError(f"{folder}: no index of ours; `atlas index convert` makes one of published shards")
        self.parts = [FlatIndexFolder(folder) for folder in folders]
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
