"""The checkpoint folder: writes it atomically, reads it, and checks that it is complete and undamaged.

A self-contained folder: `atlas.json` (model configuration, step, file sizes, array checksums), `params/` (Orbax), and
the tokenizers `reader/` and `retriever/`. A training run adds what it needs to resume: `training/` (Orbax) and
`training.json`.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from atlas_jax.checkpoints.formats.checksum import checksum
from atlas_jax.checkpoints.formats.orbax_arrays import (
    PartialSums,
    StoredArray,
    combine_checksums,
    create_arrays,
    damaged_error,
    first_line,
    open_arrays,
    write_arrays,
)
from atlas_jax.config import CHECKPOINT_FILE
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5Config
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import fsync, read_json, write_json
from atlas_jax.storage.lazy_array import ArrayLike, LocalShards, read
from atlas_jax.storage.shared_files import atomic_shared_folder

logger = logging.getLogger(__name__)

FORMAT = 2
CHANNEL = "checkpoint"  # the process group's channel for saves, which run in a background thread
TREES = ("params", "training")  # folders that Orbax writes
TRAINING_FILE = "training.json"
REMEDY = "free some space there or choose a folder that can be written"
RUN_FIELDS = ("dropout", "dtype", "for_cpu")  # config fields that depend on the run, not on the weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """Everything that a run needs of a model: parameters, configuration, and the tokenizers of its training."""

    params: Mapping[str, ArrayLike]  # float32, by parameter path, in memory or still in files
    cfg: AtlasConfig
    tokenizer: Tokenizer  # the reader's
    retriever_tokenizer: Tokenizer | None
    step: int = 0
    index: str | None = None  # fingerprint of the passage encoder of the index that the retriever was trained with

    def load(self, prefix: str = "") -> "Weights":
        """Reads parameters whose path starts with `prefix` into memory, one float32 copy each; returns new Weights."""
        params = {
            path: np.asarray(read(array), np.float32) if path.startswith(prefix) else array
            for path, array in self.params.items()
        }
        return dataclasses.replace(self, params=params)


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """State that a training run needs besides the weights to resume as if it had not stopped."""

    arrays: Mapping[str, ArrayLike]  # optimizer moments and the like, by name
    metadata: dict[str, Any]  # JSON values: the position in the data, counters

    def load(self, prefix: str = "") -> "ResumeState":
        """Reads the arrays whose name starts with `prefix` into memory; returns a new `ResumeState`."""
        arrays = {name: read(array) if name.startswith(prefix) else array for name, array in self.arrays.items()}
        return ResumeState(arrays, self.metadata)


def is_checkpoint(folder: Path) -> bool:
    """Whether `save` wrote this folder: it has an `atlas.json`."""
    return (folder / CHECKPOINT_FILE).is_file()


def save(
    folder: Path,
    weights: Weights,
    resume_state: ResumeState | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    check: Callable[[], object] | None = None,
) -> None:
    """Writes a checkpoint folder atomically (synced, renamed), replacing an existing one. `check`: see `atomic_folder`.

    Parameters that are still in files are streamed, never all in memory. Calls `on_bytes(count)` after each chunk.

    A collective call: each process writes its own shards, and process 0 everything else. If any process cannot write,
    all processes raise UserError and no folder appears.
    """
    trees: dict[str, Mapping[str, ArrayLike]] = {"params": weights.params}
    if resume_state:
        trees["training"] = resume_state.arrays
    arrays = {name: tree for name, tree in trees.items() if tree}
    group = process_group()
    with atomic_shared_folder(folder, REMEDY, CHANNEL, check) as draft:
        group.run_on_first(lambda: _create_trees(draft, folder, arrays), CHANNEL)
        local = {name: _local_arrays(tree, first_process=group.index == 0) for name, tree in arrays.items()}
        sums = group.run_on_all(lambda: _write_trees(draft, folder, local, on_bytes), CHANNEL)
        checksums: dict[str, Any] = {name: {} for name in trees}
        checksums |= {
            name: combine_checksums(tree, [process_sums[name] for process_sums in sums])
            for name, tree in arrays.items()
        }
        group.run_on_first(lambda: _write_metadata(draft, folder, weights, resume_state, checksums), CHANNEL)
    group.run_on_first(lambda: fsync(folder.parent), CHANNEL)


def _create_trees(draft: Path, folder: Path, arrays: Mapping[str, Mapping[str, ArrayLike]]) -> None:
    check_free_space(draft, folder, sum(array.nbytes for tree in arrays.values() for array in tree.values()))
    with user_errors_on_write(folder):
        for name, tree in arrays.items():
            create_arrays(draft / name, tree)


def _write_trees(
    draft: Path, folder: Path, arrays: Mapping[str, Mapping[str, ArrayLike]], on_bytes: Callable[[int], object]
) -> dict[str, PartialSums]:
    with user_errors_on_write(folder):
        return {name: write_arrays(draft / name, tree, on_bytes) for name, tree in arrays.items()}


def _write_metadata(
    draft: Path, folder: Path, weights: Weights, resume_state: ResumeState | None, checksums: dict[str, Any]
) -> None:
    """Writes everything but the arrays, and syncs all files and folders to disk."""
    with user_errors_on_write(folder):
        for name, tokenizer in (("reader", weights.tokenizer), ("retriever", weights.retriever_tokenizer)):
            if tokenizer:
                tokenizer.save(draft / name)
    if resume_state:
        write_json(draft / TRAINING_FILE, resume_state.metadata)
        checksums = checksums | {TRAINING_FILE: _file_checksum(draft / TRAINING_FILE)}
    metadata = {"format": FORMAT, "step": weights.step, "index": weights.index, **_config_to_json(weights.cfg)}
    write_json(draft / CHECKPOINT_FILE, metadata | {"files": _file_sizes(draft), "checksums": checksums})
    fsync(*draft.rglob("*"), draft)


def _local_arrays(tree: Mapping[str, ArrayLike], *, first_process: bool) -> dict[str, ArrayLike]:
    """Selects the arrays that this process writes: sharded ones (its own shards), and on process 0 all others."""
    return {name: array for name, array in tree.items() if first_process or isinstance(array, LocalShards)}


def check_free_space(draft: Path, folder: Path, needed: int) -> None:
    """UserError if the disk has fewer than `needed` bytes left: checked before anything is written."""
    free = shutil.disk_usage(draft).free
    if needed > free:
        raise UserError(f"{folder}: needs {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are left there; {REMEDY}")


@contextlib.contextmanager
def user_errors_on_write(folder: Path) -> Iterator[None]:
    """Converts exceptions of libraries that write to UserError; re-raises UserError unchanged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax, TensorStore and tokenizers raise every kind
        raise UserError(f"{folder}: cannot be written ({first_line(error)}); {REMEDY}") from None


def load_config(folder: Path) -> tuple[AtlasConfig, int]:
    """Reads a checkpoint's model configuration and step, but no arrays."""
    path = folder / CHECKPOINT_FILE
    metadata = read_json(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}, this program reads {FORMAT}; use its release")
    try:
        reader = T5Config(**metadata["reader"]) if metadata["reader"] else None
        retriever = ContrieverConfig(**metadata["retriever"]) if metadata["retriever"] else None
        cfg, step = AtlasConfig(reader, retriever, untied=metadata["untied"]), metadata["step"]
        if type(step) is not int:
            raise TypeError(f"step {step!r}")
        return cfg, step
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); write the checkpoint again") from None


def load(folder: Path) -> Weights:
    """Reads a checkpoint into memory; UserError if anything is missing, of another shape or not what was saved."""
    return open_checkpoint(folder).load()


def open_checkpoint(folder: Path) -> Weights:
    """Opens a checkpoint; its arrays are read and verified when they are used. UserError as in `load`."""
    cfg, step = load_config(folder)
    _check_file_sizes(folder)
    try:
        expected = param_shapes(cfg)
    except Exception as error:  # invalid field values
        raise UserError(
            f"{folder / CHECKPOINT_FILE}: damaged ({first_line(error)}); write the checkpoint again"
        ) from None
    index = _metadata_field(folder, "index", str | None)
    params = _open_tree(folder, "params", expected)
    retriever_tokenizer = Tokenizer.load(folder / "retriever") if cfg.retriever else None
    return Weights(params, cfg, _load_reader_tokenizer(folder / "reader"), retriever_tokenizer, step, index)


def _load_reader_tokenizer(folder: Path) -> Tokenizer:
    """The reader's tokenizer, with one line in the log if an older version saved it, whose ids were others."""
    tokenizer = Tokenizer.load(folder, clean_up=False)
    if not tokenizer.configures_clean_up:
        logger.warning(
            "%s: saved by an older version, whose token ids can differ from the reference's; the checkpoint goes on "
            "unchanged; to get the reference's ids, convert the published weights again with atlas convert",
            folder,
        )
    return tokenizer


def load_resume_state(folder: Path) -> ResumeState | None:
    """Opens a training run's resume state without reading its arrays, or returns None; UserError if it is damaged."""
    _check_file_sizes(folder)
    checksums = _metadata_field(folder, "checksums", dict)
    if "training" not in checksums:
        return None
    if checksums.get(TRAINING_FILE) != _file_checksum(folder / TRAINING_FILE):
        raise damaged_error(folder / TRAINING_FILE)
    arrays = _open_tree(folder, "training") if checksums["training"] else {}  # empty trees are not written
    return ResumeState(arrays, read_json(folder / TRAINING_FILE))


def remove_moments(folder: Path) -> None:
    """Removes the training arrays of a complete checkpoint, which resuming needs and its weights do not.

    A process that is killed meanwhile leaves a complete checkpoint.
    """
    metadata = read_json(folder / CHECKPOINT_FILE)
    files = {name: size for name, size in metadata["files"].items() if not name.startswith("training/")}
    write_json(
        folder / CHECKPOINT_FILE, metadata | {"files": files, "checksums": metadata["checksums"] | {"training": {}}}
    )
    fsync(folder / CHECKPOINT_FILE, folder)
    shutil.rmtree(folder / "training", ignore_errors=True)


def has_optimizer(folder: Path) -> bool:
    """True if the checkpoint holds optimizer moments; a finished run may have saved its weights only."""
    checksums = read_json(folder / CHECKPOINT_FILE).get("checksums")
    training = checksums.get("training") if isinstance(checksums, dict) else None
    return isinstance(training, dict) and any(name.startswith(("reader/", "retriever/")) for name in training)


def _open_tree(folder: Path, tree: str, expected: Mapping[str, Any] | None = None) -> dict[str, StoredArray]:
    """Opens the arrays of one Orbax folder; UserError unless they have the `expected` names and shapes, if given."""
    arrays = open_arrays(folder / tree, _metadata_field(folder, "checksums", dict).get(tree, {}))
    if expected is not None:
        shapes, expected_shapes = (
            {name: tuple(array.shape) for name, array in named.items()} for named in (arrays, expected)
        )
        for name in sorted(shapes | expected_shapes):
            if shapes.get(name) != expected_shapes.get(name):
                difference = f"{name} is {shapes.get(name)}, not {expected_shapes.get(name)}"
                raise UserError(f"{folder}/{tree}: damaged or incomplete ({difference}); write it again")
    return arrays


def _file_checksum(path: Path) -> str:
    return checksum(np.fromfile(path, np.uint8))


def _file_sizes(folder: Path) -> dict[str, int]:
    """Returns the sizes in bytes of all array files and of `training.json`, by path relative to the folder."""
    files = [folder / TRAINING_FILE, *(path for tree in TREES for path in (folder / tree).rglob("*"))]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files) if path.is_file()}


def _check_file_sizes(folder: Path) -> None:
    """UserError if a file is missing or has another size.

    Finds broken copies before TensorStore reads them, which would print tracebacks of its threads to stderr.
    """
    sizes = _file_sizes(folder)
    for name, size in _metadata_field(folder, "files", dict).items():
        if sizes.get(name) != size:
            problem = f"{sizes[name]} bytes, not {size}" if name in sizes else "missing"
            raise UserError(f"{folder}/{name}: {problem}; copy the checkpoint again")


def _metadata_field(folder: Path, name: str, kind: type | UnionType) -> Any:
    """Reads a field of `atlas.json`; UserError if it is missing or of another type."""
    path = folder / CHECKPOINT_FILE
    metadata = read_json(path)
    if name not in metadata or not isinstance(metadata[name], kind):
        raise UserError(f"{path}: damaged ({name!r}); write the checkpoint again")
    return metadata[name]


def _config_to_json(cfg: AtlasConfig) -> dict[str, Any]:
    models = {"reader": cfg.reader, "retriever": cfg.retriever}
    return {
        "untied": cfg.untied,
        **{name: _model_to_json(model_cfg) if model_cfg else None for name, model_cfg in models.items()},
    }


def _model_to_json(cfg: T5Config | ContrieverConfig) -> Mapping[str, Any]:
    return {key: value for key, value in dataclasses.asdict(cfg).items() if key not in RUN_FIELDS}
