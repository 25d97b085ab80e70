"""Restores the weights a run starts from: our checkpoint, the published `model.pth.tar`, or a T5 and an encoder."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.formats.orbax_arrays import verify_shards
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.pretrained import (
    check_weights,
    folder_weights,
    reader_config,
    retriever_config,
    weights_file,
)
from atlas_jax.checkpoints.store import Weights
from atlas_jax.checkpoints.weights import is_untied, map_weights, strip_module_prefix
from atlas_jax.config import Config, ModelConfig, RetrievalConfig, TaskName
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.mesh import in_host_memory, is_single_cpu, put_parameter, uses_compute_dtype
from atlas_jax.models.atlas import AtlasConfig, AtlasModel, build_model
from atlas_jax.storage.lazy_array import ArrayLike, read

logger = logging.getLogger(__name__)

PUBLISHED = "model.pth.tar"
NOT_FINITE_REMEDY = "they are damaged or of a run that diverged; take an earlier checkpoint, or another --precision"


def restore(config: Config) -> Weights:
    """Returns the weights of `--model_path`, or else of `--reader_model_type` and `--retriever_model_path`.

    Only the retriever's are in memory: of a large reader a process needs only its devices' shards. UserError if the
    weights lack a model that the run uses.
    """
    folder = config.weights_folder
    weights = _drop_unused_models(open_weights(config), config.retrieval)
    if not (weights.cfg.retriever or config.retrieval.use_file_passages):
        without = "" if config.retrieval.retrieve_only else ", or pass --use_file_passages or --closed_book"
        raise UserError(f"{folder}: has no retriever; take a checkpoint that has one{without}")
    if not (weights.cfg.reader or config.retrieval.retrieve_only):
        raise UserError(f"{folder}: has no reader; take a checkpoint that has one, or use evaluate --retrieve_only")
    check_tokenizers(weights, config.task.task)
    loaded = weights.load("retriever/")
    if config.retrieval.query_side_retriever_training:
        loaded = _untie_encoders(loaded)
    count = sum(array.size for array in loaded.params.values())
    source = folder or ("random weights" if config.model.random_weights else "pretrained weights")
    logger.info("%s: %.1f million parameters, step %d", source, count / 1e6, loaded.step)
    return loaded


def check_tokenizers(weights: Weights, task: TaskName) -> None:
    """UserError unless the models embed all ids of their tokenizers, and the reader's has the tokens of the task."""
    sizes = {"reader": weights.cfg.reader, "retriever": weights.cfg.retriever}
    tokenizers = {"reader": weights.tokenizer, "retriever": weights.retriever_tokenizer}
    for name, tokenizer in tokenizers.items():
        rows = getattr(sizes[name], "vocab_size", None)
        if tokenizer and rows is not None and tokenizer.vocab_size > rows:
            raise UserError(
                f"the {name}'s tokenizer has {tokenizer.vocab_size} ids, but its model embeds {rows}; take both from "
                "one folder"
            )
    special = ["</s>", *(["<extra_id_0>"] if task != "base" else [])]
    for token, ids in zip(special, weights.tokenizer.ids(special), strict=True):
        if weights.cfg.reader and len(ids) != 1:
            raise UserError(f"the reader's tokenizer has no token {token}, which --task {task} needs; take a T5's")


def open_weights(config: Config) -> Weights:
    """Opens the weights that `restore` loads, without reading arrays: names and shapes are checked, values are not.

    Models that the run does not use are included where the folder has them.
    """
    folder = config.weights_folder
    if folder is None:
        return _open_pretrained(config)
    if store.is_checkpoint(folder):
        return _open_checkpoint(folder, config.model.reader_model_type)
    if (folder / PUBLISHED).is_file():
        return _open_reference(folder / PUBLISHED, config)
    raise UserError(f"{folder}: neither {PUBLISHED} nor a checkpoint of ours (atlas.json) in this folder")


def model_config(config: Config) -> AtlasConfig:
    """Returns the configs of the models without reading weights; `untied` is False unless it is known already."""
    folder = config.weights_folder
    if folder and store.is_checkpoint(folder):
        return store.load_config(folder)[0]
    return _model_config(config, untied=False)


def retriever_fingerprint(params: Mapping[str, ArrayLike]) -> str:
    """Returns a SHA-256 digest of the passage encoder's parameters, which does not depend on the file format."""
    digest = hashlib.sha256()
    encoder_paths = sorted(path for path in params if re.match(r"retriever/(passage_)?encoder/", path))
    for path in encoder_paths:
        digest.update(path.split("encoder/", 1)[1].encode())
        digest.update(np.ascontiguousarray(read(params[path]), np.float32).tobytes())
    return digest.hexdigest()


def _model_config(config: Config, *, untied: bool) -> AtlasConfig:
    no_retriever = config.retrieval.use_file_passages
    return AtlasConfig(
        reader_config(config.model.reader_model_type, fetch=True),
        None if no_retriever else retriever_config(config.model.retriever_model_path, fetch=True),
        untied,
    )


def _load_tokenizers(config: Config) -> tuple[Tokenizer, Tokenizer | None]:
    no_retriever = config.retrieval.use_file_passages
    return (
        Tokenizer.load(config.model.reader_model_type),
        None if no_retriever else Tokenizer.load(config.model.retriever_model_path),
    )


def open_reference_arrays(file: Path) -> tuple[dict[str, np.ndarray], int]:
    """Returns the arrays of a reference checkpoint by name, as views of the file, and its step.

    Needs no PyTorch and does not run the pickle. UserError if the file is no Atlas checkpoint.
    """
    content: Any = load_torch(file)
    model, step = (content.get("model"), content.get("step", 0)) if isinstance(content, Mapping) else (None, 0)
    if not isinstance(model, Mapping) or not all(isinstance(array, np.ndarray) for array in model.values()):
        raise UserError(f"{file}: holds no `model` of named tensors; is this an Atlas checkpoint?")
    if type(step) is not int:
        raise UserError(f"{file}: its `step` is {step!r:.40}, no whole number; is this an Atlas checkpoint?")
    return strip_module_prefix({str(name): array for name, array in model.items()}), step


def _open_reference(file: Path, config: Config) -> Weights:
    source, step = open_reference_arrays(file)
    if config.retrieval.use_file_passages:
        source = {name: array for name, array in source.items() if not name.startswith("retriever.")}
    cfg = _model_config(config, untied=is_untied(source))
    tokenizers = _load_tokenizers(config)  # before the weights, which may take minutes: a missing one is an error
    return Weights(map_weights(source, cfg, where=str(file)), cfg, *tokenizers, step=step)


def _open_checkpoint(folder: Path, reader_model_type: str) -> Weights:
    """Opens one of our checkpoints; UserError if --reader_model_type names a reader of another shape."""
    reader = store.load_config(folder)[0].reader
    if reader_model_type:
        expected = reader_config(reader_model_type)
        fields = [field.name for field in dataclasses.fields(expected)]
        differing = [name for name in fields if getattr(reader, name, None) != getattr(expected, name)]
        if differing:
            differences = ", ".join(
                f"{name} is {getattr(reader, name, None)}, not {getattr(expected, name)}" for name in differing
            )
            raise UserError(
                f"{folder}: its reader is not --reader_model_type {reader_model_type}: {differences}; "
                "leave the flag out or name the right one"
            )
    return store.open_checkpoint(folder)


def _open_pretrained(config: Config) -> Weights:
    """Opens a pretrained T5 and a pretrained encoder, or with --random_weights draws the parameters of both."""
    model, seed = config.model, config.run.seed
    names = {} if config.retrieval.retrieve_only else {"reader.": model.reader_model_type}
    if not config.retrieval.use_file_passages:
        names["retriever.contriever."] = model.retriever_model_path
    if not model.random_weights:
        for name in names.values():
            check_weights(name)  # before either is downloaded, which may take hours
    cfg = _model_config(config, untied=False)
    tokenizers = _load_tokenizers(config)
    params: dict[str, ArrayLike] = {}
    for prefix, name in names.items():
        is_reader = prefix == "reader."
        part = AtlasConfig(cfg.reader if is_reader else None, None if is_reader else cfg.retriever)
        params |= _random_params(part, seed) if model.random_weights else _pretrained_params(name, prefix, part)
    return Weights(params, cfg, *tokenizers)


def _pretrained_params(name: str, prefix: str, cfg: AtlasConfig) -> Mapping[str, ArrayLike]:
    """Returns a model's parameters from the weights of a folder or of the hub."""
    named = {prefix + key: array for key, array in folder_weights(name).items()}
    return map_weights(named, cfg, where=str(weights_file(name) or name))


def _random_params(cfg: AtlasConfig, seed: int) -> Mapping[str, ArrayLike]:
    """Returns the parameters of a model that is not trained."""
    with in_host_memory():
        flat = nnx.to_flat_state(nnx.state(AtlasModel(cfg, rngs=nnx.Rngs(seed)), nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def _drop_unused_models(weights: Weights, retrieval: RetrievalConfig) -> Weights:
    """Returns a copy without the reader or the retriever if the run does not use it."""
    cfg = weights.cfg
    if retrieval.retrieve_only:
        cfg = dataclasses.replace(cfg, reader=None)
    if retrieval.use_file_passages:
        cfg = dataclasses.replace(cfg, retriever=None)
    models = [model for model in ("reader", "retriever") if getattr(cfg, model)]
    params = {path: array for path, array in weights.params.items() if path.split("/")[0] in models}
    return dataclasses.replace(weights, params=params, cfg=cfg)


def _untie_encoders(weights: Weights) -> Weights:
    """Returns a copy with separate query and passage encoders, which start equal if there was one for both."""
    params = {
        path.replace("retriever/encoder/", f"retriever/{side}_encoder/"): array
        for path, array in weights.params.items()
        for side in ("query", "passage")
    }
    return dataclasses.replace(weights, params=params, cfg=dataclasses.replace(weights.cfg, untied=True))


def compute_dtype(config: ModelConfig) -> Any:
    """Returns the dtype of matrix products and residuals that --precision names."""
    return {"bf16": jnp.bfloat16, "fp32": jnp.float32}[config.precision]


def place_on_mesh(weights: Weights, config: ModelConfig, mesh: Mesh) -> AtlasModel:
    """Builds the model with its parameters sharded over the mesh: matrices in the --precision dtype, others in float32.

    Each parameter keeps its path and global shape from `weights.params`, and `PARAM_SPECS` says how it is sharded. A
    collective call: UserError on every process if values read from a checkpoint are not those saved, or not finite.
    """
    dtype = compute_dtype(config)

    def place(path: str, array: ArrayLike) -> jax.Array:
        placed: jax.Array = put_parameter(mesh, path, array, dtype if uses_compute_dtype(path) else None)
        return placed

    model = build_model(weights.params, weights.cfg.with_computation(dtype=dtype, for_cpu=is_single_cpu(mesh)), place)
    verify_shards(weights.params)
    check_finite({"/".join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))})
    return model


def check_finite(params: Mapping[str, jax.Array]) -> None:
    """UserError if a parameter on the devices holds NaN or infinity; a collective call."""
    finite = jax.jit(lambda params: {path: jnp.isfinite(x).all() for path, x in params.items()})(params)
    if bad := [path for path, ok in finite.items() if not np.asarray(ok)]:
        raise UserError(f"the weights {', '.join(bad[:3])} hold NaN or infinity; {NOT_FINITE_REMEDY}")
