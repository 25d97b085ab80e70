"""The files of a tokenizer: tokenizer.json as it says itself, or T5's spiece.model as transformers 4.18.0 reads it.

The reference pins that version, and published recipes depend on its ids. Later versions of transformers split at white
space, and one version differs from another; so both files are read here, by the library `tokenizers` alone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from atlas_jax.errors import UserError

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")
_KEPT = ("spiece.model", "tokenizer.model", "vocab.txt")  # copied when a tokenizer is saved, for other programs
_UNIGRAM = 1  # sentencepiece's number of this model type
_SPECIAL_TOKENS = {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}
_SPECIAL_TOKEN_LISTS = {"additional_special_tokens", "extra_special_tokens"}
_MACHINE_FIELDS = ("is_local", "local_files_only", "name_or_path")  # transformers notes how it was called


class TokenizerFiles(NamedTuple):
    """A tokenizer as its folder describes it."""

    core: tokenizers.Tokenizer
    config: dict[str, Any]  # tokenizer_config.json with the tokens of special_tokens_map.json
    kept: dict[str, bytes]  # files that are copied when the tokenizer is saved


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Reads the tokenizer of a folder; UserError if it has none, ValueError or OSError if its files are damaged."""
    vocabulary = next((name for name in VOCABULARIES if (folder / name).is_file()), None)
    if vocabulary is None:
        raise UserError(f"{folder}: no tokenizer in this folder; copy one of {', '.join(VOCABULARIES)} into it")
    config = _read_config(folder)
    kept = {name: (folder / name).read_bytes() for name in _KEPT if (folder / name).is_file()}
    if vocabulary == "tokenizer.json":
        core = tokenizers.Tokenizer.from_str((folder / vocabulary).read_text(encoding="utf-8"))
        if "pad_token" not in config:
            pads = [token for token in ("<pad>", "[PAD]") if core.token_to_id(token) is not None]
            config |= {"pad_token": pads[0]} if pads else {}
    elif vocabulary == "spiece.model":
        extra_ids = int(config.get("extra_ids", 100))
        core = t5_tokenizer(kept[vocabulary], extra_ids)
        sentinels = [f"<extra_id_{i}>" for i in range(extra_ids)]
        defaults = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = defaults | {"additional_special_tokens": sentinels} | config
    else:
        core, tokens = _from_transformers(folder)
        config = tokens | config
    _add_special_tokens(core, config)
    _add_tokens(core, _read_object(folder / "added_tokens.json"), folder)
    return TokenizerFiles(core, config, kept)


def write_tokenizer_files(folder: Path, files: TokenizerFiles) -> None:
    """Writes a folder that `read_tokenizer_files` and transformers can read."""
    folder.mkdir(parents=True, exist_ok=True)
    files.core.save(os.fspath(folder / "tokenizer.json"))
    (folder / CONFIG).write_text(json.dumps(files.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, content in files.kept.items():
        (folder / name).write_bytes(content)


def t5_tokenizer(spiece_model: bytes, extra_ids: int) -> tokenizers.Tokenizer:
    """T5's tokenizer, made from a sentencepiece model and that many sentinels `<extra_id_N>`.

    Reference: as transformers 4.18.0 makes it. No piece spans a space, but spaces are kept: one before a sentinel or at
    the end of the text is the piece `▁`.
    """
    from sentencepiece import sentencepiece_model_pb2  # imports protobuf

    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(spiece_model)  # type: ignore[attr-defined]
    if proto.trainer_spec.model_type != _UNIGRAM:
        raise ValueError("its sentencepiece model is not a unigram model, which T5's are")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    core = tokenizers.Tokenizer(models.Unigram(pieces, proto.trainer_spec.unk_id))
    charsmap = proto.normalizer_spec.precompiled_charsmap
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    eos = ("</s>", core.token_to_id("</s>"))
    core.post_processor = processors.TemplateProcessing(["$A", "</s>"], ["$A", "</s>", "$B", "</s>"], [eos])
    return core


def _read_config(folder: Path) -> dict[str, Any]:
    """Reads tokenizer_config.json and special_tokens_map.json, with special tokens as plain texts."""
    config = _read_object(folder / CONFIG) | _read_object(folder / SPECIAL_TOKENS)
    config = {field: value for field, value in config.items() if field not in _MACHINE_FIELDS and value is not None}
    for name in _SPECIAL_TOKENS & config.keys():
        config[name] = _token_text(config[name])
    for name in _SPECIAL_TOKEN_LISTS & config.keys():
        if isinstance(config[name], list):
            config[name] = [_token_text(token) for token in config[name]]
    return config


def _token_text(token: str | Mapping[str, Any]) -> str:
    """The text of a special token in a configuration: a text, or an object with the field `content`."""
    return token if isinstance(token, str) else str(token["content"])


def _add_special_tokens(core: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Registers the special tokens of the configuration that the tokenizer does not treat as such yet."""
    tokens = [config[name] for name in sorted(_SPECIAL_TOKENS & config.keys())]
    for name in sorted(_SPECIAL_TOKEN_LISTS & config.keys()):
        tokens += config[name] if isinstance(config[name], list) else []
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    core.add_special_tokens([token for token in tokens if token not in known])


def _add_tokens(core: tokenizers.Tokenizer, ids: Mapping[str, int], folder: Path) -> None:
    """Adds the tokens of added_tokens.json, which continue the vocabulary or are in it."""
    for token, number in sorted(ids.items(), key=lambda item: item[1]):
        if core.token_to_id(token) is None:
            core.add_tokens([token])
        if core.token_to_id(token) != number:
            raise ValueError(f"added_tokens.json has {token} as {number}, the vocabulary as {core.token_to_id(token)}")


def _from_transformers(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Returns the tokenizer that transformers makes from other vocabularies, and its single special tokens."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # silences "PyTorch was not found"
    import transformers  # takes seconds

    hf: Any = transformers.AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
    if getattr(hf, "backend_tokenizer", None) is None:
        raise UserError(f"{folder}: a tokenizer without tokenizer.json; save it as a fast tokenizer first")
    tokens = {name: str(token) for name in _SPECIAL_TOKENS if (token := getattr(hf, name, None)) is not None}
    return hf.backend_tokenizer, tokens


def _read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object; {} if there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content
