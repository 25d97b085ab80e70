"""Our checkpoints: what stands in the folder, how it is written, and how it is known to be whole.

A folder that needs nothing else: `atlas.json` (shapes, step, sizes of files, checksums of arrays), `params/` (Orbax),
and the tokenizers `reader/` and `retriever/`. A training run adds what it needs to go on: `training/` (Orbax) and
`training.json`.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from atlas_jax.checkpoints.formats.checksum import checksum
from atlas_jax.checkpoints.formats.orbax_arrays import (
    Stored,
    Sums,
    combine_checksums,
    create_arrays,
    damaged_error,
    first_line,
    open_arrays,
    write_arrays,
)
from atlas_jax.config import OUR_CHECKPOINT
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import fsync, read_json, write_json
from atlas_jax.storage.lazy_array import ArrayLike, LocalShards, read
from atlas_jax.storage.shared_files import atomic_shared_folder

FORMAT = 2
CHANNEL = "checkpoint"  # on which the processes of a run speak of this
TREES = ("params", "training")  # what Orbax writes
ABOUT_TRAINING = "training.json"
REMEDY = "free some space there or choose a folder that can be written"
OF_THE_RUN = ("dropout", "dtype", "for_cpu")  # fields of a shape that the run chooses, not the weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """Everything that a run needs of a model: parameters, shapes, and the tokenizers that it was trained with."""

    params: Mapping[str, ArrayLike]  # float32, by our paths, in memory or still in files
    cfg: AtlasConfig
    tokenizer: Tokenizer  # the reader's
    retriever_tokenizer: Tokenizer | None
    step: int = 0
    index: str | None = None  # fingerprint of the passage encoder of the index that the retriever was trained with

    def load(self, prefix: str = "") -> "Weights":
        """Those whose path begins so are read into memory, where each is there once."""
        params = {
            path: np.asarray(read(array), np.float32) if path.startswith(prefix) else array
            for path, array in self.params.items()
        }
        return dataclasses.replace(self, params=params)


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """What a training run needs besides the weights to go on as if it had not stopped."""

    arrays: Mapping[str, ArrayLike]  # the optimizers' moments and the like, by name
    about: dict[str, Any]  # the position in the data, counters: what JSON holds

    def load(self, prefix: str = "") -> "ResumeState":
        """The arrays whose name begins so are read into memory."""
        arrays = {name: read(array) if name.startswith(prefix) else array for name, array in self.arrays.items()}
        return ResumeState(arrays, self.about)


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


def save(
    folder: Path,
    weights: Weights,
    resume_state: ResumeState | None = None,
    tell: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes the folder, which appears when it is complete and on the disk; an existing one is replaced then.

    Parameters that are in files are never all in memory. `tell` hears how many more bytes of arrays were written. Not
    being able to write is a `UserError`. All processes of a run take part, each with its pieces; process 0 does the
    rest. If one of them cannot write, that is an error on all, and nothing appears.
    """
    trees: dict[str, Mapping[str, ArrayLike]] = {"params": weights.params}
    if resume_state:
        trees["training"] = resume_state.arrays
    arrays = {name: tree for name, tree in trees.items() if tree}
    group = process_group()
    with atomic_shared_folder(folder, REMEDY, CHANNEL) as draft:
        group.run_on_first(lambda: _create(draft, folder, arrays), CHANNEL)
        mine = {name: _mine(tree, all_else=group.index == 0) for name, tree in arrays.items()}
        sums = group.run_on_all(lambda: _write(draft, folder, mine, tell), CHANNEL)
        checksums: dict[str, Any] = {name: {} for name in trees}
        checksums |= {name: combine_checksums(tree, [one[name] for one in sums]) for name, tree in arrays.items()}
        group.run_on_first(lambda: _describe(draft, folder, weights, resume_state, checksums), CHANNEL)
    group.run_on_first(lambda: fsync(folder.parent), CHANNEL)


def _create(draft: Path, folder: Path, arrays: Mapping[str, Mapping[str, ArrayLike]]) -> None:
    check_room(draft, folder, sum(array.nbytes for tree in arrays.values() for array in tree.values()))
    with writing(folder):
        for name, tree in arrays.items():
            create_arrays(draft / name, tree)


def _write(
    draft: Path, folder: Path, arrays: Mapping[str, Mapping[str, ArrayLike]], tell: Callable[[int], object]
) -> dict[str, Sums]:
    with writing(folder):
        return {name: write_arrays(draft / name, tree, tell) for name, tree in arrays.items()}


def _describe(
    draft: Path, folder: Path, weights: Weights, resume_state: ResumeState | None, checksums: dict[str, Any]
) -> None:
    """Writes everything but arrays, and sees to it that all of it is on the disk."""
    with writing(folder):
        for name, tokenizer in (("reader", weights.tokenizer), ("retriever", weights.retriever_tokenizer)):
            if tokenizer:
                tokenizer.save(draft / name)
    if resume_state:
        write_json(draft / ABOUT_TRAINING, resume_state.about)
        checksums = checksums | {ABOUT_TRAINING: _of_file(draft / ABOUT_TRAINING)}
    about = {"format": FORMAT, "step": weights.step, "index": weights.index, **_shapes(weights.cfg)}
    write_json(draft / OUR_CHECKPOINT, about | {"files": _sizes(draft), "checksums": checksums})
    fsync(*draft.rglob("*"), draft)


def _mine(tree: Mapping[str, ArrayLike], *, all_else: bool) -> dict[str, ArrayLike]:
    """Arrays that this process writes of: those that are spread, and on process 0 all else."""
    return {name: array for name, array in tree.items() if all_else or isinstance(array, LocalShards)}


def check_room(draft: Path, folder: Path, needed: int) -> None:
    """UserError if the disk has not so many bytes left, before half of them are written."""
    free = shutil.disk_usage(draft).free
    if needed > free:
        raise UserError(f"{folder}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are left there; {REMEDY}")


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What others' code raises when it cannot write is a `UserError`; ours, about what it reads, stays as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax, TensorStore and tokenizers raise every kind
        raise UserError(f"{folder}: cannot be written ({first_line(error)}); {REMEDY}") from None


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
        raise UserError(f"{path}: damaged ({first_line(error)}); write the checkpoint again") from None


def load(folder: Path) -> Weights:
    """Reads a checkpoint whole; UserError if anything is missing, of another shape or not what was saved."""
    return open_checkpoint(folder).load()


def open_checkpoint(folder: Path) -> Weights:
    """The same without its arrays, which are read and verified when they are asked for."""
    cfg, step = load_config(folder)
    _check_whole(folder)
    try:
        wanted = param_shapes(cfg)
    except Exception as error:  # numbers that make no model
        raise UserError(
            f"{folder / OUR_CHECKPOINT}: damaged ({first_line(error)}); write the checkpoint again"
        ) from None
    index = _field(folder, "index", str | None)
    params = _open(folder, "params", wanted)
    retriever_tokenizer = Tokenizer.load(folder / "retriever") if cfg.retriever else None
    return Weights(params, cfg, Tokenizer.load(folder / "reader"), retriever_tokenizer, step, index)


def load_resume_state(folder: Path) -> ResumeState | None:
    """What a training run left beside the weights, its arrays unread, if it did; UserError if that is damaged."""
    _check_whole(folder)
    checksums = _field(folder, "checksums", dict)
    if "training" not in checksums:
        return None
    if checksums.get(ABOUT_TRAINING) != _of_file(folder / ABOUT_TRAINING):
        raise damaged_error(folder / ABOUT_TRAINING)
    arrays = _open(folder, "training") if checksums["training"] else {}  # Orbax keeps no empty folder
    return ResumeState(arrays, read_json(folder / ABOUT_TRAINING))


def _open(folder: Path, tree: str, wanted: Mapping[str, Any] | None = None) -> dict[str, Stored]:
    """The arrays of one of Orbax's folders, unread; `wanted` names the only shapes that will do."""
    arrays = open_arrays(folder / tree, _field(folder, "checksums", dict).get(tree, {}))
    if wanted is not None:
        shapes, right = ({name: tuple(x.shape) for name, x in tree.items()} for tree in (arrays, wanted))
        for name in sorted(shapes | right):
            if shapes.get(name) != right.get(name):
                said = f"{name} is {shapes.get(name)}, not {right.get(name)}"
                raise UserError(f"{folder}/{tree}: damaged or incomplete ({said}); write it again")
    return arrays


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


def _shapes(cfg: AtlasConfig) -> dict[str, Any]:
    parts = {"reader": cfg.reader, "retriever": cfg.retriever}
    return {"untied": cfg.untied, **{name: _to_json(shape) if shape else None for name, shape in parts.items()}}


def _to_json(shape: T5Config | ContrieverConfig) -> Mapping[str, Any]:
    return {key: value for key, value in dataclasses.asdict(shape).items() if key not in OF_THE_RUN}
