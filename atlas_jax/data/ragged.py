"""Memory-mapped arrays of rows of different lengths."""

import itertools
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from atlas_jax.errors import UserError

Numbers = Sequence[int] | np.ndarray  # row numbers


class RaggedArray:
    """Rows `data[offsets[i] : offsets[i + 1]]`, stored as `{name}.bin` and `{name}.offsets.npy` (uint64, rows + 1)."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self.data, self.offsets = data, offsets

    @classmethod
    def open(cls, folder: Path, name: str, dtype: np.dtype, rows: int, remedy: str) -> "RaggedArray":
        """Memory-maps both files; UserError, ending in `remedy`, if one is missing, damaged or of the wrong size."""
        current_file = offsets_file = folder / f"{name}.offsets.npy"
        data_file = folder / f"{name}.bin"
        try:
            offsets = np.load(offsets_file, mmap_mode="r")
            current_file, size = data_file, data_file.stat().st_size
            data = np.asarray(np.memmap(data_file, dtype, mode="r")) if size else np.empty(0, dtype)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: missing; {remedy}") from None
        except (ValueError, EOFError, OSError):
            raise UserError(f"{current_file}: damaged or truncated; {remedy}") from None
        if offsets.dtype != np.uint64 or offsets.shape != (rows + 1,):
            raise UserError(f"{offsets_file}: not the offsets of {rows} rows; {remedy}")
        if size != int(offsets[-1]) * data.itemsize:
            raise UserError(f"{data_file}: {size} bytes, expected {int(offsets[-1]) * data.itemsize}; {remedy}")
        return cls(data, np.asarray(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, numbers: Numbers) -> np.ndarray:
        """Returns the length of each of these rows."""
        starts, ends = self._bounds(numbers)
        return ends - starts

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        """Returns read-only views of these rows, in the given order."""
        starts, ends = self._bounds(numbers)
        return [self.data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def _bounds(self, numbers: Numbers) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(numbers, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"row {rows.min()} or {rows.max()}: there are {len(self)} rows")
        return self.offsets[rows].astype(np.int64), self.offsets[rows + 1].astype(np.int64)


class RaggedWriter:
    """Appends rows to the files of a new `RaggedArray`, complete after `__exit__`. Takes 8 bytes of memory per row."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.dtype = dtype
        self._offsets, self._offsets_file = array("Q", [0]), folder / f"{name}.offsets.npy"
        self._data = open(folder / f"{name}.bin", "wb")  # noqa: SIM115, closed by __exit__

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def extend(self, flat: np.ndarray, lengths: Iterable[int]) -> None:
        """Appends rows, given concatenated with the length of each."""
        self._data.write(flat.astype(self.dtype, copy=False).data)
        self._offsets.extend(itertools.islice(itertools.accumulate(lengths, initial=self._offsets[-1]), 1, None))

    def __enter__(self) -> "RaggedWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._data.close()
        np.save(self._offsets_file, np.frombuffer(self._offsets, np.uint64))
