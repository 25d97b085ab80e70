"""Training examples in order, and the arrays of a step: queries and passages tokenized for reader and retriever."""

import bisect
import itertools
from collections.abc import Container, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from atlas_jax.config import Config, RunConfig
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.data.order import ExampleOrder
from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.evaluation.batches import ReaderBatcher
from atlas_jax.mesh import ArrayOrShape, global_batch_size, put_batch, put_passages
from atlas_jax.models.fid import ReaderBatch
from atlas_jax.retrieval.passage_source import RetrievedPassages
from atlas_jax.runtime.process_group import process_group
from atlas_jax.tasks import Example, Task
from atlas_jax.training.step import Batch, RetrieverBatch

NOT_LOCAL = Example(query="", target=None, answers=[])  # stands for an example that another process reads


class TrainingExamples:
    """The examples of all training files by their position in training, of which they are a pure function."""

    def __init__(self, config: RunConfig, task: Task, files: Sequence[JsonlRows], tokenizer: Tokenizer):
        self._task, self._files, self._tokenizer = task, files, tokenizer
        self._starts = list(itertools.accumulate(map(len, files), initial=0))
        self._rows = self._starts[-1]
        self.order = ExampleOrder(self._rows * task.examples_per_row, config.seed, shuffle=config.shuffle)

    def __getitem__(self, position: int) -> Example:
        epoch, number = self.order[position]
        row, which = divmod(number, self._task.examples_per_row)
        file = bisect.bisect_right(self._starts, row) - 1
        fields = self._files[file][row - self._starts[file]]
        return self._task.example(fields, which, epoch * self._rows + row, self._tokenizer)

    def batches(self, position: int, size: int, local_rows: Container[int]) -> Iterator[list[Example]]:
        """Endless batches from a position on; rows of a batch that are not in `local_rows` are not read."""
        for start in itertools.count(position, size):
            yield [self[start + row] if row in local_rows else NOT_LOCAL for row in range(size)]


class TrainingBatcher:
    """Makes the arrays of a step. All texts are padded to one length bucket, and the step compiles once a bucket."""

    def __init__(self, config: Config, tokenizer: Tokenizer, retriever_tokenizer: Tokenizer | None, mesh: Mesh):
        self.size = global_batch_size(mesh, config.run.per_gpu_batch_size)
        self._text, self._mesh = config.text, mesh
        self._reader = ReaderBatcher(config.text, tokenizer, mesh, self.size)
        self.local_rows = frozenset(self._reader.local_rows.tolist())  # rows of a batch that this process makes
        self._retriever_tokenizer = retriever_tokenizer

    def __call__(self, examples: Sequence[Example], retrieved: RetrievedPassages, *, retriever: bool) -> Batch:
        """The batch on the devices; with the retriever's tokens if `retriever`."""
        n = retrieved.numbers.shape[1]
        examples, retrieved = self._reader.select_local(examples, retrieved)
        queries = [example.query for example in examples]
        prompts, passages = self._reader.prompts(queries), self._reader.passages(queries, retrieved)
        retriever_queries, retriever_passages = self._retriever_ids(queries, retrieved) if retriever else ([], [])
        (longest,) = process_group().all_max(max(map(len, [*passages, *retriever_queries, *retriever_passages])))
        length = bucket(longest, self._text.text_maxlength)
        read = self._reader.batch(examples, passages, prompts, length, n)
        query_lengths = np.asarray([min(len(ids), length) for ids in self._reader.tokenizer.ids(queries)], np.int32)
        if self._retriever_tokenizer is None or not retriever:
            return put_training_batch(self._mesh, read, query_lengths, rows=self.size)
        length = min(length, self._text.retriever_maxlength)
        padded_queries, padded_passages = (
            pad(ids, length, self._retriever_tokenizer.pad_id) for ids in (retriever_queries, retriever_passages)
        )
        by_query = [array.reshape(len(examples), n, length) for array in padded_passages]
        return put_training_batch(self._mesh, read, query_lengths, *padded_queries, *by_query, rows=self.size)

    def _retriever_ids(
        self, queries: Sequence[str], retrieved: RetrievedPassages
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The retriever's token ids of the queries, and of their passages, query after query."""
        tokenizer, text = self._retriever_tokenizer, self._text
        assert tokenizer is not None
        stored = retrieved.store.tokens(tokenizer, text.retriever_format, "retriever")
        longest = text.retriever_maxlength
        return (
            [tokenizer.add_special_tokens(ids, longest) for ids in tokenizer.ids(list(queries))],
            [
                tokenizer.add_special_tokens(np.asarray(ids), longest)
                for ids in stored.take(retrieved.numbers.reshape(-1))
            ],
        )


def put_training_batch(
    mesh: Mesh, read: ReaderBatch, query_lengths: ArrayOrShape, *retriever: ArrayOrShape, rows: int | None = None
) -> Batch:
    """Puts a step's arrays on the mesh; `retriever` is empty, or query ids, query mask, passage ids, passage mask."""
    lengths = put_batch(mesh, query_lengths, rows)
    if not retriever:
        return Batch(read, lengths, None)
    queries = (put_batch(mesh, array, rows) for array in retriever[:2])
    passages = (put_passages(mesh, array, rows) for array in retriever[2:])
    return Batch(read, lengths, RetrieverBatch(*queries, *passages))
