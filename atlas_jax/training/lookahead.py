"""Finds the passages of the next step while the devices compute the present one, where that changes nothing."""

from collections.abc import Callable
from typing import NamedTuple

from atlas_jax.config import Config
from atlas_jax.models.atlas import AtlasModel
from atlas_jax.runtime.prefetch import prefetch
from atlas_jax.training.batches import TrainingBatcher, TrainingExamples
from atlas_jax.training.clock import Clock, Seconds
from atlas_jax.training.index_refresh import RefreshableIndex, is_refresh_due, trains_retriever
from atlas_jax.training.step import Batch


class ReadyBatch(NamedTuple):
    """The arrays of a step, and the seconds spent on them so far."""

    batch: Batch
    seconds: Seconds


class Lookahead:
    """Makes one batch after another, in the order of the examples, from a position in that order on."""

    def __init__(
        self,
        config: Config,
        examples: TrainingExamples,
        index: RefreshableIndex,
        batcher: TrainingBatcher,
        clock: Clock,
        position: int,
    ):
        self._config, self._index, self._batcher, self._clock = config, index, batcher, clock
        self._examples = prefetch(examples.batches(position, batcher.size, batcher.local_rows))

    def begin(self, model: AtlasModel, step: int) -> Callable[[], ReadyBatch]:
        """Starts to search the passages of `step`, which must be the next one, with the parameters of `model`.

        The returned function waits for the passages and makes the arrays.
        """
        seconds: Seconds = {}
        with self._clock(seconds, "retrieve"):
            examples = next(self._examples)
            wait = self._index.begin_retrieval(model, examples)

        def finish() -> ReadyBatch:
            with self._clock(seconds, "retrieve"):
                retrieved = wait()
            with self._clock(seconds, "batch"):
                batch = self._batcher(examples, retrieved, retriever=trains_retriever(self._config, step))
                return ReadyBatch(batch, seconds)

        return finish

    def close(self) -> None:
        """Stops reading examples ahead."""
        self._examples.close()


def can_look_ahead(config: Config, step: int) -> bool:
    """Whether `step` changes neither query encoder nor index, so that step + 1 may be retrieved before it."""
    updates_retriever = trains_retriever(config, step) and step % config.optim.accumulation_steps == 0
    return not updates_retriever and not is_refresh_due(config, step)
