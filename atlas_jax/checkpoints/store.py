"""Our checkpoints, and the only file that knows Orbax.

A folder that needs nothing else: `atlas.json` (shapes, step, the sizes of files), `params/` (Orbax), and the tokenizers
`reader/` and `retriever/`.
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
OF_THE_RUN = ("dropout", "dtype", "for_cpu")  # fields of a shape that the run chooses, not the weights


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
        about = {"format": FORMAT, "step": weights.step, "untied": cfg.untied, **shapes, "files": _sizes(draft)}
        write_json(draft / OUR_CHECKPOINT, about)


def load_config(folder: Path) -> tuple[AtlasConfig, int]:
    """The shapes and the step of a checkpoint, without its arrays."""
    path = folder / OUR_CHECKPOINT
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: format {found.get('format')!r}, this program reads {FORMAT}; use its release")
    try:
        reader = T5Config(**found["reader"]) if found["reader"] else None
        retriever = ContrieverConfig(**found["retriever"]) if found["retriever"] else None
        cfg, step = AtlasConfig(reader, retriever, untied=found["untied"]), found["step"]
        if type(step) is not int:
            raise TypeError(f"step {step!r}")
        return cfg, step
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({_line(error)}); write the checkpoint again") from None


def load(folder: Path) -> Weights:
    """Reads a checkpoint whole; UserError if anything is missing or of another shape."""
    cfg, step = load_config(folder)
    try:
        wanted = flat_shapes(cfg)
    except Exception as error:  # numbers that make no model
        raise UserError(f"{folder / OUR_CHECKPOINT}: damaged ({_line(error)}); write the checkpoint again") from None
    _check_whole(folder)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells its own life there
    path = folder.resolve() / "params"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            there = {name: tuple(x.shape) for name, x in checkpointer.metadata(path).item_metadata.items()}
            needed = {name: x.shape for name, x in wanted.items()}
            wrong = sorted(name for name in there | needed if there.get(name) != needed.get(name))
            if wrong:  # Orbax would pad or cut
                raise ValueError(f"{wrong[0]} is {there.get(wrong[0])}, not {needed.get(wrong[0])}")
            params = checkpointer.restore(path, {name: np.zeros(x.shape, x.dtype) for name, x in wanted.items()})
    except Exception as error:  # Orbax and TensorStore raise every kind
        raise UserError(f"{folder}/params: damaged or incomplete ({_line(error)}); write it again") from None
    retriever_tokenizer = Tokenizer.load(folder / "retriever") if cfg.retriever else None
    return Weights(params, cfg, Tokenizer.load(folder / "reader"), retriever_tokenizer, step)


def _sizes(folder: Path) -> dict[str, int]:
    """The files that Orbax wrote, and their bytes."""
    files = sorted(path for path in (folder / "params").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _check_whole(folder: Path) -> None:
    """A broken copy is told by its sizes: TensorStore, reading one, leaves tracebacks of its threads on stderr."""
    expected = read_json(folder / OUR_CHECKPOINT).get("files")
    if not isinstance(expected, dict):
        raise UserError(f"{folder / OUR_CHECKPOINT}: damaged ('files'); write the checkpoint again")
    found = _sizes(folder)
    for name, size in expected.items():
        if found.get(name) != size:
            has = f"{found[name]} bytes, not {size}" if name in found else "missing"
            raise UserError(f"{folder}/{name}: {has}; copy the checkpoint again")


def _line(error: Exception) -> str:
    """The first line of others' messages, which may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _to_json(shape: T5Config | ContrieverConfig) -> Mapping[str, Any]:
    return {key: value for key, value in dataclasses.asdict(shape).items() if key not in OF_THE_RUN}
