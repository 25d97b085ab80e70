"""Pretrained models of a Hugging Face folder (config.json, model.safetensors), or of the hub by their name."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.checkpoints.formats.safetensors_file import open_safetensors
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.weights import hub_name
from atlas_jax.errors import UserError
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS, T5Config
from atlas_jax.storage.files import read_json
from atlas_jax.storage.hub import address, cached_file, has_file, hub_file, is_hub_name

logger = logging.getLogger(__name__)

WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
KNOWN_RETRIEVERS = {"facebook/contriever": ContrieverConfig()}
REMEDY = "name a local folder that holds {} (atlas train and evaluate begin without weights with --random_weights)"


def _read_choice(config: Mapping[str, Any], key: str, choices: tuple[Any, ...], default: Any, path: Path) -> Any:
    value = config.get(key, default)
    if type(value) is not type(choices[0]) or value not in choices:
        raise UserError(f"{path}: {key} is {value!r}; this program knows {', '.join(map(str, choices))}")
    return value


def _read_sizes(config: Mapping[str, Any], path: Path, *keys: str) -> list[int]:
    for key in keys:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config.get(key)!r}; a whole number above 0 belongs there")
    return [config[key] for key in keys]


def _read_epsilon(config: Mapping[str, Any], path: Path, key: str) -> float:
    if not isinstance(config[key], float) or not 0 < config[key] < 1:
        raise UserError(f"{path}: {key} is {config[key]!r}; a small number above 0 belongs there")
    return float(config[key])


def _with_defaults(config: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Fills missing and null fields with Hugging Face's defaults."""
    return defaults | {key: value for key, value in config.items() if value is not None}


def _config_file(name_or_folder: str, *, known: bool, fetch: bool) -> Path | None:
    """Returns config.json of a folder or of the hub; None for a known name if it is not cached or cannot be fetched."""
    if not is_hub_name(name_or_folder):
        return Path(name_or_folder) / "config.json"
    if known and not fetch:
        return cached_file(name_or_folder, ["config.json"])
    try:
        return hub_file(name_or_folder, ["config.json"], "name a local folder that holds config.json")
    except UserError:
        if not known:
            raise
        return None


def reader_config(name_or_folder: str, *, fetch: bool = False) -> T5Config:
    """Returns the reader's config from config.json (model_type t5), or a published T5's if its is not at hand.

    `fetch`: whether the hub is asked for the config.json of a published name, as a run does, which needs more of it.
    """
    known = name_or_folder in T5_CONFIGS
    path = _config_file(name_or_folder, known=known, fetch=fetch) if known else Path(name_or_folder) / "config.json"
    if path is None:
        return T5_CONFIGS[name_or_folder]
    config = read_json(path)
    _read_choice(config, "model_type", ("t5",), "", path)
    config = _with_defaults(
        config,
        num_decoder_layers=config.get("num_layers"),
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=True,
    )
    d_model, heads, head_dim, d_ff = _read_sizes(config, path, "d_model", "num_heads", "d_kv", "d_ff")
    layers, decoder_layers, vocabulary = _read_sizes(config, path, "num_layers", "num_decoder_layers", "vocab_size")
    buckets, distance = _read_sizes(config, path, "relative_attention_num_buckets", "relative_attention_max_distance")
    activation = _read_choice(config, "feed_forward_proj", ("relu", "gated-gelu"), "relu", path)
    return T5Config(
        d_model,
        heads,
        head_dim,
        d_ff,
        layers,
        decoder_layers,
        vocab_size=vocabulary,
        gated=activation == "gated-gelu",
        tied=_read_choice(config, "tie_word_embeddings", (True, False), True, path),
        relative_buckets=buckets,
        relative_max_distance=distance,
        layer_norm_epsilon=_read_epsilon(config, path, "layer_norm_epsilon"),
    )


def retriever_config(name_or_folder: str, *, fetch: bool = False) -> ContrieverConfig:
    """Returns the retriever's config from config.json (model_type bert), of a folder or of the hub.

    `fetch`: whether the hub is asked for it even if the name is known.

    The field `"layer_norm": "atlas" | "standard"` of config.json names the layer norm. Without that field, a
    sentence-transformers folder has the standard one, with the pooling and normalization of its modules; any other
    folder is read as the reference reads every BERT.
    """
    known = name_or_folder in KNOWN_RETRIEVERS
    path = _config_file(name_or_folder, known=known, fetch=fetch)
    if path is None:
        if not known:
            raise UserError(f"{name_or_folder}: no config.json on the hub {address()}; check the name")
        return KNOWN_RETRIEVERS[name_or_folder]
    config = _with_defaults(read_json(path), max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12)
    _read_choice(config, "model_type", ("bert",), "", path)
    _read_choice(config, "hidden_act", ("gelu",), "gelu", path)
    _read_choice(config, "position_embedding_type", ("absolute",), "absolute", path)
    d_model, heads, d_ff = _read_sizes(config, path, "hidden_size", "num_attention_heads", "intermediate_size")
    layers, vocabulary = _read_sizes(config, path, "num_hidden_layers", "vocab_size")
    positions, types = _read_sizes(config, path, "max_position_embeddings", "type_vocab_size")
    if d_model % heads:
        raise UserError(f"{path}: {heads} heads do not divide a width of {d_model}")
    modules = {} if known else _read_sentence_transformers(name_or_folder)
    return ContrieverConfig(
        d_model,
        heads,
        d_ff,
        layers,
        vocabulary,
        max_positions=positions,
        type_vocab_size=types,
        layer_norm_epsilon=_read_epsilon(config, path, "layer_norm_eps"),
        norm=_read_choice(config, "layer_norm", ("atlas", "standard"), "standard" if modules else "atlas", path),
        pooling=_read_choice(config, "pooling", ("average", "sqrt", "cls"), modules.get("pooling", "average"), path),
        normalize=_read_choice(config, "normalize", (True, False), modules.get("normalize", False), path),
    )


def _read_sentence_transformers(name_or_folder: str) -> dict[str, Any]:
    """Reads a sentence-transformers model's pooling and whether it normalizes vectors; {} for other models."""
    path = _optional_file(name_or_folder, "modules.json")
    if path is None:
        return {}
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        paths = {module["type"].split(".")[-1]: str(module["path"]) for module in modules}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: no list of modules ({error!r}); restore the file") from None
    pooling: dict[str, Any] = {}
    if "Pooling" in paths:
        file = f"{paths['Pooling']}/config.json"
        pooling = read_json(_optional_file(name_or_folder, file) or path.parent / file)
    return {
        "pooling": "cls" if pooling.get("pooling_mode_cls_token") else "average",
        "normalize": "Normalize" in paths,
    }


def _optional_file(name_or_folder: str, file: str) -> Path | None:
    """Returns a file of a folder or of the hub; None if there is none, or, with a warning, if the hub cannot say."""
    if not is_hub_name(name_or_folder):
        path = Path(name_or_folder) / file
        return path if path.is_file() else None
    try:
        return hub_file(name_or_folder, [file], "name a local folder")
    except UserError as error:
        logger.warning("%s; until then it is read as a model without %s", error, file)
        return None


def check_weights(name_or_folder: str) -> None:
    """Raises UserError unless a folder, the hub's cache or the hub has weights; reads and downloads none."""
    if is_hub_name(name_or_folder):
        if not has_file(name_or_folder, WEIGHT_FILES, REMEDY.format("weights")):
            raise _no_weights(name_or_folder, f"no weights on the hub {address()}")
    elif weights_file(name_or_folder) is None:
        shards = [path.name for pattern in SHARDS for path in sorted(Path(name_or_folder).glob(pattern))]
        if shards:
            index = f"{shards[0].split('-')[0]}{Path(shards[0]).suffix}.index.json"
            raise UserError(
                f"{name_or_folder}: holds {shards[0]} but no {index}, which names its shards; add that file"
            )
        raise _no_weights(name_or_folder, "no weights" if Path(name_or_folder).is_dir() else "no such folder")


def _no_weights(name_or_folder: str, problem: str) -> UserError:
    return UserError(f"{name_or_folder}: {problem} ({', '.join(WEIGHT_FILES)}); {REMEDY.format('one of these')}")


def folder_weights(name_or_folder: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder, or of the hub by their name, as views of files; UserError if it has none."""
    file = weights_file(name_or_folder)
    if file is None:
        check_weights(name_or_folder)
        file = hub_file(name_or_folder, WEIGHT_FILES, REMEDY.format("weights"), companions=["config.json"])
    assert file is not None
    arrays: dict[str, np.ndarray] = {}
    for shard in _shard_files(file, name_or_folder):
        for name, array in _open_arrays(shard).items():
            short_name = hub_name(name)
            if short_name in arrays:
                raise UserError(f"{shard}: has {short_name} once more; fetch the folder again")
            arrays[short_name] = array
    return arrays


def weights_file(folder: str) -> Path | None:
    """Returns a folder's weights file, or the index of its shards; safetensors come first, as with Hugging Face."""
    paths = [Path(folder) / name for name in WEIGHT_FILES]
    return next((path for path in paths if path.is_file()), None)


def _shard_files(file: Path, name_or_folder: str) -> list[Path]:
    """Returns the files that an index of shards names, fetched if it is the hub's; for any other file, that file."""
    if file.suffix != ".json":
        return [file]
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{file}: has no weight_map; restore the file")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{file}: names {name}, which is no file beside it; fetch the folder again")
        if is_hub_name(name_or_folder):
            hub_file(name_or_folder, [name], REMEDY.format("weights"), revision=file.parent.name)
        if not (file.parent / name).is_file():
            raise UserError(f"{file}: names {name}, which is no file beside it; fetch the folder again")
    return [file.parent / name for name in names]


def _open_arrays(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        return open_safetensors(file)
    tensors = load_torch(file)
    if not isinstance(tensors, dict) or not all(isinstance(array, np.ndarray) for array in tensors.values()):
        raise UserError(f"{file}: holds no named tensors; is this a model of Hugging Face's?")
    return {str(name): array for name, array in tensors.items()}
