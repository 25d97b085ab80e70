"""What a folder or file of weights holds, told from its headers: no array is read."""

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
from atlas_jax.checkpoints.restore import PUBLISHED, open_published
from atlas_jax.checkpoints.weights import is_untied
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS, T5Config
from atlas_jax.storage.files import read_json

INDEXES = ("index.json", "embeddings.0.pt")
VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.txt")

Facts = dict[str, Any]  # JSON, in the order to be told


def inspect(path: Path) -> Facts:
    """What is known of a checkpoint or a model, whichever it is; UserError if it is neither."""
    if store.is_checkpoint(path):
        return _ours(path)
    if path.is_file() and path.suffix != ".json":
        return _published(path)
    if (path / PUBLISHED).is_file():
        return _published(path / PUBLISHED)
    if (path / "config.json").is_file():
        return {"kind": "a model in Hugging Face's form", **_model(path), "bytes": _bytes(path)}
    if any((path / name).is_file() for name in INDEXES):
        raise UserError(f"{path}: is an index; atlas index inspect {path} tells what it holds")
    models = sorted(found.parent for found in path.glob("*/config.json"))
    if models:
        return {"kind": "models in Hugging Face's form", **{model.name: _model(model) for model in models}}
    known = f"a checkpoint (atlas.json, {PUBLISHED}) or a Hugging Face model (config.json)"
    raise UserError(f"{path}: holds nothing known here; give the folder of {known}")


def lines(facts: Facts, indent: str = "") -> list[str]:
    """For people: a fact a line, sizes in GB beside the bytes."""
    told = []
    for name, value in facts.items():
        if isinstance(value, dict):
            told += [f"{indent}{name}:", *lines(value, indent + "  ")]
        elif name == "bytes":
            told.append(f"{indent}size: {value / 1e9:.2f} GB ({value} bytes)")
        elif name == "parameters":
            told.append(f"{indent}parameters: {value / 1e6:.1f} million ({value})")
        else:
            told.append(f"{indent}{name.replace('_', ' ')}: {_text(value)}")
    return told


def _ours(folder: Path) -> Facts:
    cfg, step = store.load_config(folder)
    shapes = param_shapes(cfg)
    return {
        "kind": "a checkpoint of ours",
        "step": step,
        "reader": _reader(cfg.reader) if cfg.reader else None,
        "retriever": _retriever(cfg.retriever, untied=cfg.untied) if cfg.retriever else None,
        "parameters": sum(shape.size for shape in shapes.values()),
        "dtype": sorted({str(shape.dtype) for shape in shapes.values()}),
        "tokenizers": [name for name in ("reader", "retriever") if _has_tokenizer(folder / name)],
        "optimizer": (folder / store.ABOUT_TRAINING).is_file(),
        "whole": store.is_whole(folder),
        "bytes": _bytes(folder),
    }


def _published(file: Path) -> Facts:
    source, step = open_published(file)
    arrays = {name: array for name, array in source.items() if array.dtype.kind != "i"}  # not BERT's position_ids
    reader = _below("reader.", arrays)
    theirs = "retriever.query_contriever." if is_untied(source) else "retriever.contriever."
    retriever = _below(theirs, arrays)
    return {
        "kind": "a checkpoint of the PyTorch reference",
        "step": step,
        "reader": _reader(_guess_reader(reader, file)) if reader else None,
        "retriever": _guess_retriever(retriever, file, untied=is_untied(source)) if retriever else None,
        **_arrays(arrays),
        "tokenizers": [],
        "bytes": file.stat().st_size,
    }


def _model(folder: Path) -> Facts:
    kind = read_json(folder / "config.json").get("model_type")
    if kind == "t5":
        facts: Facts = {"reader": _reader(reader_config(str(folder)))}
    else:
        facts = {"retriever": _retriever(retriever_config(str(folder)))}
    file = weights_file(str(folder))
    arrays = folder_weights(str(folder)) if file else None
    facts |= {"weights": file.name if file else None, **(_arrays(arrays) if arrays else {})}
    return facts | {"tokenizers": [*facts][:1] if _has_tokenizer(folder) else []}


def _reader(cfg: T5Config) -> Facts:
    names = [name for name, known in T5_CONFIGS.items() if known == cfg]
    fields = ("d_model", "num_heads", "head_dim", "d_ff", "num_layers", "num_decoder_layers", "vocab_size")
    return {
        "shape_of": names or None,
        **{name: getattr(cfg, name) for name in fields},
        "activation": "gated-gelu" if cfg.gated else "relu",
        "output_tied_to_input": cfg.tied,
    }


def _retriever(cfg: ContrieverConfig, *, untied: bool = False) -> Facts:
    known = [name for name, known in KNOWN_RETRIEVERS.items() if known == cfg]
    fields = ("d_model", "num_heads", "d_ff", "num_layers", "vocab_size", "max_positions", "norm", "pooling")
    encoders = "one for queries and one for passages" if untied else "one for both"
    return {"shape_of": known or None, "encoders": encoders, **{name: getattr(cfg, name) for name in fields}}


def _guess_reader(arrays: Mapping[str, np.ndarray], file: Path) -> T5Config:
    """The shape of a T5, out of the shapes of its arrays, which have all of it but the epsilon."""
    try:
        vocabulary, width = arrays["shared.weight"].shape
        buckets, heads = arrays["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
        inner = arrays["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
        gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in arrays
        up = arrays[f"encoder.block.0.layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"].shape[0]
        encoder, decoder = (_depth(rf"{side}\.block\.(\d+)\.", arrays) for side in ("encoder", "decoder"))
        head = arrays.get("lm_head.weight")
        tied = head is None or head.__array_interface__ == arrays["shared.weight"].__array_interface__
        return T5Config(width, heads, inner // heads, up, encoder, decoder, vocabulary, gated, tied, buckets)
    except (KeyError, ValueError, ArithmeticError) as error:
        raise UserError(f"{file}: its reader is no T5 ({error}); is this an Atlas checkpoint?") from None


def _guess_retriever(arrays: Mapping[str, np.ndarray], file: Path, *, untied: bool) -> Facts:
    """What the shapes of a BERT's arrays tell; not the number of heads."""
    try:
        vocabulary, width = arrays["embeddings.word_embeddings.weight"].shape
        positions = arrays["embeddings.position_embeddings.weight"].shape[0]
        up = arrays["encoder.layer.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: its retriever is no BERT ({error}); is this an Atlas checkpoint?") from None
    depth = _depth(r"encoder\.layer\.(\d+)\.", arrays)
    cfg = ContrieverConfig(width, max(width // 64, 1), up, depth, vocabulary, positions)
    facts = _retriever(cfg, untied=untied)
    return {name: value for name, value in facts.items() if name not in ("num_heads", "norm", "pooling")}


def _depth(pattern: str, arrays: Mapping[str, np.ndarray]) -> int:
    return 1 + max(int(found[1]) for name in arrays if (found := re.match(pattern, name)))


def _arrays(arrays: Mapping[str, np.ndarray]) -> Facts:
    """Parameters, those of two names once."""
    once = {str(sorted(array.__array_interface__.items(), key=str)): array for array in arrays.values()}
    return {
        "parameters": sum(array.size for array in once.values()),
        "dtype": sorted({str(array.dtype) for array in once.values()}),
    }


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARIES)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value) if type(value) is not bool else "yes" if value else "no"
