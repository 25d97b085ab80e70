"""What a step learns from: examples in order, and with their passages as arrays for both models."""

import bisect
import itertools
from collections.abc import Container, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from atlas_jax.config import Config
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.data.order import Order
from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.evaluation.batches import ReaderBatcher
from atlas_jax.mesh import ArrayOrShape, global_batch_size, put_batch, put_passages
from atlas_jax.models.fid import ReaderBatch
from atlas_jax.retrieval.passage_source import RetrievedPassages
from atlas_jax.runtime.process_group import process_group
from atlas_jax.tasks import Example, Task
from atlas_jax.training.step import Batch, RetrieverBatch

ELSEWHERE = Example(query="", target=None, answers=[])  # an example that another process reads


class TrainingExamples:
    """The examples of all training files, in the order of training: a pure function of the position."""

    def __init__(self, config: Config, task: Task, files: Sequence[JsonlRows], tokenizer: Tokenizer):
        self._task, self._files, self._tokenizer = task, files, tokenizer
        self._starts = list(itertools.accumulate(map(len, files), initial=0))
        self._rows = self._starts[-1]
        self.order = Order(self._rows * task.per_row, config.run.seed, shuffle=config.run.shuffle)

    def __getitem__(self, position: int) -> Example:
        epoch, number = self.order[position]
        row, which = divmod(number, self._task.per_row)
        file = bisect.bisect_right(self._starts, row) - 1
        found = self._files[file][row - self._starts[file]]
        return self._task.examples(found, epoch * self._rows + row, self._tokenizer)[which]

    def batches(self, position: int, size: int, own: Container[int]) -> Iterator[list[Example]]:
        """Endless, from a position on; of rows that are not this process's own nothing is read."""
        for start in itertools.count(position, size):
            yield [self[start + row] if row in own else ELSEWHERE for row in range(size)]


class TrainingBatcher:
    """Makes the arrays of a step. All texts of a batch are padded to one length, so a length is a program."""

    def __init__(self, config: Config, tokenizer: Tokenizer, retriever_tokenizer: Tokenizer | None, mesh: Mesh):
        self.size = global_batch_size(mesh, config.run.per_gpu_batch_size)
        self._text, self._mesh = config.text, mesh
        self._reader = ReaderBatcher(config.text, tokenizer, mesh, self.size)
        self.own = frozenset(self._reader.own.tolist())
        self._retriever_tokenizer = retriever_tokenizer

    def __call__(self, examples: Sequence[Example], found: RetrievedPassages, *, retriever: bool) -> Batch:
        """With the retriever's side where it learns."""
        n = found.numbers.shape[1]
        local_examples, found = self._reader.local_examples(examples, found)
        queries = [example.query for example in local_examples]
        prompts, passages = self._reader.prompts(queries), self._reader.passages(queries, found)
        sides = self._retriever_ids(queries, found) if retriever else ([], [])
        (longest,) = process_group().all_max(max(map(len, [*passages, *sides[0], *sides[1]])))
        length = bucket(longest, self._text.text_maxlength)
        read = self._reader.batch(local_examples, passages, prompts, length, n)
        of_queries = np.asarray([min(len(ids), length) for ids in self._reader.tokenizer.ids(queries)], np.int32)
        if self._retriever_tokenizer is None or not retriever:
            return put_training_batch(self._mesh, read, of_queries, rows=self.size)
        shorter = min(length, self._text.retriever_maxlength)
        asked, given = (pad(ids, shorter, self._retriever_tokenizer.pad_id) for ids in sides)
        passages_too = [array.reshape(len(local_examples), n, shorter) for array in given]
        return put_training_batch(self._mesh, read, of_queries, *asked, *passages_too, rows=self.size)

    def _retriever_ids(
        self, queries: Sequence[str], found: RetrievedPassages
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The retriever's ids of the queries, and of their passages, row after row."""
        tokenizer = self._retriever_tokenizer
        assert tokenizer is not None
        stored = found.store.tokens(tokenizer, self._format, "retriever").take(found.numbers.reshape(-1))
        longest = self._text.retriever_maxlength
        return (
            [tokenizer.finish(ids, longest) for ids in tokenizer.ids(list(queries))],
            [tokenizer.finish(np.asarray(ids), longest) for ids in stored],
        )

    @property
    def _format(self) -> str:
        return self._text.retriever_format


def put_training_batch(
    mesh: Mesh, read: ReaderBatch, query_lengths: ArrayOrShape, *sides: ArrayOrShape, rows: int | None = None
) -> Batch:
    """The arrays on the devices; `sides` are the retriever's queries and passages, if it learns, each with its mask."""
    lengths = put_batch(mesh, query_lengths, rows)
    if not sides:
        return Batch(read, lengths, None)
    queries = (put_batch(mesh, array, rows) for array in sides[:2])
    passages = (put_passages(mesh, array, rows) for array in sides[2:])
    return Batch(read, lengths, RetrieverBatch(*queries, *passages))
