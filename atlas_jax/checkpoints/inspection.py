"""Describes a folder or file of weights from its headers, without reading any array."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.pretrained import (
    KNOWN_RETRIEVERS,
    folder_weights,
    reader_config,
    retriever_config,
    weights_file,
)
from atlas_jax.checkpoints.restore import PUBLISHED, open_reference_arrays
from atlas_jax.checkpoints.weights import is_untied
from atlas_jax.config.run_weights import is_whole
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS, T5Config
from atlas_jax.storage.files import read_json

INDEX_FILES = ("index.json", "embeddings.0.pt")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.txt")

Facts = dict[str, Any]  # JSON values, in the order in which they are printed


def inspect(path: Path) -> Facts:
    """Describes a checkpoint or a Hugging Face model; UserError if the path is neither."""
    if store.is_checkpoint(path):
        return _inspect_checkpoint(path)
    if path.is_file() and path.suffix != ".json":
        return _inspect_reference(path)
    if (path / PUBLISHED).is_file():
        return _inspect_reference(path / PUBLISHED)
    if (path / "config.json").is_file():
        return {"kind": "a model in Hugging Face's form", **_inspect_model(path), "bytes": _folder_bytes(path)}
    if any((path / name).is_file() for name in INDEX_FILES):
        raise UserError(f"{path}: is an index; atlas index inspect {path} tells what it holds")
    models = sorted(found.parent for found in path.glob("*/config.json"))
    if models:
        return {"kind": "models in Hugging Face's form", **{model.name: _inspect_model(model) for model in models}}
    known = f"a checkpoint (atlas.json, {PUBLISHED}) or a Hugging Face model (config.json)"
    raise UserError(f"{path}: holds nothing known here; give the folder of {known}")


def lines(facts: Facts, indent: str = "") -> list[str]:
    """Formats facts for people, one on each line, with sizes in GB beside the bytes."""
    result = []
    for name, value in facts.items():
        if isinstance(value, dict):
            result += [f"{indent}{name}:", *lines(value, indent + "  ")]
        elif name == "bytes":
            result.append(f"{indent}size: {value / 1e9:.2f} GB ({value} bytes)")
        elif name == "parameters":
            result.append(f"{indent}parameters: {value / 1e6:.1f} million ({value})")
        else:
            result.append(f"{indent}{name.replace('_', ' ')}: {_format_value(value)}")
    return result


def _inspect_checkpoint(folder: Path) -> Facts:
    cfg, step = store.load_config(folder)
    shapes = param_shapes(cfg)
    return {
        "kind": "a checkpoint of ours",
        "step": step,
        "reader": _reader_facts(cfg.reader) if cfg.reader else None,
        "retriever": _retriever_facts(cfg.retriever, untied=cfg.untied) if cfg.retriever else None,
        "parameters": sum(shape.size for shape in shapes.values()),
        "dtype": sorted({str(shape.dtype) for shape in shapes.values()}),
        "tokenizers": [name for name in ("reader", "retriever") if _has_tokenizer(folder / name)],
        "optimizer": store.has_optimizer(folder),
        "whole": is_whole(folder),
        "bytes": _folder_bytes(folder),
    }


def _inspect_reference(file: Path) -> Facts:
    source, step = open_reference_arrays(file)
    arrays = {name: array for name, array in source.items() if array.dtype.kind != "i"}  # not BERT's position_ids
    reader = _select_prefix("reader.", arrays)
    encoder_prefix = "retriever.query_contriever." if is_untied(source) else "retriever.contriever."
    retriever = _select_prefix(encoder_prefix, arrays)
    return {
        "kind": "a checkpoint of the PyTorch reference",
        "step": step,
        "reader": _reader_facts(_infer_reader_config(reader, file)) if reader else None,
        "retriever": _infer_retriever_facts(retriever, file, untied=is_untied(source)) if retriever else None,
        **_array_facts(arrays),
        "tokenizers": [],
        "bytes": file.stat().st_size,
    }


def _inspect_model(folder: Path) -> Facts:
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type == "t5":
        facts: Facts = {"reader": _reader_facts(reader_config(str(folder)))}
    else:
        facts = {"retriever": _retriever_facts(retriever_config(str(folder)))}
    file = weights_file(str(folder))
    arrays = folder_weights(str(folder)) if file else None
    facts |= {"weights": file.name if file else None, **(_array_facts(arrays) if arrays else {})}
    return facts | {"tokenizers": [*facts][:1] if _has_tokenizer(folder) else []}


def _reader_facts(cfg: T5Config) -> Facts:
    names = [name for name, known in T5_CONFIGS.items() if known == cfg]
    fields = ("d_model", "num_heads", "head_dim", "d_ff", "num_layers", "num_decoder_layers", "vocab_size")
    return {
        "shape_of": names or None,
        **{name: getattr(cfg, name) for name in fields},
        "activation": "gated-gelu" if cfg.gated else "relu",
        "output_tied_to_input": cfg.tied,
    }


def _retriever_facts(cfg: ContrieverConfig, *, untied: bool = False) -> Facts:
    known = [name for name, known in KNOWN_RETRIEVERS.items() if known == cfg]
    fields = ("d_model", "num_heads", "d_ff", "num_layers", "vocab_size", "max_positions", "norm", "pooling")
    encoders = "one for queries and one for passages" if untied else "one for both"
    return {"shape_of": known or None, "encoders": encoders, **{name: getattr(cfg, name) for name in fields}}


def _infer_reader_config(arrays: Mapping[str, np.ndarray], file: Path) -> T5Config:
    """Infers a T5's config from the shapes of its arrays, which determine all of it but the layer norm's epsilon."""
    try:
        vocabulary, width = arrays["shared.weight"].shape
        buckets, heads = arrays["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
        inner = arrays["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
        gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in arrays
        mlp_width = arrays[f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"].shape[0]
        encoder, decoder = (_count_layers(rf"{side}\.block\.(\d+)\.", arrays) for side in ("encoder", "decoder"))
        lm_head = arrays.get("lm_head.weight")
        tied = lm_head is None or lm_head.__array_interface__ == arrays["shared.weight"].__array_interface__
        return T5Config(width, heads, inner // heads, mlp_width, encoder, decoder, vocabulary, gated, tied, buckets)
    except (KeyError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: its reader is no T5 ({error}); is this an Atlas checkpoint?") from None


def _infer_retriever_facts(arrays: Mapping[str, np.ndarray], file: Path, *, untied: bool) -> Facts:
    """Infers what the shapes of a BERT's arrays determine, which is not the number of heads."""
    try:
        vocabulary, width = arrays["embeddings.word_embeddings.weight"].shape
        positions = arrays["embeddings.position_embeddings.weight"].shape[0]
        mlp_width = arrays["encoder.layer.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: its retriever is no BERT ({error}); is this an Atlas checkpoint?") from None
    depth = _count_layers(r"encoder\.layer\.(\d+)\.", arrays)
    cfg = ContrieverConfig(width, max(width // 64, 1), mlp_width, depth, vocabulary, positions)
    facts = _retriever_facts(cfg, untied=untied)
    return {name: value for name, value in facts.items() if name not in ("num_heads", "norm", "pooling")}


def _count_layers(pattern: str, arrays: Mapping[str, np.ndarray]) -> int:
    return 1 + max(int(match[1]) for name in arrays if (match := re.match(pattern, name)))


def _array_facts(arrays: Mapping[str, np.ndarray]) -> Facts:
    """Counts the parameters and lists their dtypes; an array with two names counts once."""
    unique = {str(sorted(array.__array_interface__.items(), key=str)): array for array in arrays.values()}
    return {
        "parameters": sum(array.size for array in unique.values()),
        "dtype": sorted({str(array.dtype) for array in unique.values()}),
    }


def _select_prefix(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value) if type(value) is not bool else "yes" if value else "no"
