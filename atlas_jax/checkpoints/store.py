"""Our checkpoints, and the only file that knows Orbax.

A folder that needs nothing else: `atlas.json` (shapes, step, sizes of files, checksums of arrays), `params/` (Orbax),
and the tokenizers `reader/` and `retriever/`. A training run adds what it needs to go on: `training/` (Orbax) and
`training.json`.
"""

import dataclasses
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from atlas_jax.checkpoints.checksum import checksum
from atlas_jax.checkpoints.pretrained import read_json
from atlas_jax.checkpoints.weights import Params, flat_shapes
from atlas_jax.config import OUR_CHECKPOINT
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.files import new_folder, sync, write_json
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config

FORMAT = 2
TREES = ("params", "training")  # what Orbax writes
ABOUT_TRAINING = "training.json"
OF_THE_RUN = ("dropout", "dtype", "for_cpu")  # fields of a shape that the run chooses, not the weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """Everything that a run needs of a model: parameters, shapes, and the tokenizers that it was trained with."""

    params: Params  # float32, by our paths
    cfg: AtlasConfig
    tokenizer: Tokenizer  # the reader's
    retriever_tokenizer: Tokenizer | None
    step: int = 0
    index: str | None = None  # fingerprint of the passage encoder of the index that the retriever was trained with


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a training run needs besides the weights to go on as if it had not stopped."""

    arrays: dict[str, np.ndarray]  # the optimizers' moments and the like, by name
    about: dict[str, Any]  # the position in the data, counters: what JSON holds


def is_checkpoint(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return (folder / OUR_CHECKPOINT).is_file()


def is_whole(folder: Path) -> bool:
    """Whether all files are there in full, without reading them."""
    try:
        _check_whole(folder)
    except UserError:
        return False
    return True


def save(folder: Path, weights: Weights, memory: Memory | None = None) -> None:
    """Writes the folder, which appears when it is complete and on the disk; an existing one is replaced then.

    Not being able to write is a `UserError`.
    """
    cfg = weights.cfg
    trees = {"params": weights.params} | ({"training": memory.arrays} if memory else {})
    remedy = "free some space there or choose a folder that can be written"
    with new_folder(folder, remedy, replace=True) as draft:
        needed, free = sum(x.nbytes for tree in trees.values() for x in tree.values()), shutil.disk_usage(draft).free
        if needed > free:  # before half of it is written
            raise UserError(f"{folder}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are left there; {remedy}")
        try:
            with _orbax() as checkpointer:
                for name, arrays in trees.items():
                    if arrays:
                        checkpointer.save(draft.resolve() / name, dict(arrays))
            for name, tokenizer in (("reader", weights.tokenizer), ("retriever", weights.retriever_tokenizer)):
                if tokenizer:
                    tokenizer.save(draft / name)
        except Exception as error:  # Orbax, TensorStore and tokenizers raise every kind
            raise UserError(f"{folder}: cannot be written ({_line(error)}); {remedy}") from None
        checksums: dict[str, Any] = {name: _checksums(arrays) for name, arrays in trees.items()}
        if memory:
            write_json(draft / ABOUT_TRAINING, memory.about)
            checksums[ABOUT_TRAINING] = _of_file(draft / ABOUT_TRAINING)
        shapes = {
            "reader": _to_json(cfg.reader) if cfg.reader else None,
            "retriever": _to_json(cfg.retriever) if cfg.retriever else None,
        }
        about = {"format": FORMAT, "step": weights.step, "index": weights.index, "untied": cfg.untied, **shapes}
        write_json(draft / OUR_CHECKPOINT, about | {"files": _sizes(draft), "checksums": checksums})
        sync(*draft.rglob("*"), draft)
    sync(folder.parent)


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
    """Reads a checkpoint whole; UserError if anything is missing, of another shape or not what was saved."""
    cfg, step = load_config(folder)
    try:
        wanted = flat_shapes(cfg)
    except Exception as error:  # numbers that make no model
        raise UserError(f"{folder / OUR_CHECKPOINT}: damaged ({_line(error)}); write the checkpoint again") from None
    _check_whole(folder)
    index = _field(folder, "index", str | None)
    params = _read(folder, "params", wanted)
    retriever_tokenizer = Tokenizer.load(folder / "retriever") if cfg.retriever else None
    return Weights(params, cfg, Tokenizer.load(folder / "reader"), retriever_tokenizer, step, index)


def load_memory(folder: Path) -> Memory | None:
    """What a training run left beside the weights, if it did; UserError if that is damaged."""
    _check_whole(folder)
    checksums = _field(folder, "checksums", dict)
    if "training" not in checksums:
        return None
    if checksums.get(ABOUT_TRAINING) != _of_file(folder / ABOUT_TRAINING):
        raise _damaged(folder / ABOUT_TRAINING)
    return Memory(_read(folder, "training") if checksums["training"] else {}, read_json(folder / ABOUT_TRAINING))


def _read(folder: Path, tree: str, wanted: Mapping[str, Any] | None = None) -> Params:
    """The arrays of one of Orbax's folders, each as it was saved; `wanted` names the only shapes that will do."""
    path = folder.resolve() / tree
    try:
        with _orbax() as checkpointer:
            there = dict(checkpointer.metadata(path).item_metadata.items())
            needed = there if wanted is None else wanted
            shapes, right = ({name: tuple(x.shape) for name, x in arrays.items()} for arrays in (there, needed))
            wrong = sorted(name for name in shapes | right if shapes.get(name) != right.get(name))
            if wrong:  # Orbax would pad or cut
                raise ValueError(f"{wrong[0]} is {shapes.get(wrong[0])}, not {right.get(wrong[0])}")
            places = {name: np.zeros(x.shape, x.dtype) for name, x in needed.items()}
            arrays: Params = checkpointer.restore(path, places)
    except Exception as error:  # Orbax and TensorStore raise every kind
        raise UserError(f"{folder}/{tree}: damaged or incomplete ({_line(error)}); write it again") from None
    expected, found = _field(folder, "checksums", dict).get(tree, {}), _checksums(arrays)
    for name in sorted(expected | found):
        if expected.get(name) != found.get(name):
            raise _damaged(f"{folder}/{tree}: {name}")
    return arrays


def _orbax() -> Any:
    """Orbax, silenced: it tells its own life in the log, and after a failure says it again from each of its threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _LateCallbacks):
        sys.unraisablehook = _LateCallbacks(sys.unraisablehook)
    return ocp.StandardCheckpointer()


class _LateCallbacks:
    """Drops what TensorStore's threads complain of when the event loop that waited for them has gone: a failed save."""

    def __init__(self, others: Callable[["sys.UnraisableHookArgs"], Any]):
        self._others = others

    def __call__(self, lost: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(lost.exc_value, RuntimeError) and str(lost.exc_value) == "Event loop is closed"):
            self._others(lost)


def _checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    return {name: checksum(array) for name, array in arrays.items()}


def _of_file(path: Path) -> str:
    return checksum(np.fromfile(path, np.uint8))


def _sizes(folder: Path) -> dict[str, int]:
    """The files of arrays and of the training, and their bytes."""
    files = [folder / ABOUT_TRAINING, *(path for tree in TREES for path in (folder / tree).rglob("*"))]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files) if path.is_file()}


def _check_whole(folder: Path) -> None:
    """A broken copy is told by its sizes: TensorStore, reading one, leaves tracebacks of its threads on stderr."""
    found = _sizes(folder)
    for name, size in _field(folder, "files", dict).items():
        if found.get(name) != size:
            has = f"{found[name]} bytes, not {size}" if name in found else "missing"
            raise UserError(f"{folder}/{name}: {has}; copy the checkpoint again")


def _field(folder: Path, name: str, kind: type | UnionType) -> Any:
    """A field of `atlas.json`."""
    path = folder / OUR_CHECKPOINT
    about = read_json(path)
    if name not in about or not isinstance(about[name], kind):
        raise UserError(f"{path}: damaged ({name!r}); write the checkpoint again")
    return about[name]


def _damaged(what: object) -> UserError:
    return UserError(f"{what} is not what was saved; copy the checkpoint again or take an older one")


def _line(error: Exception) -> str:
    """What the operating system said, or else the first line of others' messages, which may have many."""
    if code := re.search(r"os(?:_error_code='| error )(\d+)", str(error)):  # TensorStore; tokenizers
        return os.strerror(int(code[1]))
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _to_json(shape: T5Config | ContrieverConfig) -> Mapping[str, Any]:
    return {key: value for key, value in dataclasses.asdict(shape).items() if key not in OF_THE_RUN}
