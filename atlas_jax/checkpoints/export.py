"""Exports weights to other formats: Hugging Face folders, and the reference's `model.pth.tar`."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from atlas_jax.checkpoints.formats.safetensors_file import write_safetensors
from atlas_jax.checkpoints.formats.torch_writer import Attributes, write_torch
from atlas_jax.checkpoints.restore import PUBLISHED
from atlas_jax.checkpoints.store import REMEDY, Weights, check_free_space, user_errors_on_write
from atlas_jax.checkpoints.weights import ExportedArray, encoder_names, weight_entries
from atlas_jax.data.tokens import CLEAN_UP, Tokenizer
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config
from atlas_jax.storage.files import atomic_folder, fsync, read_json, write_json
from atlas_jax.storage.lazy_array import ArrayLike

logger = logging.getLogger(__name__)

OnBytes = Callable[[int], object]  # called with the number of bytes after each array is written
Check = Callable[[], object] | None  # see `atomic_folder`


def write_huggingface(folder: Path, weights: Weights, on_bytes: OnBytes, check: Check = None) -> None:
    """Writes Hugging Face folders: `reader/` (T5) and `retriever/` (BERT), or `query_encoder/` and `passage_encoder/`.

    `folder` must be empty or not exist. UserError if it cannot be written.
    """
    cfg, arrays = weights.cfg, export_arrays(weights.params, weights.cfg, aliases=False)
    with atomic_folder(folder, REMEDY, replace=check is not None, check=check) as draft:
        check_free_space(draft, folder, total_bytes(arrays))
        if cfg.reader:
            model_arrays = _select_prefix("reader.", arrays)
            _write_model(draft / "reader", reader_json(cfg.reader), weights.tokenizer, model_arrays, on_bytes)
        for reference_name, our_name in encoder_names(untied=cfg.untied).items():
            if cfg.retriever:
                name, model_arrays = (
                    "retriever" if our_name == "encoder" else our_name,
                    _select_prefix(f"retriever.{reference_name}.", arrays),
                )
                _write_model(
                    draft / name, retriever_json(cfg.retriever), weights.retriever_tokenizer, model_arrays, on_bytes
                )
        fsync(*draft.rglob("*"), draft)
    fsync(folder.parent)
    if cfg.retriever and cfg.retriever.norm == "atlas":
        logger.warning(
            "%s: the retriever was trained with Atlas's own layer norm; transformers' BertModel computes the standard "
            'one, so its vectors differ from ours. `"layer_norm": "atlas"` in config.json says so to atlas',
            folder,
        )


def write_reference(folder: Path, weights: Weights, on_bytes: OnBytes, check: Check = None) -> None:
    """Writes `model.pth.tar` as the reference saves it, without optimizers; UserError if it cannot be written.

    `opt` has the one attribute that the reference reads when it loads a checkpoint. It is an OrderedDict, because
    `torch.load(weights_only=True)` refuses the reference's own `argparse.Namespace`.
    """
    arrays = export_arrays(weights.params, weights.cfg, aliases=True)
    if weights.cfg.retriever:
        positions = np.arange(weights.cfg.retriever.max_positions)[None]  # a buffer of the reference's BERT
        for reference_name in encoder_names(untied=weights.cfg.untied):
            arrays[f"retriever.{reference_name}.embeddings.position_ids"] = positions
    opt = {"query_side_retriever_training": weights.cfg.untied}
    training_state = dict.fromkeys(("optimizer", "retr_optimizer", "scheduler", "retr_scheduler"))
    with atomic_folder(folder, REMEDY, replace=check is not None, check=check) as draft:
        check_free_space(draft, folder, total_bytes(arrays))
        extra = {"step": weights.step, **training_state, "opt": Attributes(opt)}
        write_torch(draft / PUBLISHED, arrays, extra, on_bytes)
        fsync(draft / PUBLISHED, draft)
    fsync(folder.parent)


def export_arrays(params: Mapping[str, ArrayLike], cfg: AtlasConfig, *, aliases: bool) -> dict[str, ArrayLike]:
    """Returns lazy arrays by the reference's names; with `aliases`, also its second names, of the same objects."""
    exported_arrays: dict[str, ArrayLike] = {}
    by_path: dict[str, ArrayLike] = {}
    for e in weight_entries(cfg):
        if not e.alias:
            exported_arrays[e.name] = ExportedArray(params[e.path], e)
            by_path.setdefault(e.path, exported_arrays[e.name])
        elif aliases:
            exported_arrays[e.name] = by_path[e.path]
    return exported_arrays


def total_bytes(arrays: Mapping[str, ArrayLike]) -> int:
    """Sums the bytes of all arrays, counting an array with two names once."""
    return sum(array.nbytes for array in {id(array): array for array in arrays.values()}.values())


def reader_json(cfg: T5Config) -> dict[str, Any]:
    """Returns the content of Hugging Face's config.json for a T5."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": cfg.d_model,
        "num_heads": cfg.num_heads,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.d_ff,
        "num_layers": cfg.num_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "vocab_size": cfg.vocab_size,
        "feed_forward_proj": "gated-gelu" if cfg.gated else "relu",
        "tie_word_embeddings": cfg.tied,
        "relative_attention_num_buckets": cfg.relative_buckets,
        "relative_attention_max_distance": cfg.relative_max_distance,
        "layer_norm_epsilon": cfg.layer_norm_epsilon,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }


def retriever_json(cfg: ContrieverConfig) -> dict[str, Any]:
    """Returns the content of config.json for a BERT; Hugging Face ignores the last three fields, atlas reads them."""
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": cfg.d_model,
        "num_attention_heads": cfg.num_heads,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_positions,
        "type_vocab_size": cfg.type_vocab_size,
        "layer_norm_eps": cfg.layer_norm_epsilon,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "layer_norm": cfg.norm,
        "pooling": cfg.pooling,
        "normalize": cfg.normalize,
    }


def _write_model(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
    arrays: Mapping[str, ArrayLike],
    on_bytes: OnBytes,
) -> None:
    folder.mkdir()
    if tokenizer:
        with user_errors_on_write(folder):
            tokenizer.save(folder)
        _rewrite_for_transformers(folder / "tokenizer_config.json")
    write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", arrays, on_bytes)


def _rewrite_for_transformers(path: Path) -> None:
    """Changes tokenizer_config.json so that transformers 4 and 5 take tokenizer.json as it is."""
    config = read_json(path)
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra  # the name in version 4, which version 5 reads too
    config.pop("add_prefix_space", None)  # version 4 would make the tokenizer anew, by rules of its own
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # version 5's T5Tokenizer splits at white space in any case
    config.setdefault(CLEAN_UP, False)  # checkpoints of older versions do not say so
    write_json(path, config)


def _select_prefix(prefix: str, arrays: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
