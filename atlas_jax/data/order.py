"""The order of training examples: a pure function of (seed, epoch, position), not of the number of hosts or devices."""

import functools
import hashlib
from typing import NamedTuple

import numpy as np

LONGEST_ARRAY = 2**28  # a longer permutation would take over 2 GB


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

    def _make_permutation(self, epoch: int) -> "np.ndarray | FeistelPermutation":
        if self.count > LONGEST_ARRAY:
            return FeistelPermutation(self.count, f"{self.seed} {epoch}")
        return np.random.default_rng([self.seed, epoch]).permutation(self.count)


class FeistelPermutation:
    """A pseudo-random permutation of 0 to `count` - 1 that takes no memory: a Feistel network of four hashed rounds.

    Numbers beyond `count` are permuted again until they are below it (Black and Rogaway, 2002, cycle walking).
    """

    def __init__(self, count: int, key: str):
        self._count, self._key = count, key.encode()
        self._half_bits = ((count - 1).bit_length() + 1) // 2

    def __getitem__(self, index: int) -> int:
        while True:
            index = self._encrypt(index)
            if index < self._count:
                return index

    def _encrypt(self, index: int) -> int:
        left, right = index >> self._half_bits, index & ((1 << self._half_bits) - 1)
        for round_number in range(4):
            digest = hashlib.blake2b(f"{round_number} {right}".encode(), key=self._key[:64], digest_size=8).digest()
            mixed = int.from_bytes(digest, "little") & ((1 << self._half_bits) - 1)
            left, right = right, left ^ mixed
        return left << self._half_bits | right
