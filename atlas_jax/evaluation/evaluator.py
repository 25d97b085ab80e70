"""Evaluating a file: find passages, read them, score the answers. Host and device work at the same time."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from atlas_jax.config import Config
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.evaluation.batches import ReaderBatcher
from atlas_jax.evaluation.generation import FREE, GenerationSettings
from atlas_jax.evaluation.step import ReaderOutput, read
from atlas_jax.mesh import global_batch_size, put_batch, replicate
from atlas_jax.models.fid import FiD, ReaderBatch
from atlas_jax.retrieval.passage_source import PassageSource, RetrievedPassages
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.runtime.prefetch import prefetch
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import progress
from atlas_jax.tasks import Example, Record, Task


class PendingBatch(NamedTuple):
    """A batch on its way: of each example its row, and the arrays, all of fixed size."""

    rows: list[int]
    examples: list[Example]
    found: RetrievedPassages
    batch: ReaderBatch | None  # none: nothing reads
    prompts: list[list[int]]  # what the decoder is given of each example; empty without --decoder_prompt_format
    prompt: Array | None  # the same, on the devices


class ScoredExample(NamedTuple):
    """An example after reading: its row, its record, its scores."""

    row: int
    record: Record
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Result:
    """What evaluating a file gave."""

    scores: dict[str, float]  # accuracies in percent, eval_loss in nats a token
    examples: int  # rows of the file
    prompts: int  # what was read: a row under each of its orders
    seconds: float  # without compilation
    compile_seconds: float
    programs: int


class Evaluator:
    """Evaluates files with one model; compiles once for each length bucket, over all files."""

    def __init__(self, config: Config, task: Task, source: PassageSource, tokenizer: Tokenizer, mesh: Mesh):
        self.config = config
        self.task = task
        self.source = source
        self.tokenizer = tokenizer
        self.mesh = mesh
        # Reference: a prompted decoder may write known tokens only, the embedding has some more
        vocabulary = tokenizer.vocab_size if config.text.decoder_prompt_format else None
        self.generation = generation_settings(config, tokenizer.pad_id, tokenizer.suffix[0], vocabulary)
        letters = [tokenizer.finish(ids)[0] for ids in tokenizer.ids(list(task.choices))]
        self.choices = replicate(mesh, np.asarray(letters, np.int32))
        self.size = global_batch_size(mesh, config.run.per_gpu_batch_size)
        self.batches = ReaderBatcher(config.text, tokenizer, mesh, self.size)
        self._read: CompiledFunction | None = None

    def __call__(self, rows: JsonlRows, reader: FiD | None, write: Callable[[str], object] | None = None) -> Result:
        """Scores the rows; hands a line of JSON for each to `write`."""
        program, state = self._program(reader)
        start, compiled = time.perf_counter(), self._compile_seconds()
        totals: dict[str, list[float]] = {metric: [] for metric in self.task.metrics} if reader else {}
        prompts = 0
        with progress(f"evaluating {rows.path}", "rows", len(rows)) as more:
            judged = self._judged(rows, program, state, write=write is not None)
            for _, group in itertools.groupby(judged, key=lambda one: one.row):
                orders = list(group)
                prompts += len(orders)
                line = self._total(orders, totals)
                if write:
                    write(json.dumps(line, ensure_ascii=False) + "\n")
                more(1)
        compile_seconds = self._compile_seconds() - compiled
        scores = {metric: float(np.mean(values)) for metric, values in totals.items()}
        return Result(
            {metric: score if metric == "eval_loss" else 100 * score for metric, score in scores.items()},
            len(rows),
            prompts,
            time.perf_counter() - start - compile_seconds,
            compile_seconds,
            sum(program.count for program in self._programs()),
        )

    def _program(self, reader: FiD | None) -> tuple[CompiledFunction | None, Any]:
        """The reader's program, made once, and the reader's present parameters."""
        if reader is None:
            return None, None
        if self._read is None:
            self._read = reader_program(reader, self.generation, self.mesh)
        return self._read, nnx.state(reader)

    def _programs(self) -> list[CompiledFunction]:
        return [*self.source.programs, *([self._read] if self._read else [])]

    def _compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self._programs())

    def _readings(
        self, rows: JsonlRows, program: CompiledFunction | None, state: Any
    ) -> Iterator[tuple[PendingBatch, ReaderOutput | None]]:
        """Each batch with what the reader makes of it.

        While the reader is busy with one batch, the host prepares the next and the caller looks at the one before. All
        work for the devices is given to them here, by one thread and in one order, as collectives want it.
        """

        def start(work: PendingBatch) -> tuple[PendingBatch, ReaderOutput | None]:
            return work, program(state, work.batch, self.choices, work.prompt) if program else None

        done: tuple[PendingBatch, ReaderOutput | None] | None = None
        ready: PendingBatch | None = None
        for numbers, examples in prefetch(self._examples(rows)):
            find = self.source.begin_retrieval(examples, self.config.retrieval.n_context)
            under_way = start(ready) if ready else None
            following = self._prepare(numbers, examples, find(), reads=program is not None)
            if done:
                yield done
            done, ready = under_way, following
        if done:
            yield done
        if ready:
            yield start(ready)

    def _examples(self, rows: JsonlRows) -> Iterator[tuple[list[int], list[Example]]]:
        """Batches of examples in the order of the rows, and the row of each."""
        pending: list[tuple[int, Example]] = []
        for number in range(len(rows)):
            pending += [(number, example) for example in self.task.examples(rows[number], number, self.tokenizer)]
            while len(pending) >= self.size or (pending and number == len(rows) - 1):
                taken, pending = pending[: self.size], pending[self.size :]
                yield [row for row, _ in taken], [example for _, example in taken]

    def _prepare(
        self, rows: list[int], examples: list[Example], found: RetrievedPassages, *, reads: bool
    ) -> PendingBatch:
        if not reads:
            return PendingBatch(rows, examples, found, None, [], None)
        prompts = self.batches.prompts([example.query for example in examples])
        local_examples, local_passages = self.batches.local_examples(examples, found)
        own = [prompts[row] for row in self.batches.own if row < len(prompts)]
        passages = self.batches.passages([example.query for example in local_examples], local_passages)
        (longest,) = process_group().all_max(max(map(len, passages), default=0))
        length = bucket(longest, self.config.text.text_maxlength)
        batch = self.batches.batch(local_examples, passages, own, length, found.numbers.shape[1])
        prompt = None
        if prompts:
            longest = bucket(max(map(len, prompts)), self.generation.max_length)
            given = pad([*own, *[[]] * (len(self.batches.own) - len(own))], longest, FREE)[0]
            prompt = put_batch(self.mesh, given, self.size)
        return PendingBatch(rows, examples, found, batch, prompts, prompt)

    def _judged(
        self, rows: JsonlRows, program: CompiledFunction | None, state: Any, *, write: bool
    ) -> Iterator[ScoredExample]:
        """Every example of every row, judged, in order."""
        for work, reading in self._readings(rows, program, state):
            host = None if reading is None else ReaderOutput(*map(np.asarray, reading))
            for i in range(len(work.examples)):
                yield self._judge(work, host, i, write=write)

    def _judge(self, work: PendingBatch, reading: ReaderOutput | None, i: int, *, write: bool) -> ScoredExample:
        """Example `i` of a batch: its record, with the reference's fields, and its scores."""
        example = work.examples[i]
        record: Record = {"query": example.query, "answers": example.answers}
        scores: dict[str, float] = {}
        if reading:
            given = 1 + len(work.prompts[i] if work.prompts else ())
            record["generation"] = self.tokenizer.decode(np.asarray(reading.generated)[i, given:])
            scores = self.task.score(record["generation"], example.answers)
            scores["eval_loss"] = float(reading.loss[i]) / max(int(reading.loss_tokens[i]), 1)
        if write and not (reading and self.config.run.dont_write_passages):
            record["passages"] = work.found.store.take(work.found.numbers[i][work.found.valid[i]])
        if example.metadata is not None:
            record["metadata"] = example.metadata
        if reading and self.task.choices:
            record["choice_logits"] = dict(zip(self.task.choices, reading.choice_logits[i].tolist(), strict=True))
        if example.id is not None:
            record["id"] = example.id
        return ScoredExample(work.rows[i], record, scores)

    def _total(self, orders: list[ScoredExample], totals: dict[str, list[float]]) -> Record:
        """A row's scores put to the others; returns its line."""
        records = [judged.record for judged in orders]
        line, of_row = self.task.finish(records) if totals else (records[0], {})
        for scores in (*(judged.scores for judged in orders), of_row):
            for metric, value in scores.items():
                totals[metric].append(value)
        return line


def generation_settings(config: Config, pad_id: int, eos_id: int, vocabulary: int | None = None) -> GenerationSettings:
    """How answers are written; only tokens below `vocabulary`, if given."""
    flags = config.generation
    return GenerationSettings(
        flags.generation_max_length,
        flags.generation_min_length or 0,
        flags.generation_num_beams,
        flags.generation_length_penalty,
        eos_id=eos_id,
        pad_id=pad_id,
        vocabulary=vocabulary,
    )


def reader_program(reader: FiD, cfg: GenerationSettings, mesh: Mesh) -> CompiledFunction:
    """What reads a batch, for the reader's state."""
    graph, _ = nnx.split(reader)
    return CompiledFunction(
        "reader",
        lambda state, batch, choices, prompt: read(nnx.merge(graph, state), batch, choices, prompt, cfg),
        mesh,
        gather=True,
    )
