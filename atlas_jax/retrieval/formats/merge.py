"""Several indexes of one retriever, one after the other, as one: a corpus that was embedded in parts."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16

from atlas_jax.errors import UserError
from atlas_jax.retrieval.formats.convert import FlatIndexFolder
from atlas_jax.retrieval.formats.index_folder import is_index
from atlas_jax.retrieval.formats.torch_shards import pieces


class MergedIndexes:
    """Flat indexes of ours, end to end: for `convert`."""

    def __init__(self, folders: Sequence[Path]):
        for folder in folders:
            if not is_index(folder):
                raise UserError(f"{folder}: no index of ours; `atlas index convert` makes one of published shards")
        self.parts = [FlatIndexFolder(folder) for folder in folders]
        first = self.parts[0]
        for folder, part in zip(folders, self.parts, strict=True):
            _check_alike(folders[0], first.about, folder, part.about)
        self.origin = first.origin
        self.count, self.dim = sum(part.count for part in self.parts), first.dim

    def read(self, start: int, stop: int) -> Float16[np.ndarray, "n d"]:
        """The vectors from `start` on, before `stop`."""
        found = pieces([part.count for part in self.parts], start, stop)
        return np.concatenate([self.parts[n].read(begin, end) for n, begin, end, _ in found])

    def texts(self) -> Iterator[bytes]:
        """The passages of the first part, then those of the second, and so on; as they are, nothing is parsed."""
        return itertools.chain.from_iterable(part.texts() for part in self.parts)


def _check_alike(first: Path, expected: Mapping[str, Any], folder: Path, about: Mapping[str, Any]) -> None:
    for name, remedy in (
        ("dim", "merge indexes of one retriever"),
        ("retriever", "merge indexes of one retriever; convert the shards again with --model_path to say which it was"),
        ("retriever_format", "embed both with the same --retriever_format"),
        ("max_length", "embed both with the same --text_maxlength"),
    ):
        if about.get(name) != expected.get(name):
            ours, theirs = (
                value if value is not None else "unknown" for value in (about.get(name), expected.get(name))
            )
            raise UserError(f"{folder}: its {name} is {ours!s:.40}, but {first} has {theirs!s:.40}; {remedy}")
