"""The passages on disk, memory-mapped: their JSON, and their token ids beside it. Text is read by number."""

import hashlib
import itertools
import json
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
from atlas_jax.storage.files import atomic_folder

Progress = Callable[[int], object]  # told how many more passages are done: the `update` of a tqdm bar
PathLike = str | os.PathLike[str]

_VERSION = 1
_BATCH = 1024  # passages in memory at a time while building
_ELSEWHERE = "pass --save_index_path with a folder that can be written and has room"
_REBUILD = "delete the folder and build the passages again"
_encode = json.JSONEncoder(ensure_ascii=False).encode


def build_passages(
    paths: Sequence[PathLike], folder: PathLike, max_passages: int = -1, progress: Progress | None = None
) -> "PassageStore":
    """A store of the first `max_passages` passages (-1: all) of JSON-lines files, read as a stream.

    A `section` joins the title as "title: section".
    """
    if not paths:
        raise UserError("no passage files: name at least one with --passages")
    lines = itertools.chain.from_iterable(map(_lines, paths))
    return PassageStore.write(itertools.islice(lines, None if max_passages < 0 else max_passages), folder, progress)


def _lines(path: PathLike) -> Iterator[bytes]:
    """The JSON of every passage of a file: the file's own text wherever that will do, which is faster."""
    for line, raw, row in read_lines(path):
        text = _joined(raw.strip(), row) if _is_complete(row) and b"\\u" not in raw else None
        if text is None:
            passage = _checked(row, f"{path}:{line}")
            if passage["section"] and "title" in row:  # Reference: without a title there is nothing to join
                passage["title"] = _full_title(passage)
            text = _encode(passage).encode()
        yield text


def _joined(text: bytes, row: Mapping) -> bytes | None:
    """The text of a row with the section joined to the title; None where it is not plain to see which is the title."""
    if not row["section"]:
        return text
    title, joined = (f'"title": {_encode(value)}'.encode() for value in (row["title"], _full_title(row)))
    return text.replace(title, joined) if title in text and text.count(b'"title"') == 1 else None


def _full_title(row: Mapping) -> str:
    return f"{row['title']}: {row['section']}"


def _is_complete(row: Mapping) -> bool:
    """A passage that has all that a passage must have."""
    return "id" in row and type(row.get("text")) is type(row.get("title")) is type(row.get("section")) is str


class PassageStore:
    """Passages by number: passages.json (version, count), text.bin (their JSON end to end), text.offsets.npy."""

    def __init__(self, folder: Path, text: RaggedArray):
        self.folder = folder
        self._text = text
        self._tokens: dict[Path, PassageTokens] = {}

    @classmethod
    def build(cls, rows: Iterable[Mapping], folder: PathLike, progress: Progress | None = None) -> "PassageStore":
        """Writes `rows` as they are, titles already joined, so the reference's pickled passages fit too."""
        return cls.write(serialized(rows), folder, progress)

    @classmethod
    def write(cls, texts: Iterable[bytes], folder: PathLike, progress: Progress | None = None) -> "PassageStore":
        """Writes passages that are JSON already.

        A store that is already in `folder` is replaced, once the new one is complete; anything else there is an error.
        """
        folder = Path(os.path.abspath(folder))
        _check_replaceable(folder)
        with atomic_folder(folder, _ELSEWHERE, replace=True) as draft:
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
    def open(cls, folder: PathLike) -> "PassageStore":
        """Memory-maps a store; a truncated one is a `UserError`."""
        folder = Path(os.path.abspath(folder))
        about = _read_about(folder / "passages.json", _REBUILD)
        return cls(folder, RaggedArray.open(folder, "text", np.dtype(np.uint8), about["count"], _REBUILD))

    def __len__(self) -> int:
        return len(self._text)

    def take(self, numbers: Numbers) -> list[dict[str, Any]]:
        """The fields of each passage, in the order asked for."""
        return [json.loads(str(row.data, "utf-8")) for row in self._text.take(numbers)]

    def texts(self) -> Iterator[bytes]:
        """The JSON of every passage, in order: what `write` takes."""
        for start in range(0, len(self), _BATCH):
            for row in self._text.take(np.arange(start, min(start + _BATCH, len(self)))):
                yield row.tobytes()

    def tokens(self, tokenizer: Tokenizer, format: str, name: str, progress: Progress | None = None) -> "PassageTokens":
        """Ids of `format.format(**passage)` for every passage, uncut and without special tokens.

        Computed once for a tokenizer and a format, and kept beside the text.
        """
        about = {"version": _VERSION, "count": len(self), "tokenizer": tokenizer.fingerprint, "format": format}
        short = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        folder = self.folder / f"tokens-{name}-{short}"
        if folder not in self._tokens:
            if not folder.exists():
                self._write_tokens(folder, tokenizer, about, progress)
            self._tokens[folder] = PassageTokens.open(folder, about)
        return self._tokens[folder]

    def _write_tokens(self, folder: Path, tokenizer: Tokenizer, about: dict, progress: Progress | None) -> None:
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "int32"
        with atomic_folder(folder, _ELSEWHERE) as draft:
            with RaggedWriter(draft, "tokens", np.dtype(dtype)) as writer:
                for start in range(0, len(self), _BATCH):
                    passages = self.take(np.arange(start, min(start + _BATCH, len(self))))
                    rows = tokenizer.ids([render(about["format"], passage) for passage in passages])
                    writer.extend(flatten(rows, writer.dtype), map(len, rows))
                    if progress:
                        progress(len(rows))
            (draft / "tokens.json").write_text(json.dumps({**about, "dtype": dtype}, indent=1) + "\n")


class PassageTokens:
    """The token ids of every passage of a store, for one tokenizer and one format: tokens.json, .bin, .offsets.npy."""

    def __init__(self, rows: RaggedArray):
        self._rows = rows

    @classmethod
    def open(cls, folder: Path, expected: Mapping[str, Any]) -> "PassageTokens":
        """Opens token ids made as `expected` says: version, count, tokenizer and format."""
        remedy = "delete this folder and it will be made again"
        about = _read_about(folder / "tokens.json", remedy)
        if {field: about.get(field) for field in expected} != expected or about.get("dtype") not in ("uint16", "int32"):
            raise UserError(f"{folder}/tokens.json: not made from these passages and this tokenizer; {remedy}")
        return cls(RaggedArray.open(folder, "tokens", np.dtype(about["dtype"]), about["count"], remedy))

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, numbers: Numbers) -> list[np.ndarray]:
        """The ids of each passage (uint16 or int32, read-only), in the order asked for."""
        return self._rows.take(numbers)

    def lengths(self, numbers: Numbers) -> np.ndarray:
        """How many ids each passage has."""
        return self._rows.lengths(numbers)


def _checked(row: Mapping, where: str) -> dict[str, Any]:
    """The passage with title and section, which may be missing; id and text may not."""
    for field in ("id", "text"):
        if field not in row:
            raise UserError(f'{where}: a passage without "{field}"; add the field or remove the passage')
    passage = {**row, "title": row.get("title") or "", "section": row.get("section") or ""}
    for field in ("text", "title", "section"):
        if not isinstance(passage[field], str):
            raise UserError(f'{where}: "{field}" must be a string, not {passage[field]!r:.40}; put it in quotes')
    return passage


def serialized(rows: Iterable[Mapping]) -> Iterator[bytes]:
    """The JSON of passages, titles already joined."""
    for number, row in enumerate(rows):
        try:
            yield _encode(row if _is_complete(row) else _checked(row, f"passage {number}")).encode()
        except (TypeError, ValueError) as error:
            raise UserError(f"passage {number} ({row.get('id')}): not text ({error}); repair or remove it") from None


def _batches(rows: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Lists of `_BATCH` rows, the last one shorter."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


def _check_replaceable(folder: Path) -> None:
    """Only a store, an empty folder or nothing gives way to a new store."""
    if folder.is_dir():
        kept = {"passages.json", "text.bin", "text.offsets.npy"}
        others = [name for name in os.listdir(folder) if name not in kept and not name.startswith("tokens-")]
        if others:
            raise UserError(f"{folder}: holds other files ({others[0]}); choose a new folder for the passages")
    elif folder.exists():
        raise UserError(f"{folder}: is a file; choose a new folder for the passages")


def _read_about(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON beside the data, of a version that this code reads."""
    try:
        about = json.loads(file.read_bytes())
        version, count = about["version"], about["count"]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); check the path, or {remedy}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: damaged; {remedy}") from None
    if version != _VERSION or not isinstance(count, int):
        raise UserError(f"{file}: version {version}, this program reads version {_VERSION}; {remedy}")
    return about
