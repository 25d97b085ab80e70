"""Which example comes when: a pure function of (seed, epoch, position), whatever the number of hosts or devices."""

import functools
from typing import NamedTuple

import numpy as np


class EpochPosition(NamedTuple):
    """An example's number among all, and the epoch that it is read in."""

    epoch: int
    number: int


class Order:
    """An endless sequence of `count` examples, epoch after epoch; with `shuffle`, each in a new random order.

    A batch may hold the end of one epoch and the start of the next, so every example is seen exactly once an epoch.
    """

    def __init__(self, count: int, seed: int, *, shuffle: bool):
        self.count = count
        self.seed = seed
        self.shuffle = shuffle
        self._permutation = functools.lru_cache(maxsize=2)(self._make)

    def __getitem__(self, position: int) -> EpochPosition:
        epoch, place = divmod(position, self.count)
        return EpochPosition(epoch, int(self._permutation(epoch)[place]) if self.shuffle else place)

    def _make(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)
