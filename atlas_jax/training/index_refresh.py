"""The index of a training run: searched with the current query encoder, rebuilt as --refresh_index says."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from atlas_jax.checkpoints.restore import retriever_fingerprint
from atlas_jax.config import Config
from atlas_jax.errors import UserError
from atlas_jax.mesh import put_parameter, to_host
from atlas_jax.models.atlas import AtlasModel, build_model
from atlas_jax.retrieval.passage_index import is_built_by
from atlas_jax.retrieval.passage_retriever import PassageRetriever
from atlas_jax.retrieval.passage_source import PassageSource, RetrievedPassages, RowPassages
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.lazy_array import ArrayLike, read
from atlas_jax.tasks import Example
from atlas_jax.training.resume import INDEX_PREFIX, RunStart

logger = logging.getLogger(__name__)

PASSAGE_ENCODER = ("retriever/encoder/", "retriever/passage_encoder/")


class RefreshableIndex:
    """The passages of a run: from an index that can be rebuilt, or, without a retriever, from the rows."""

    def __init__(self, config: Config, start: RunStart, mesh: Mesh, scratch: Path):
        self.config, self._scratch = config, scratch
        self.fingerprint: str | None = None  # of the passage encoder that built the index
        self.loaded_fingerprint: str | None = None  # of the encoder that built the index of --load_index_path
        self._index_encoder: dict[str, np.ndarray] = {}  # its parameters, if a resumed run cannot load them
        self._retriever = self._open(start, mesh) if start.weights.cfg.retriever else None
        self.source: PassageSource = self._retriever or RowPassages()
        self._n = config.passages_a_query
        if self._retriever:
            self._check_count(len(self._retriever.index.passages))

    def begin_retrieval(self, model: AtlasModel, examples: Sequence[Example]) -> Callable[[], RetrievedPassages]:
        """Starts to search the passages of a training step; the returned function waits for them."""
        self.update(model)
        return self.source.begin_retrieval(examples, self._n)

    def update(self, model: AtlasModel) -> None:
        """Replaces the retriever's parameters by those of `model`."""
        if self._retriever and model.retriever:
            self._retriever.update(model.retriever)

    @property
    def uses_devices(self) -> bool:
        """Whether retrieval runs on the devices."""
        return self._retriever is not None

    @property
    def begin_retrieval_blocks(self) -> bool:
        """Whether `begin_retrieval` waits for the devices before it returns."""
        return self.config.retrieval.retrieve_with_rerank

    def refresh(self, model: AtlasModel, params: Mapping[str, Array]) -> None:
        """Embeds all passages again with the current parameters, which `params` holds by path."""
        assert self._retriever is not None
        encoder = passage_encoder_params(params)
        self.update(model)
        fingerprint = retriever_fingerprint(encoder)
        self._retriever.rebuild(self.config, fingerprint, self._scratch)
        self.fingerprint, self._index_encoder = fingerprint, encoder

    def resume_arrays(self) -> dict[str, np.ndarray]:
        """The arrays that a checkpoint needs for a resumed run to rebuild the same index."""
        return {INDEX_PREFIX + path: array for path, array in self._index_encoder.items()}

    def _open(self, start: RunStart, mesh: Mesh) -> PassageRetriever:
        """Opens the index of the resumed run, else that of the flags; rebuilds it if it was refreshed and not saved."""
        weights, progress, config = start.weights, start.progress, self.config
        self._index_encoder = start.index_params
        encoder = self._index_encoder or passage_encoder_params(weights.params)
        cfg = dataclasses.replace(weights.cfg, reader=None)
        model = build_model({**weights.params, **encoder}, cfg, functools.partial(put_parameter, mesh))
        saved_is_current = progress.index is not None and process_group().run_on_first(
            lambda: is_built_by(config.index.save_index_path, progress.index or "")
        )
        if saved_is_current:
            index = dataclasses.replace(config.index, load_index_path=config.index.save_index_path)
            config = dataclasses.replace(config, index=index)
        accepted = [retriever_fingerprint(encoder), progress.index, progress.loaded, weights.index]
        assert model.retriever is not None
        assert weights.retriever_tokenizer is not None
        retriever = PassageRetriever.open(
            *(config, model.retriever, weights.retriever_tokenizer, mesh, self._scratch),
            [fingerprint for fingerprint in accepted if fingerprint],
        )
        if self.config.index.load_index_path:
            self.loaded_fingerprint = progress.loaded or retriever.index.fingerprint
            if self._index_encoder and not saved_is_current:  # the run has refreshed the index that it had loaded
                retriever.rebuild(self.config, accepted[0] or "", self._scratch)
        elif start.resume_state is None and trains_passage_encoder(config):
            self._index_encoder = encoder
        self.fingerprint = retriever.index.fingerprint
        retriever.tokenize_for_reader(config.text, weights.tokenizer)
        if config.distill.train_retriever:
            retriever.tokenize_for_retriever(config.text)
        return retriever

    def _check_count(self, count: int) -> None:
        retrieval = self.config.retrieval
        if self._n > count:
            raise UserError(f"--retriever_n_context {self._n}: the index holds {count} passages; ask for no more")
        candidates = retrieval.n_to_rerank_with_retrieve_with_rerank
        if retrieval.retrieve_with_rerank and self._n > candidates:
            raise UserError(f"--n_to_rerank_with_retrieve_with_rerank {candidates}: must be at least {self._n}")


def trains_passage_encoder(config: Config) -> bool:
    """Whether training changes the vectors of the passages."""
    return config.distill.train_retriever and not config.retrieval.query_side_retriever_training


def trains_retriever(config: Config, step: int) -> bool:
    """Whether a step computes gradients of the retriever."""
    return config.distill.train_retriever and step > config.distill.freeze_retriever_steps


def is_refresh_due(config: Config, step: int) -> bool:
    """Whether --refresh_index asks for a new index between `step` and the next one.

    Reference: never during --freeze_retriever_steps. Unlike it, also never if the passage encoder is not trained.
    """
    return trains_passage_encoder(config) and _is_scheduled(config, step)


def report_unused_refresh(config: Config) -> None:
    """Logs that nothing is refreshed, if --refresh_index asks for it and the passage encoder is not trained."""
    asked = any(_is_scheduled(config, step) for step in range(config.optim.total_steps))
    if asked and not trains_passage_encoder(config):
        query_side = config.retrieval.query_side_retriever_training
        cause = "with --query_side_retriever_training" if query_side else "without --train_retriever"
        flag = config.distill.refresh_index
        logger.info("--refresh_index %s: nothing is refreshed; the passage encoder does not change %s", flag, cause)


def _is_scheduled(config: Config, step: int) -> bool:
    if step == 0 or step < config.distill.freeze_retriever_steps:
        return False
    for start, end, every in config.distill.refresh_schedule:
        if start <= step < end:
            return (step - start) % every == 0
    return False


def passage_encoder_paths(params: Iterable[str]) -> list[str]:
    """The parameters that embed passages."""
    return [path for path in params if path.startswith(PASSAGE_ENCODER)]


def passage_encoder_params(params: Mapping[str, ArrayLike | Array]) -> dict[str, np.ndarray]:
    """Copies on the host of the parameters that embed passages, by path."""
    encoder = {path: params[path] for path in passage_encoder_paths(params)}
    return {path: to_host(x) if isinstance(x, Array) else np.array(read(x)) for path, x in encoder.items()}
