"""The index of a run: searched with the retriever of today, built by the retriever of some step before."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from atlas_jax.checkpoints.restore import retriever_fingerprint
from atlas_jax.checkpoints.weights import build_model
from atlas_jax.config import Config
from atlas_jax.errors import UserError
from atlas_jax.mesh import put_parameter, to_host
from atlas_jax.models.atlas import Atlas
from atlas_jax.retrieval.passage_index import is_index_of
from atlas_jax.retrieval.passage_retriever import PassageRetriever
from atlas_jax.retrieval.passage_source import PassageSource, RetrievedPassages, RowPassages
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.lazy_array import ArrayLike, read
from atlas_jax.tasks import Example
from atlas_jax.training.resume import INDEX, Start

logger = logging.getLogger(__name__)

PASSAGE_ENCODER = ("retriever/encoder/", "retriever/passage_encoder/")


class RefreshableIndex:
    """Finds passages for training and evaluation; builds the index again when the schedule says so.

    Without a retriever the passages come with the rows.
    """

    def __init__(self, config: Config, start: Start, mesh: Mesh, scratch: Path):
        self.config = config
        self.fingerprint: str | None = None  # of the encoder that built the index
        self.loaded: str | None = None  # the same of the one in --load_index_path
        self._built: dict[str, np.ndarray] = {}  # that encoder, where a later run could not have it from elsewhere
        self._finder = self._open(start, mesh, scratch) if start.weights.cfg.retriever else None
        self.source: PassageSource = self._finder.source if self._finder else RowPassages()
        self._n = config.passages_a_query
        if self._finder:
            self._check_count(len(self._finder.library.passages))

    def start(self, model: Atlas, examples: Sequence[Example]) -> Callable[[], RetrievedPassages]:
        """Begins to look for the passages that a step learns from; calling the result waits for them."""
        self.update(model)
        return self.source.start(examples, self._n)

    def update(self, model: Atlas) -> None:
        """Takes the retriever's present parameters."""
        if self._finder and model.retriever:
            self._finder.update(model.retriever)

    @property
    def searches(self) -> bool:
        """Whether finding passages takes the devices."""
        return self._finder is not None

    @property
    def waits(self) -> bool:
        """Whether `start` itself waits for the devices."""
        return self.config.retrieval.retrieve_with_rerank

    def is_due(self, step: int) -> bool:
        """Whether it is time to `refresh`, before the step after `step`."""
        return self._finder is not None and is_due(self.config, step)

    def refresh(self, model: Atlas, params: dict[str, Array]) -> None:
        """Embeds all passages again."""
        assert self._finder is not None
        encoder = passage_encoder(params)
        self.update(model)
        fingerprint = retriever_fingerprint(encoder)
        self._finder.rebuild(fingerprint)
        self.fingerprint, self._built = fingerprint, encoder

    def arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold so that the same index can be built from it."""
        return {INDEX + path: array for path, array in self._built.items()}

    def _open(self, start: Start, mesh: Mesh, scratch: Path) -> PassageRetriever:
        weights, before, config = start.weights, start.progress, self.config
        self._built = start.index_params
        encoder = self._built or passage_encoder(weights.params)
        cfg = dataclasses.replace(weights.cfg, reader=None)
        model = build_model({**weights.params, **encoder}, cfg, functools.partial(put_parameter, mesh))
        kept = before.index is not None and process_group().run_on_first(
            lambda: is_index_of(config.index.save_index_path, before.index or "")
        )
        if kept:  # as the run left it
            index = dataclasses.replace(config.index, load_index_path=config.index.save_index_path)
            config = dataclasses.replace(config, index=index)
        fingerprints = [retriever_fingerprint(encoder), before.index, before.loaded, weights.index]
        assert model.retriever is not None
        assert weights.retriever_tokenizer is not None
        finder = PassageRetriever(
            config, model.retriever, weights.retriever_tokenizer, mesh, scratch, [one for one in fingerprints if one]
        )
        if self.config.index.load_index_path:
            self.loaded = before.loaded or finder.library.retriever
            if self._built and not kept:  # loaded, and built again since
                finder.rebuild(fingerprints[0] or "")
        elif start.resume_state is None and trains_passage_encoder(config):
            self._built = encoder
        self.fingerprint = finder.library.retriever
        finder.prepare(weights.tokenizer)
        return finder

    def _check_count(self, count: int) -> None:
        retrieval = self.config.retrieval
        if self._n > count:
            raise UserError(f"--retriever_n_context {self._n}: the index holds {count} passages; ask for no more")
        candidates = retrieval.n_to_rerank_with_retrieve_with_rerank
        if retrieval.retrieve_with_rerank and self._n > candidates:
            raise UserError(f"--n_to_rerank_with_retrieve_with_rerank {candidates}: must be at least {self._n}")


def trains_passage_encoder(config: Config) -> bool:
    """Whether training changes how passages are embedded."""
    return config.distill.train_retriever and not config.retrieval.query_side_retriever_training


def trains_retriever(config: Config, step: int) -> bool:
    """Whether the retriever learns in a step, perhaps adding to a sum of gradients only."""
    return config.distill.train_retriever and step > config.distill.freeze_retriever_steps


def is_due(config: Config, step: int) -> bool:
    """Whether --refresh_index wants a new index before the step after `step`.

    Reference: never during --freeze_retriever_steps. It also would where the passage encoder does not learn.
    """
    if not trains_passage_encoder(config) or step == 0 or step < config.distill.freeze_retriever_steps:
        return False
    for start, end, every in config.distill.refresh_schedule:
        if start <= step < end:
            return (step - start) % every == 0
    return False


def passage_encoder(params: Mapping[str, ArrayLike | Array]) -> dict[str, np.ndarray]:
    """Copies of what embeds passages, on the host."""
    encoder = {path: array for path, array in params.items() if path.startswith(PASSAGE_ENCODER)}
    return {path: to_host(x) if isinstance(x, Array) else np.array(read(x)) for path, x in encoder.items()}
