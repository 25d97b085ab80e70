"""What a run starts from: an Atlas checkpoint, ours or the published `model.pth.tar`, or a T5 and an encoder."""

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
from atlas_jax.checkpoints.pretrained import folder_weights, reader_config, retriever_config, weights_file
from atlas_jax.checkpoints.store import Weights
from atlas_jax.checkpoints.weights import is_untied, map_weights, strip_module_prefix
from atlas_jax.config import Config
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.mesh import in_host_memory, is_matrix, is_single_cpu, put_parameter
from atlas_jax.models.atlas import AtlasConfig, AtlasModel, build_model
from atlas_jax.storage.lazy_array import ArrayLike, read

logger = logging.getLogger(__name__)

PUBLISHED = "model.pth.tar"


def restore(config: Config) -> Weights:
    """The weights that `--model_path` names, or else those of `--reader_model_type` and `--retriever_model_path`.

    Only the retriever's are in memory: of a large reader a process needs its devices' share.
    """
    path = config.weights_folder
    weights = _used(open_weights(config), config)
    if not (weights.cfg.retriever or config.retrieval.use_file_passages):
        raise UserError(f"{path}: has no retriever; pass --use_file_passages or --closed_book, or take another")
    if not (weights.cfg.reader or config.retrieval.retrieve_only):
        raise UserError(f"{path}: has no reader; pass --retrieve_only, or take another")
    loaded = weights.load("retriever/")
    if config.retrieval.query_side_retriever_training:
        loaded = _untied(loaded)
    count = sum(array.size for array in loaded.params.values())
    logger.info("%s: %.1f million parameters, step %d", path or "no trained weights", count / 1e6, loaded.step)
    return loaded


def open_weights(config: Config) -> Weights:
    """All that is there of what `restore` loads, unread: names and shapes are known to be right, and nothing else."""
    path = config.weights_folder
    if path is None:
        return _fresh(config)
    if store.is_checkpoint(path):
        return _ours(path, config)
    if (path / PUBLISHED).is_file():
        return _published(path / PUBLISHED, config)
    raise UserError(f"{path}: neither {PUBLISHED} nor a checkpoint of ours (atlas.json) in this folder")


def model_shapes(config: Config) -> AtlasConfig:
    """Those of the weights, before anything else of them is read; whether they are `untied` is not known yet."""
    path = config.weights_folder
    if path and store.is_checkpoint(path):
        return store.load_config(path)[0]
    return _shapes(config, untied=False)


def retriever_fingerprint(params: Mapping[str, ArrayLike]) -> str:
    """What tells one passage encoder from another: a digest of its parameters, whatever file they came from."""
    digest = hashlib.sha256()
    encoders = sorted(path for path in params if re.match(r"retriever/(passage_)?encoder/", path))
    for path in encoders:
        digest.update(path.split("encoder/", 1)[1].encode())
        digest.update(np.ascontiguousarray(read(params[path]), np.float32).tobytes())
    return digest.hexdigest()


def _shapes(config: Config, *, untied: bool) -> AtlasConfig:
    return AtlasConfig(
        reader_config(config.model.reader_model_type),
        None if config.retrieval.use_file_passages else retriever_config(config.model.retriever_model_path),
        untied,
    )


def _tokenizers(config: Config) -> tuple[Tokenizer, Tokenizer | None]:
    no_retriever = config.retrieval.use_file_passages
    return (
        Tokenizer.load(config.model.reader_model_type),
        None if no_retriever else Tokenizer.load(config.model.retriever_model_path),
    )


def open_published(file: Path) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of the reference's checkpoint by name, views of the file, and its step.

    It is read without PyTorch and without running its pickle; UserError if it is none.
    """
    found: Any = load_torch(file)
    model, step = (found.get("model"), found.get("step", 0)) if isinstance(found, Mapping) else (None, 0)
    if not isinstance(model, Mapping) or not all(isinstance(array, np.ndarray) for array in model.values()):
        raise UserError(f"{file}: holds no `model` of named tensors; is this an Atlas checkpoint?")
    if type(step) is not int:
        raise UserError(f"{file}: its `step` is {step!r:.40}, no whole number; is this an Atlas checkpoint?")
    return strip_module_prefix({str(name): array for name, array in model.items()}), step


def _published(file: Path, config: Config) -> Weights:
    source, step = open_published(file)
    if config.retrieval.use_file_passages:
        source = {name: array for name, array in source.items() if not name.startswith("retriever.")}
    cfg = _shapes(config, untied=is_untied(source))
    tokenizers = _tokenizers(config)  # before the minutes that weights take
    return Weights(map_weights(source, cfg, where=str(file)), cfg, *tokenizers, step=step)


def _ours(folder: Path, config: Config) -> Weights:
    """Our checkpoint; a shape that `--reader_model_type` contradicts is an error."""
    found = store.load_config(folder)[0].reader
    if config.model.reader_model_type:
        asked = reader_config(config.model.reader_model_type)
        fields = [field.name for field in dataclasses.fields(asked)]
        differing = [name for name in fields if getattr(found, name, None) != getattr(asked, name)]
        if differing:
            said = ", ".join(
                f"{name} is {getattr(found, name, None)}, not {getattr(asked, name)}" for name in differing
            )
            raise UserError(
                f"{folder}: its reader is not --reader_model_type {config.model.reader_model_type}: {said}; "
                "leave the flag out or name the right one"
            )
    return store.open_checkpoint(folder)


def _fresh(config: Config) -> Weights:
    """A T5 and an encoder that never met; a part without weights is random."""
    cfg = _shapes(config, untied=False)
    tokenizers = _tokenizers(config)
    params: dict[str, ArrayLike] = {}
    if not config.retrieval.retrieve_only:
        part = AtlasConfig(cfg.reader, None)
        params |= _part(config.model.reader_model_type, "reader.", part, config.run.seed)
    if cfg.retriever:
        part = AtlasConfig(None, cfg.retriever)
        params |= _part(config.model.retriever_model_path, "retriever.contriever.", part, config.run.seed)
    return Weights(params, cfg, *tokenizers)


def _part(name: str, prefix: str, cfg: AtlasConfig, seed: int) -> Mapping[str, ArrayLike]:
    """One of the two models from a folder's own weights, else random."""
    source = folder_weights(name)
    if source is not None:
        named = {prefix + key: array for key, array in source.items()}
        return map_weights(named, cfg, where=str(weights_file(name)))
    with in_host_memory():
        flat = nnx.to_flat_state(nnx.state(AtlasModel(cfg, rngs=nnx.Rngs(seed)), nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def _used(weights: Weights, config: Config) -> Weights:
    """Without the part that this run does not use."""
    cfg = weights.cfg
    if config.retrieval.retrieve_only:
        cfg = dataclasses.replace(cfg, reader=None)
    if config.retrieval.use_file_passages:
        cfg = dataclasses.replace(cfg, retriever=None)
    used = [part for part in ("reader", "retriever") if getattr(cfg, part)]
    params = {path: array for path, array in weights.params.items() if path.split("/")[0] in used}
    return dataclasses.replace(weights, params=params, cfg=cfg)


def _untied(weights: Weights) -> Weights:
    """With an encoder each for queries and passages; equal ones, where there was one for both."""
    params = {
        path.replace("retriever/encoder/", f"retriever/{side}_encoder/"): array
        for path, array in weights.params.items()
        for side in ("query", "passage")
    }
    return dataclasses.replace(weights, params=params, cfg=dataclasses.replace(weights.cfg, untied=True))


def compute_dtype(config: Config) -> Any:
    """What --precision means for matrix products and residuals."""
    return {"bf16": jnp.bfloat16, "fp32": jnp.float32}[config.model.precision]


def place_on_mesh(weights: Weights, config: Config, mesh: Mesh) -> AtlasModel:
    """The model on the mesh in --precision: matrices in the compute type, norms and biases in float32."""
    dtype = compute_dtype(config)

    def put(path: str, array: ArrayLike) -> jax.Array:
        placed: jax.Array = put_parameter(mesh, path, array, dtype if is_matrix(path) else None)
        return placed

    model = build_model(weights.params, weights.cfg.computing(dtype=dtype, for_cpu=is_single_cpu(mesh)), put)
    verify_shards(weights.params)
    return model
