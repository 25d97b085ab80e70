"""Model folders with configuration and the sample's tokenizers, without weights: for `--random_weights`."""

import json
import shutil
from pathlib import Path

import atlas_jax
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config

SAMPLE = Path(atlas_jax.__file__).parent / "sample"


def t5_folder(shape: T5Config, folder: Path) -> Path:
    """Writes the folder of a T5 reader of the given shape; returns its path."""
    return _write_folder(
        "reader",
        folder,
        model_type="t5",
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        d_kv=shape.head_dim,
        d_ff=shape.d_ff,
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        feed_forward_proj="gated-gelu" if shape.gated else "relu",
        tie_word_embeddings=shape.tied,
    )


def contriever_folder(shape: ContrieverConfig, folder: Path) -> Path:
    """Writes the folder of a Contriever retriever of the given shape; returns its path."""
    return _write_folder(
        "retriever",
        folder,
        model_type="bert",
        hidden_size=shape.d_model,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
    )


def _write_folder(tokenizer: str, folder: Path, **config: object) -> Path:
    shutil.copytree(SAMPLE / tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
