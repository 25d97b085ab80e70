"""Text to token ids and back, and ids to arrays of a few fixed shapes."""

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

from atlas_jax.errors import UserError

_CHUNK = 1024  # texts a call: bounds the memory of what the tokenizer keeps for each text
_VOCABULARY_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")


_SPLITTERS = {"WhitespaceSplit", "Whitespace", "BertPreTokenizer", "Metaspace"}  # pieces never reach over a space
_LOCAL_NORMALIZERS = {  # what they make of a character does not depend on what stands beyond a space
    *("BertNormalizer", "Precompiled", "Nmt", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip"),
}
_PROBES = (  # around one space; those that do not end visibly serve as what follows it
    "title:|a|answer: <extra_id_0>|<extra_id_0>|</s>|x</s>|[SEP]|0|12,345.67|C++|?!|don't|the of and|New York"
    "|e\u0301|\u0301|\u0600|\ufffd|\u2581|a\u2581|\u3164|\u00a8|\ufb01|\u1e9e\u03a3|\u5b57\u6f22|\uc778\ub3c4|\u0e2a\u0e27\u0e31"
    "|\u05e9\u05dc\u05d5\u05dd|\u0645\u0631\u062d\u0628\u0627|\u0928\u093f|\U0001f44d\U0001f3fd|\U0001f468\u200d\U0001f469"
    "|| two|\tb|\n|\u00a0b|\u200bb|b  c|b |" + "x" * 300
).split("|")


class Tokenizer:
    """A Hugging Face tokenizer, by its fast core: ids without special tokens first, `finish` adds and cuts.

    The core is a private copy without truncation or padding, so nothing that others do with `hf` changes it.
    """

    def __init__(self, hf: Any):
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"{hf.name_or_path}: a tokenizer without tokenizer.json; save it as a fast tokenizer first")
        if hf.pad_token_id is None:
            raise UserError(f"{hf.name_or_path}: no pad token; set pad_token in its tokenizer_config.json")
        self._hf = hf
        self._core = tokenizers.Tokenizer.from_str(backend.to_str())
        self._core.no_truncation()
        self._core.no_padding()
        self.pad_id = int(hf.pad_token_id)
        self.vocab_size = 1 + max(self._core.get_vocab().values())  # no id is larger, even when some are unused
        self.fingerprint = hashlib.sha256(self._core.to_str().encode()).hexdigest()
        self.prefix, self.suffix = self._specials()

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> "Tokenizer":
        """From a local folder, or by name from the Hugging Face hub or its cache."""
        local = Path(name).is_dir()
        if local and not any((Path(name) / file).is_file() for file in _VOCABULARY_FILES):
            files = ", ".join(_VOCABULARY_FILES)  # transformers would make up a vocabulary of special tokens
            raise UserError(f"{name}: no tokenizer in this folder; copy one of {files} into it")
        try:
            return cls(_from_pretrained(os.fspath(name), local))
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:  # transformers, hub and tokenizers raise every kind
            reason = " ".join(str(error).split()) or type(error).__name__
            if local:
                raise UserError(f"{name}: the tokenizer cannot be loaded ({reason:.200}); repair its files") from None
            nowhere = "neither a folder nor a tokenizer that the Hugging Face hub or its cache could give"
            raise UserError(f"{name}: {nowhere} ({reason:.200}); pass a folder that holds tokenizer.json") from None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, whole and without special tokens. Runs on all cores, outside the interpreter's lock."""
        chunks = (texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK))
        encoded = (self._core.encode_batch_fast(chunk, add_special_tokens=False) for chunk in chunks)
        return [encoding.ids for chunk in encoded for encoding in chunk]

    def finish(self, ids: Sequence[int] | np.ndarray, max_length: int | None = None) -> list[int]:
        """Ids as the model wants them: cut to `max_length` with the special tokens counted, which are never cut."""
        room = None if max_length is None else max(0, max_length - len(self.prefix) - len(self.suffix))
        kept = ids[:room]
        return [*self.prefix, *(kept.tolist() if isinstance(kept, np.ndarray) else kept), *self.suffix]

    def target_ids(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """What the reader learns to write: text + `</s>`, no other special token, cut (the `</s>` too)."""
        return [ids[:max_length] for ids in self.ids([text.removesuffix("</s>") + "</s>" for text in texts])]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens left out."""
        return self._hf.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that `load` reads."""
        self._hf.save_pretrained(folder)

    @functools.cached_property
    def splits_at_spaces(self) -> bool:
        """Whether ids(a + " " + b) == ids(a) + ids(" " + b) for every `a` that `ends_visibly` and every `b`.

        True only if it follows from how the tokenizer is built and holds on awkward strings; unsure is False.
        """
        return _splits_by_construction(json.loads(self._core.to_str())) and self._splits_on_probes()

    def _specials(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What encoding with special tokens adds in front and behind."""
        inner, outer = (self._core.encode("a", add_special_tokens=specials).ids for specials in (False, True))
        at = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
        return tuple(outer[:at]), tuple(outer[at + len(inner) :])

    def _splits_on_probes(self) -> bool:
        added = [token.content for token in self._core.get_added_tokens_decoder().values()]
        firsts = [*_PROBES, *(f"x{token}" for token in added), *(f"x {token}" for token in added)]
        firsts = [a for a in firsts if ends_visibly(a)]
        seconds = [*_PROBES, *(f"{token}x" for token in added)]
        pairs = [*itertools.product(firsts, _PROBES), *itertools.product(_PROBES[:3], seconds)]
        left = self.ids([a for a, _ in pairs])
        right = self.ids([f" {b}" for _, b in pairs])
        whole = self.ids([f"{a} {b}" for a, b in pairs])
        return all(a + b == ab for a, b, ab in zip(left, right, whole, strict=True))


def ends_visibly(text: str) -> bool:
    """The last character is a letter, mark, digit, sign or symbol: no white space, control or format character."""
    return bool(text) and unicodedata.category(text[-1])[0] not in "ZC"


def _from_pretrained(name: str, local: bool) -> Any:
    """The Hugging Face tokenizer: of a folder, else of the hub's cache, else of the hub."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else: "PyTorch was not found"
    import huggingface_hub  # these two take seconds, and only loading needs them
    import transformers

    cached = local or any(isinstance(huggingface_hub.try_to_load_from_cache(name, f), str) for f in _VOCABULARY_FILES)
    if not cached:
        huggingface_hub.model_info(name, timeout=20)  # fails at once, where transformers retries for most of a minute
    return transformers.AutoTokenizer.from_pretrained(name, local_files_only=cached)


def _splits_by_construction(core: dict[str, Any]) -> bool:
    """From the serialized tokenizer: no added token, normalizer, piece or chance reaches over a space."""
    words = [token["content"] for token in core["added_tokens"]]
    steps = _flat(core["pre_tokenizer"], "pretokenizers")
    return (
        not any(character.isspace() for character in "".join(words))
        and all(map(_is_local, _flat(core["normalizer"], "normalizers")))
        and bool(steps and steps[0]["type"] in _SPLITTERS and steps[0].get("split", True))
        and not core["model"].get("dropout")
    )


def _is_local(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _LOCAL_NORMALIZERS
    return normalizer["pattern"] == {"Regex": " {2,}"}  # T5's: what ends visibly leaves the whole run to what follows


def _flat(step: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    return [leaf for child in step[children] for leaf in _flat(child, children)] if children in step else [step]


def pad(
    rows: Sequence[Sequence[int] | np.ndarray], length: int, pad_id: int
) -> tuple[Int32[np.ndarray, "r l"], Bool[np.ndarray, "r l"]]:
    """Ids padded on the right, and the mask that is true where a row has one."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    if lengths.max(initial=0) > length:
        raise ValueError(f"a row of {lengths.max()} ids does not fit into {length}: cut it with `finish` first")
    mask = np.arange(length) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int32)
    ids[mask] = flatten(rows, np.dtype(np.int32))
    return ids, mask


def flatten(rows: Iterable[Sequence[int] | np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Rows end to end."""
    return np.concatenate([np.empty(0, dtype), *(np.asarray(row, dtype) for row in rows)])


def bucket(longest: int, maximum: int) -> int:
    """The length to pad to: the first of 32, 64, .. 256, 320, .. 512, 640, .. that holds `longest`, at most `maximum`.

    Steps are a quarter of the octave, and 32 at least: at most 12 programs up to 512 tokens and four for each
    doubling beyond, while beyond 128 tokens less than a fifth of a row is padding.
    """
    if longest > maximum:
        raise ValueError(f"{longest} tokens, but at most {maximum} are allowed: cut with `finish` first")
    step = max(32, 2 ** (max(longest, 1) - 1).bit_length() // 8)
    return min(maximum, max(1, -(-longest // step)) * step)
