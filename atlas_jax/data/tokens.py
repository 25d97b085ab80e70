"""Text to token ids and back, and ids to padded arrays of a few fixed lengths."""

import functools
import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from atlas_jax.data.tokenizer_files import (
    VOCABULARIES,
    TokenizerFiles,
    read_tokenizer_files,
    write_tokenizer_files,
)
from atlas_jax.errors import UserError
from atlas_jax.storage.hub import address, hub_file, is_hub_name

_CHUNK = 1024  # texts per call: bounds the memory of the encodings, which hold more than ids
CLEAN_UP = "clean_up_tokenization_spaces"  # in tokenizer_config.json
_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


_SPLITTERS = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer", "Metaspace"}  # no piece spans a space
_LOCAL_NORMALIZERS = {  # their output for a character does not depend on text beyond a space
    *("BertNormalizer", "Precompiled", "Nmt", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"),
}
_PROBES = (  # texts around one space; those that end in an invisible character only after it
    "title:|a|answer: <extra_id_0>|<extra_id_0>|</s>|x</s>|[SEP]|0|12,345.67|C++|?!|don't|the of and|New York"
    "|e\u0301|\u0301|\u0600|\ufffd|\u2581|a\u2581|\u3164|\u00a8|\ufb01|\u1e9e\u03a3|\u5b57\u6f22|\uc778\ub3c4|\u0e2a\u0e27\u0e31"
    "|\u05e9\u05dc\u05d5\u05dd|\u0645\u0631\u062d\u0628\u0627|\u0928\u093f|\U0001f44d\U0001f3fd|\U0001f468\u200d\U0001f469"
    "|| two|\tb|\n|\u00a0b|\u200bb|b  c|b |" + "x" * 300
).split("|")


class Tokenizer:
    """A tokenizer of Hugging Face's library `tokenizers`: `ids` has no special tokens, `add_special_tokens` has."""

    def __init__(self, files: TokenizerFiles):
        self._files, self._clean_up = files, bool(files.config.get(CLEAN_UP))
        self._core = tokenizers.Tokenizer.from_str(files.core.to_str())
        self._core.no_truncation()
        self._core.no_padding()
        pad_id = self._core.token_to_id(files.config.get("pad_token", ""))
        if pad_id is None:
            raise UserError("no pad token; set pad_token in its tokenizer_config.json")
        self.pad_id = pad_id
        self.vocab_size = 1 + max(self._core.get_vocab().values())  # no id is larger, even when some are unused
        self.fingerprint = hashlib.sha256(self._core.to_str().encode()).hexdigest()
        self.prefix, self.suffix = self._special_tokens()

    @classmethod
    def load(cls, name: str | os.PathLike[str], *, clean_up: bool = True) -> "Tokenizer":
        """Loads from a local folder, or by name from the Hugging Face hub or its cache; UserError if it cannot.

        `clean_up`: whether `decode` joins punctuation to words if tokenizer_config.json does not say so.
        """
        folder = Path(name) if Path(name).is_dir() else _hub_folder(os.fspath(name))
        try:
            files = read_tokenizer_files(folder)
            return cls(files._replace(config={CLEAN_UP: True} | files.config) if clean_up else files)
        except UserError as error:
            raise UserError(f"{name}: {str(error).removeprefix(f'{folder}: ')}") from None
        except KeyboardInterrupt:
            raise
        except Exception as error:  # tokenizers and transformers raise many types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name}: the tokenizer cannot be loaded ({reason:.200}); repair its files") from None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, uncut and without special tokens. Runs on all cores and releases the GIL."""
        chunks = (texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK))
        encoded = (self._core.encode_batch_fast(chunk, add_special_tokens=False) for chunk in chunks)
        return [encoding.ids for chunk in encoded for encoding in chunk]

    def add_special_tokens(self, ids: Sequence[int] | np.ndarray, max_length: int | None = None) -> list[int]:
        """Adds the special tokens; ids are cut so that all fit into `max_length`, special tokens never."""
        room = None if max_length is None else max(0, max_length - len(self.prefix) - len(self.suffix))
        cut = ids[:room]
        return [*self.prefix, *(cut.tolist() if isinstance(cut, np.ndarray) else cut), *self.suffix]

    def target_ids(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Returns the ids of the reader's targets: text + `</s>`, no other special token, cut (the `</s>` too)."""
        return [ids[:max_length] for ids in self.ids([text.removesuffix("</s>") + "</s>" for text in texts])]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`, without special tokens unless told otherwise.

        Reference: transformers 4.18.0 joins punctuation and contractions to the word before, in the text as in the ids.
        """
        text = self._core.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=skip_special_tokens)
        return clean_up_spaces(text) if self._clean_up else text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` can read."""
        write_tokenizer_files(Path(folder), self._files._replace(core=self._core))

    @property
    def configures_clean_up(self) -> bool:
        """True if tokenizer_config.json sets whether `decode` cleans up; older checkpoints do not."""
        return CLEAN_UP in self._files.config

    @functools.cached_property
    def splits_at_spaces(self) -> bool:
        """True if ids(a + " " + b) == ids(a) + ids(" " + b) for all `a` with `splits_after(a)`, and all `b`.

        True only if this follows from the tokenizer's configuration and holds for `_PROBES`; False if in doubt.
        """
        return _splits_by_construction(json.loads(self._core.to_str())) and self._splits_on_probes()

    def splits_after(self, text: str) -> bool:
        """True if `text` ends in a visible character that does not become a space, as U+FFFD does in T5."""
        normalizer = self._core.normalizer
        return ends_in_visible_character(text) and not (normalizer and normalizer.normalize_str(text).endswith(" "))

    def _special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the special tokens that an encoding adds before and after the text."""
        inner, outer = (self._core.encode("a", add_special_tokens=specials).ids for specials in (False, True))
        start = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
        return tuple(outer[:start]), tuple(outer[start + len(inner) :])

    def _splits_on_probes(self) -> bool:
        """Whether `splits_at_spaces` holds for pairs of `_PROBES` and added tokens."""
        added = [token.content for token in self._core.get_added_tokens_decoder().values()]
        firsts = [*_PROBES, *(f"x{token}" for token in added), *(f"x {token}" for token in added)]
        firsts = [a for a in firsts if self.splits_after(a)]
        seconds = [*_PROBES, *(f"{token}x" for token in added)]
        pairs = [*itertools.product(firsts, _PROBES), *itertools.product(_PROBES[:3], seconds)]
        left = self.ids([a for a, _ in pairs])
        right = self.ids([f" {b}" for _, b in pairs])
        whole = self.ids([f"{a} {b}" for a, b in pairs])
        return all(a + b == ab for a, b, ab in zip(left, right, whole, strict=True))


def ends_in_visible_character(text: str) -> bool:
    """Whether `text` ends in a letter, mark, digit, sign or symbol: no white space, control or format character."""
    return bool(text) and unicodedata.category(text[-1])[0] not in "ZC"


def clean_up_spaces(text: str) -> str:
    """Removes the spaces before punctuation and English contractions; the order of the replacements matters."""
    for spaced in _SPACED:
        text = text.replace(spaced, spaced.strip() if spaced != " ' " else "'")
    return text


def _hub_folder(name: str) -> Path:
    """Returns a folder with the tokenizer files of a repository of the hub, from its cache if they are there."""
    remedy = "name a folder that holds tokenizer.json"
    if not is_hub_name(name):
        raise UserError(f"{name}: no such folder; {remedy}")
    others = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"]
    vocabulary = hub_file(name, VOCABULARIES, remedy, companions=others)
    if vocabulary is None:
        raise UserError(f"{name}: no tokenizer on the hub {address()} ({', '.join(VOCABULARIES)}); {remedy}")
    return vocabulary.parent


def _splits_by_construction(core: dict[str, Any]) -> bool:
    """Whether, as configured, no added token, normalizer or piece spans a space, and there is no BPE dropout."""
    added = [token["content"] for token in core["added_tokens"]]
    steps = _steps(core["pre_tokenizer"], "pretokenizers")
    return (
        not any(character.isspace() for character in "".join(added))
        and all(map(_is_local, _steps(core["normalizer"], "normalizers")))
        and bool(steps and steps[0]["type"] in _SPLITTERS and steps[0].get("split", True))
        and not core["model"].get("dropout")
    )


def _is_local(normalizer: dict[str, Any]) -> bool:
    """Whether the normalizer's output on either side of a space does not depend on the other side."""
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _LOCAL_NORMALIZERS
    return normalizer["pattern"] == {"Regex": " {2,}"}  # T5's: a run of spaces after a visible character is all in `b`


def _steps(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or pre-tokenizer, nested sequences flattened."""
    if step is None:
        return []
    return [leaf for child in step[children] for leaf in _steps(child, children)] if children in step else [step]


def pad(
    rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> tuple[Int32[np.ndarray, "r l"], Bool[np.ndarray, "r l"]]:
    """Returns ids padded on the right, and a mask that is true where they are not padding."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if lengths.max(initial=0) > length:
        raise ValueError(
            f"a row of {lengths.max()} ids does not fit into {length}: cut it with `add_special_tokens` first"
        )
    mask = np.arange(length) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int32)
    ids[mask] = flatten(rows, np.dtype(np.int32))
    return ids, mask


def flatten(rows: Iterable[Sequence[int] | np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Concatenates rows to one array."""
    return np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)])


def bucket(longest: int, maximum: int) -> int:
    """Returns the length to pad to: the first of 32, 64, .. 256, 320, .. 512, 640, .. from `longest`, or `maximum`.

    There are four lengths for each doubling, at least 32 apart. So at most 12 programs are compiled up to 512 tokens,
    four for each doubling beyond, and beyond 128 tokens less than a fifth of the longest row is padding.
    """
    if longest > maximum:
        raise ValueError(f"{longest} tokens, but at most {maximum} are allowed: cut by `add_special_tokens`")
    step = max(32, 2 ** (max(longest, 1) - 1).bit_length() // 8)
    return min(maximum, max(1, -(-longest // step)) * step)
