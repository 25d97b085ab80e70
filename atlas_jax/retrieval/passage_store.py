"""Passages on disk, memory-mapped: the JSON of each by passage number, and token ids beside it."""

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.data.jsonl import read_lines
from atlas_jax.data.ragged import Numbers, RaggedArray, RaggedWriter
from atlas_jax.data.reader_inputs import render
from atlas_jax.data.tokens import Tokenizer, flatten
from atlas_jax.errors import UserError
from atlas_jax.storage.cache import find_or_make, fingerprint_files
from atlas_jax.storage.files import atomic_folder

logger = logging.getLogger(__name__)

Progress = Callable[[int], object]  # called with the number of passages just done, like `update` of a tqdm bar
PathLike = str | os.PathLike[str]

_VERSION = 1
_BATCH = 1024  # passages in memory at a time when writing
REMEDY = "pass --save_index_path with a folder that can be written and has room"  # of a run
_TOKENS_REMEDY = "pass --cache_dir with a folder that can be written and has room"
_REBUILD = "delete the folder and build the passages again"
_encode = json.JSONEncoder(ensure_ascii=False).encode


def build_passages(
    paths: Sequence[PathLike],
    folder: PathLike,
    max_passages: int = -1,
    progress: Progress | None = None,
    remedy: str = REMEDY,
) -> "PassageStore":
    """Builds a store of the first `max_passages` passages (-1: all) of JSON-lines files, read as a stream.

    A `section` is appended to the title: "title: section". UserError names file and line of a bad passage.
    """
    if not paths:
        raise UserError("no passage files: name at least one with --passages")
    texts = itertools.chain.from_iterable(map(_read_passages, paths))
    return PassageStore.write(
        itertools.islice(texts, None if max_passages < 0 else max_passages), folder, progress, remedy
    )


def _read_passages(path: PathLike) -> Iterator[bytes]:
    """Yields the JSON of every passage of a file; copies the text of the line where it can, which is faster."""
    for line, raw, row in read_lines(path):
        text = _join_section(raw.strip(), row) if _is_complete(row) and b"\\u" not in raw else None
        if text is None:
            passage = _validated(row, f"{path}:{line}")
            if passage["section"] and "title" in row:  # Reference: a row without a title gets none from its section
                passage["title"] = _full_title(passage)
            text = _encode(passage).encode()
        yield text


def _join_section(text: bytes, row: Mapping) -> bytes | None:
    """Appends the section to the title in the JSON text of a row; None if a string replacement may miss the title."""
    if not row["section"]:
        return text
    old, new = (f'"title": {_encode(value)}'.encode() for value in (row["title"], _full_title(row)))
    return text.replace(old, new) if old in text and text.count(b'"title"') == 1 else None


def _full_title(row: Mapping) -> str:
    return f"{row['title']}: {row['section']}"


def _is_complete(row: Mapping) -> bool:
    """True if the row has an id, and text, title and section as strings."""
    return "id" in row and type(row.get("text")) is type(row.get("title")) is type(row.get("section")) is str


class PassageStore:
    """Passages by number, counted from 0.

    Files: passages.json (version, count), text.bin (the JSON of all passages, concatenated), text.offsets.npy.
    """

    def __init__(self, folder: Path, text: RaggedArray, cache: Path | None = None):
        self.folder, self.cache = folder, cache
        self._text = text
        self._tokens: dict[str, PassageTokens] = {}

    @classmethod
    def build(cls, rows: Iterable[Mapping], folder: PathLike, progress: Progress | None = None) -> "PassageStore":
        """Writes `rows` whose sections are in the title already, such as the reference's pickled passages."""
        return cls.write(serialize_passages(rows), folder, progress)

    @classmethod
    def write(
        cls, texts: Iterable[bytes], folder: PathLike, progress: Progress | None = None, remedy: str = REMEDY
    ) -> "PassageStore":
        """Writes passages given as JSON.

        A store in `folder` is replaced once the new one is complete; UserError if the folder holds anything else, or,
        with `remedy` at its end, if it cannot be written.
        """
        folder = Path(os.path.abspath(folder))
        _check_replaceable(folder)
        with atomic_folder(folder, remedy, replace=True) as draft:
            with RaggedWriter(draft, "text", np.dtype(np.uint8)) as writer:
                for batch in _batches(texts):
                    writer.extend(np.frombuffer(b"".join(batch), np.uint8), map(len, batch))
                    if progress:
                        progress(len(batch))
            if not len(writer):
                raise UserError(f"{folder}: no passages to write; check --passages and --max_passages")
            (draft / "passages.json").write_text(json.dumps({"version": _VERSION, "count": len(writer)}) + "\n")
        return cls.open(folder)

    @classmethod
    def open(cls, folder: PathLike, cache: Path | None = None) -> "PassageStore":
        """Memory-maps a store; UserError if a file is missing, truncated or of another version.

        `cache`: a folder for token ids if `folder` cannot be written; they are found there again.
        """
        folder = Path(os.path.abspath(folder))
        metadata = _read_metadata(folder / "passages.json", _REBUILD)
        return cls(folder, RaggedArray.open(folder, "text", np.dtype(np.uint8), metadata["count"], _REBUILD), cache)

    def __len__(self) -> int:
        return len(self._text)

    def take(self, numbers: Numbers) -> list[dict[str, Any]]:
        """Returns the fields of each passage, in the order of `numbers`; IndexError if there is no such passage."""
        return [json.loads(str(row.data, "utf-8")) for row in self._text.take(numbers)]

    def passages_json(self) -> Iterator[bytes]:
        """Yields the JSON of every passage, in order, as `write` takes it."""
        for start in range(0, len(self), _BATCH):
            for row in self._text.take(np.arange(start, min(start + _BATCH, len(self)))):
                yield row.tobytes()

    def tokens(self, tokenizer: Tokenizer, format: str, name: str, progress: Progress | None = None) -> "PassageTokens":
        """Returns token ids of `format.format(**passage)` for every passage, uncut and without special tokens.

        Computed once per tokenizer and format, by one process for all that share the storage, and stored in the folder
        of the passages as `tokens-{name}-{hash}`, or in the cache if that folder cannot be written.
        """
        metadata = {"version": _VERSION, "count": len(self), "tokenizer": tokenizer.fingerprint, "format": format}
        digest = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:12]
        key = f"tokens-{name}-{digest}"
        if key not in self._tokens:
            places = [self.folder / key]
            if self.cache:
                places.append(self.cache / "tokens" / fingerprint_files([self.folder / "text.bin"]) / key)
            text = (self.folder / "text.bin").stat().st_size
            size = text // 2 + 8 * len(self)  # 2 bytes for each token of some 4 letters, and its offsets

            def make(place: Path) -> None:
                _log_replaced_tokenizer(place, metadata)
                self._write_tokens(place, tokenizer, metadata, progress)

            def find() -> Path | None:
                return next(filter(Path.is_dir, places), None)

            folder = find_or_make(places, size, f"{self.folder}: token ids", find, make)
            self._tokens[key] = PassageTokens.open(folder, metadata)
        return self._tokens[key]

    def _write_tokens(self, folder: Path, tokenizer: Tokenizer, metadata: dict, progress: Progress | None) -> None:
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "int32"
        with atomic_folder(folder, _TOKENS_REMEDY) as draft:
            with RaggedWriter(draft, "tokens", np.dtype(dtype)) as writer:
                for start in range(0, len(self), _BATCH):
                    passages = self.take(np.arange(start, min(start + _BATCH, len(self))))
                    rows = tokenizer.ids([render(metadata["format"], passage) for passage in passages])
                    writer.extend(flatten(rows, writer.dtype), map(len, rows))
                    if progress:
                        progress(len(rows))
            (draft / "tokens.json").write_text(json.dumps({**metadata, "dtype": dtype}, indent=1) + "\n")


class PassageTokens:
    """Token ids of every passage of a store, for one tokenizer and one format.

    Files: tokens.json (version, count, tokenizer, format, dtype), tokens.bin (concatenated ids), tokens.offsets.npy.
    """

    def __init__(self, rows: RaggedArray):
        self._rows = rows

    @classmethod
    def open(cls, folder: Path, expected: Mapping[str, Any]) -> "PassageTokens":
        """Memory-maps token ids; UserError unless version, count, tokenizer and format are as in `expected`."""
        remedy = "delete this folder and it will be made again"
        metadata = _read_metadata(folder / "tokens.json", remedy)
        if {field: metadata.get(field) for field in expected} != expected or metadata.get("dtype") not in (
            "uint16",
            "int32",
        ):
            raise UserError(f"{folder}/tokens.json: not made from these passages and this tokenizer; {remedy}")
        return cls(RaggedArray.open(folder, "tokens", np.dtype(metadata["dtype"]), metadata["count"], remedy))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        """Returns the ids of each passage (uint16 or int32, read-only), in the order of `numbers`."""
        return self._rows.take(numbers)

    def lengths(self, numbers: Numbers) -> np.ndarray:
        """Returns the number of ids of each passage."""
        return self._rows.lengths(numbers)


def _log_replaced_tokenizer(place: Path, metadata: Mapping[str, Any]) -> None:
    """Says so if there are token ids of the same format beside `place` that another tokenizer made."""
    name = place.name.rpartition("-")[0]
    for other in place.parent.glob(f"{name}-*/tokens.json"):
        made = json.loads(other.read_bytes())
        if made.get("format") == metadata["format"] and made.get("tokenizer") != metadata["tokenizer"]:
            logger.info("%s: made by another tokenizer than this run's; tokenizing again", other.parent)


def _validated(row: Mapping, where: str) -> dict[str, Any]:
    """Returns the row with missing title and section set to "".

    UserError if id or text is missing, or text, title or section is not a string.
    """
    for field in ("id", "text"):
        if field not in row:
            raise UserError(f'{where}: a passage without "{field}"; add the field or remove the passage')
    passage = {**row, "title": row.get("title") or "", "section": row.get("section") or ""}
    for field in ("text", "title", "section"):
        if not isinstance(passage[field], str):
            raise UserError(f'{where}: "{field}" must be a string, not {passage[field]!r:.40}; put it in quotes')
    return passage


def serialize_passages(rows: Iterable[Mapping]) -> Iterator[bytes]:
    """Yields the JSON of passages whose sections are in the title already; UserError names a bad passage."""
    for number, row in enumerate(rows):
        try:
            yield _encode(row if _is_complete(row) else _validated(row, f"passage {number}")).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"passage {number} ({row.get('id')}): not text ({error}); repair or remove it") from None


def _batches(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yields lists of `_BATCH` rows; the last one may be shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


def _check_replaceable(folder: Path) -> None:
    """UserError unless `folder` is a store, is empty or does not exist."""
    if folder.is_dir():
        store_files = {"passages.json", "text.bin", "text.offsets.npy"}
        others = [name for name in os.listdir(folder) if name not in store_files and not name.startswith("tokens-")]
        if others:
            raise UserError(f"{folder}: holds other files ({others[0]}); choose a new folder for the passages")
    elif folder.exists():
        raise UserError(f"{folder}: is a file; choose a new folder for the passages")


def _read_metadata(file: Path, remedy: str) -> dict[str, Any]:
    """Reads passages.json or tokens.json; UserError if it is missing, damaged or of another version."""
    try:
        metadata = json.loads(file.read_bytes())
        version, count = metadata["version"], metadata["count"]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path, or {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; {remedy}") from None
    if version != _VERSION or not isinstance(count, int):
        raise UserError(f"{file}: version {version}, this program reads version {_VERSION}; {remedy}")
    return metadata
