"""Models as others publish them: a known T5 name, or a local Hugging Face folder (config.json, model.safetensors)."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from atlas_jax.errors import UserError
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS, T5Config

logger = logging.getLogger(__name__)

KNOWN_RETRIEVERS = {"facebook/contriever": ContrieverConfig()}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; UserError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); is this the right folder?") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); restore the file") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no object; restore the file")
    return found


def _choose(config: Mapping[str, Any], key: str, choices: tuple[str, ...], default: str, path: Path) -> str:
    value = config.get(key, default)
    if value not in choices:
        raise UserError(f"{path}: {key} is {value!r}; this program knows {', '.join(choices)}")
    return str(value)


def _sizes(config: Mapping[str, Any], path: Path, *keys: str) -> list[int]:
    for key in keys:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config.get(key)!r}; a whole number above 0 belongs there")
    return [config[key] for key in keys]


def _epsilon(config: Mapping[str, Any], path: Path, key: str) -> float:
    if not isinstance(config[key], float) or not 0 < config[key] < 1:
        raise UserError(f"{path}: {key} is {config[key]!r}; a small number above 0 belongs there")
    return float(config[key])


def _with_defaults(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """What Hugging Face's configurations take where a field is missing or null."""
    return defaults | {key: value for key, value in config.items() if value is not None}


def reader_config(name_or_folder: str) -> T5Config:
    """The reader's shape: a published name's, or that of a folder's config.json (model_type t5)."""
    if name_or_folder in T5_CONFIGS and not Path(name_or_folder).is_dir():
        return T5_CONFIGS[name_or_folder]
    path = Path(name_or_folder) / "config.json"
    config = read_json(path)
    _choose(config, "model_type", ("t5",), "", path)
    config = _with_defaults(
        config,
        num_decoder_layers=config.get("num_layers"),
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=True,
    )
    d_model, heads, head_dim, d_ff = _sizes(config, path, "d_model", "num_heads", "d_kv", "d_ff")
    layers, decoder_layers, vocabulary = _sizes(config, path, "num_layers", "num_decoder_layers", "vocab_size")
    buckets, distance = _sizes(config, path, "relative_attention_num_buckets", "relative_attention_max_distance")
    if type(config["tie_word_embeddings"]) is not bool:
        raise UserError(f"{path}: tie_word_embeddings is {config['tie_word_embeddings']!r}; it is true or false")
    activation = _choose(config, "feed_forward_proj", ("relu", "gated-gelu"), "relu", path)
    return T5Config(
        d_model,
        heads,
        head_dim,
        d_ff,
        layers,
        decoder_layers,
        vocab_size=vocabulary,
        gated=activation == "gated-gelu",
        tied=config["tie_word_embeddings"],
        relative_buckets=buckets,
        relative_max_distance=distance,
        layer_norm_epsilon=_epsilon(config, path, "layer_norm_epsilon"),
    )


def retriever_config(name_or_folder: str) -> ContrieverConfig:
    """The retriever's shape, out of a folder's config.json (model_type bert).

    The layer norm is what `"layer_norm": "atlas" | "standard"` there says. Without it, a sentence-transformers folder
    has the standard one, pools and normalises as its modules say; any other is read as the reference reads every BERT.
    """
    folder = Path(name_or_folder)
    if name_or_folder in KNOWN_RETRIEVERS and not folder.is_dir():
        return KNOWN_RETRIEVERS[name_or_folder]
    path = folder / "config.json"
    config = _with_defaults(read_json(path), max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12)
    _choose(config, "model_type", ("bert",), "", path)
    _choose(config, "hidden_act", ("gelu",), "gelu", path)
    _choose(config, "position_embedding_type", ("absolute",), "absolute", path)
    d_model, heads, d_ff = _sizes(config, path, "hidden_size", "num_attention_heads", "intermediate_size")
    layers, vocabulary = _sizes(config, path, "num_hidden_layers", "vocab_size")
    positions, types = _sizes(config, path, "max_position_embeddings", "type_vocab_size")
    if d_model % heads:
        raise UserError(f"{path}: {heads} heads do not divide a width of {d_model}")
    modules = _sentence_transformer(folder)
    return ContrieverConfig(
        d_model,
        heads,
        d_ff,
        layers,
        vocabulary,
        max_positions=positions,
        type_vocab_size=types,
        layer_norm_epsilon=_epsilon(config, path, "layer_norm_eps"),
        norm=_choose(config, "layer_norm", ("atlas", "standard"), "standard" if modules else "atlas", path),  # type: ignore[arg-type]
        pooling=_choose(config, "pooling", ("average", "sqrt", "cls"), modules.get("pooling", "average"), path),  # type: ignore[arg-type]
        normalize=modules.get("normalize", False),
    )


def _sentence_transformer(folder: Path) -> dict[str, Any]:
    """What a sentence-transformers folder says beside the model: pooling, and whether vectors are normalised."""
    path = folder / "modules.json"
    if not path.is_file():
        return {}
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = {module["type"].split(".")[-1]: str(module["path"]) for module in modules}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: no list of modules ({error!r}); restore the file") from None
    pooling = read_json(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    return {
        "pooling": "cls" if pooling.get("pooling_mode_cls_token") else "average",
        "normalize": "Normalize" in kinds,
    }


def folder_weights(name_or_folder: str) -> dict[str, np.ndarray] | None:
    """The arrays of a folder's model.safetensors; None, said aloud, where there are none."""
    path = Path(name_or_folder) / "model.safetensors"
    if not path.is_file():
        logger.warning("%s: no model.safetensors there, so its weights are random", name_or_folder)
        return None
    try:
        with safe_open(path, framework="np") as file:
            return {name.removeprefix("bert."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
