"""What the next step learns from: its examples, the passages that the retriever finds for them, arrays of both."""

from collections.abc import Callable
from typing import NamedTuple

from atlas_jax.config import Config
from atlas_jax.models.atlas import Atlas
from atlas_jax.runtime.prefetch import prefetch
from atlas_jax.training.batches import TrainingBatcher, TrainingExamples
from atlas_jax.training.clock import Clock, Seconds
from atlas_jax.training.index_refresh import RefreshableIndex, is_due, trains_retriever
from atlas_jax.training.step import Batch


class ReadyBatch(NamedTuple):
    """What a step learns from, and what that has cost so far."""

    batch: Batch
    seconds: Seconds


class Lookahead:
    """One batch after another, from a position in the data on."""

    def __init__(
        self,
        config: Config,
        examples: TrainingExamples,
        index: RefreshableIndex,
        batches: TrainingBatcher,
        clock: Clock,
        position: int,
    ):
        self._config, self._index, self._batches, self._clock = config, index, batches, clock
        self._examples = prefetch(examples.batches(position, batches.size, batches.own))

    def begin(self, model: Atlas, step: int) -> Callable[[], ReadyBatch]:
        """Begins to find the passages of the next step; calling the result waits for them and makes its arrays."""
        seconds: Seconds = {}
        with self._clock(seconds, "retrieve"):
            examples = next(self._examples)
            find = self._index.start(model, examples)

        def arrange() -> ReadyBatch:
            with self._clock(seconds, "retrieve"):
                found = find()
            with self._clock(seconds, "batch"):
                return ReadyBatch(
                    self._batches(examples, found, retriever=trains_retriever(self._config, step)), seconds
                )

        return arrange

    def close(self) -> None:
        """No more will be asked for."""
        self._examples.close()


def can_look_ahead(config: Config, step: int) -> bool:
    """Whether the step after `step` searches with the retriever, and in the index, that `step` begins with."""
    changes = trains_retriever(config, step) and step % config.optim.accumulation_steps == 0
    return not changes and not is_due(config, step)
