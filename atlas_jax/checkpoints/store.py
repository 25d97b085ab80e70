"""Our checkpoints, and the only file that knows Orbax.

A folder that needs nothing else: `atlas.json` (shapes, step), `params/` (Orbax), `reader/`, `retriever/` (tokenizers).
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from atlas_jax.checkpoints.pretrained import read_json
from atlas_jax.checkpoints.weights import Params, flat_shapes
from atlas_jax.config import OUR_CHECKPOINT
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.files import new_folder, write_json
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config

FORMAT = 1
OF_THE_RUN = ("dropout", "dtype")  # fields of a shape that the run chooses, not the weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """Everything that a run needs of a model: parameters, shapes, and the tokenizers that it was trained with."""

    params: Params  # float32, by our paths
    cfg: AtlasConfig
    tokenizer: Tokenizer  # the reader's
    retriever_tokenizer: Tokenizer | None
    step: int = 0


def is_checkpoint(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return (folder / OUR_CHECKPOINT).is_file()


def save(folder: Path, weights: Weights) -> None:
    """Writes the folder, which appears when it is complete; an existing one is replaced then."""
    cfg = weights.cfg
    with new_folder(folder, "choose a folder that can be written", replace=True) as draft:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(draft.resolve() / "params", dict(weights.params))
        for name, tokenizer in (("reader", weights.tokenizer), ("retriever", weights.retriever_tokenizer)):
            if tokenizer:
                tokenizer.save(draft / name)
        shapes = {
            "reader": _to_json(cfg.reader) if cfg.reader else None,
            "retriever": _to_json(cfg.retriever) if cfg.retriever else None,
        }
        write_json(draft / OUR_CHECKPOINT, {"format": FORMAT, "step": weights.step, "untied": cfg.untied, **shapes})


def load_config(folder: Path) -> tuple[AtlasConfig, int]:
    """The shapes and the step of a checkpoint, without its arrays."""
    path = folder / OUR_CHECKPOINT
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: format {found.get('format')!r}, this program reads {FORMAT}; use its release")
    try:
        reader = T5Config(**found["reader"]) if found["reader"] else None
        retriever = ContrieverConfig(**found["retriever"]) if found["retriever"] else None
        return AtlasConfig(reader, retriever, untied=found["untied"]), found["step"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); write the checkpoint again") from None


def load(folder: Path) -> Weights:
    """Reads a checkpoint whole; UserError if anything is missing or of another shape."""
    cfg, step = load_config(folder)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells its own life there
    wanted = flat_shapes(cfg)
    target = {path: np.zeros(shape.shape, shape.dtype) for path, shape in wanted.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder.resolve() / "params", target)
    except Exception as error:  # Orbax and TensorStore raise every kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder}/params: damaged or incomplete ({reason[:200]}); write it again") from None
    retriever_tokenizer = Tokenizer.load(folder / "retriever") if cfg.retriever else None
    return Weights(params, cfg, Tokenizer.load(folder / "reader"), retriever_tokenizer, step)


def _to_json(shape: T5Config | ContrieverConfig) -> Mapping[str, Any]:
    return {key: value for key, value in dataclasses.asdict(shape).items() if key not in OF_THE_RUN}
