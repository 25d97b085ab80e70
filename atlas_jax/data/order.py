"""The order of training examples: a pure function of (seed, epoch, position), not of the number of hosts or devices."""

import functools
from typing import NamedTuple

import numpy as np


class EpochPosition(NamedTuple):
    """The epoch in which an example is read, and its number among the examples of all files."""

    epoch: int
    number: int  # 0-based


class ExampleOrder:
    """Endless sequence over `count` examples, epoch after epoch; with `shuffle`, in a new random order every epoch.

    A batch may span the end of one epoch and the start of the next, so every example is read exactly once per epoch.
    """

    def __init__(self, count: int, seed: int, *, shuffle: bool):
        self.count = count
        self.seed = seed
        self.shuffle = shuffle
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __getitem__(self, position: int) -> EpochPosition:
        epoch, index = divmod(position, self.count)
        return EpochPosition(epoch, int(self._permutation(epoch)[index]) if self.shuffle else index)

    def _make_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)
