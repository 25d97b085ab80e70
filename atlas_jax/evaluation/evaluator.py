"""Evaluates a file of rows: retrieves passages, reads them, scores the answers. Host and devices work concurrently."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from atlas_jax.config import Config, GenerationConfig
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.errors import UserError
from atlas_jax.evaluation.batches import ReaderBatcher
from atlas_jax.evaluation.generation import FREE, GenerationSettings
from atlas_jax.evaluation.step import ReaderOutput, eval_step
from atlas_jax.mesh import global_batch_size, put_batch, replicate
from atlas_jax.models.fid import FiD, ReaderBatch
from atlas_jax.retrieval.passage_source import PassageSource, RetrievedPassages
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.runtime.prefetch import prefetch
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import progress
from atlas_jax.storage.files import json_text
from atlas_jax.tasks import Example, Record, Task


class PendingBatch(NamedTuple):
    """A batch before reading: its examples, their row indices, and the arrays of fixed shapes."""

    rows: list[int]
    examples: list[Example]
    retrieved: RetrievedPassages
    batch: ReaderBatch | None  # None: --retrieve_only
    prompts: list[list[int]]  # token ids that the decoder starts with; empty without --decoder_prompt_format
    prompt: Array | None  # the prompts on the devices
    positions: Array | None  # of the letters in the targets; None: the usual one


class ScoredExample(NamedTuple):
    """An example after reading: its row index, its record for the predictions file, its scores.

    `finite`: whether the reader's loss and logits are.
    """

    row: int
    record: Record
    scores: dict[str, float]
    finite: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of evaluating a file."""

    scores: dict[str, float]  # accuracies in percent, eval_loss in nats per token
    rows: int  # of the file
    unscored: int  # rows without an answer, which are in no score
    not_finite: int  # examples whose loss or logits are not finite: their loss is in no mean, their answer is scored
    examples: int  # read by the reader: multiple choice makes one for each order of a row's options
    seconds: float  # without compilation
    compile_seconds: float
    programs: int  # compiled so far


class Evaluator:
    """Evaluates files with one model; compiles once for each length bucket over all files."""

    def __init__(self, config: Config, task: Task, source: PassageSource, tokenizer: Tokenizer, mesh: Mesh):
        self.config = config
        self.task = task
        self.source = source
        self.tokenizer = tokenizer
        self.mesh = mesh
        # Reference: a prompted decoder generates only ids that the tokenizer knows; the embedding has more rows
        vocabulary = tokenizer.vocab_size if config.text.decoder_prompt_format else None
        self.generation = generation_settings(config.generation, tokenizer.pad_id, tokenizer.suffix[0], vocabulary)
        self.choice_ids = choice_tokens(task, tokenizer)
        self.choices = replicate(mesh, self.choice_ids)
        self.size = global_batch_size(mesh, config.run.per_gpu_batch_size)
        self.batcher = ReaderBatcher(config.text, tokenizer, mesh, self.size)
        self._compiled_reader: CompiledFunction | None = None

    def __call__(self, rows: JsonlRows, reader: FiD | None, write: Callable[[str], object] | None = None) -> Result:
        """Scores the rows; calls `write` with each line of JSON of the predictions file, in the order of the rows."""
        program, state = self._reader_program(reader)
        start, compiled_before = time.perf_counter(), self._compile_seconds()
        totals: dict[str, list[float]] = {metric: [] for metric in self.task.metrics} if reader else {}
        prompts = unscored = not_finite = 0
        with progress(f"evaluating {rows.path}", "rows", len(rows)) as on_progress:
            scored = self._scored_examples(rows, program, state, write=write is not None)
            for _, group in itertools.groupby(scored, key=lambda example: example.row):
                of_row = list(group)
                prompts += len(of_row)
                not_finite += sum(not example.finite for example in of_row)
                unscored += reader is not None and not any(example.scores for example in of_row)
                for line in self._finish_row(of_row, totals):
                    if write:
                        write(json_text(line) + "\n")
                on_progress(1)
        compile_seconds = self._compile_seconds() - compiled_before
        scores = {metric: float(np.mean(values)) for metric, values in totals.items() if values}
        return Result(
            {metric: score if metric == "eval_loss" else 100 * score for metric, score in scores.items()},
            len(rows),
            unscored,
            not_finite,
            prompts,
            time.perf_counter() - start - compile_seconds,
            compile_seconds,
            sum(program.count for program in self._programs()),
        )

    def _reader_program(self, reader: FiD | None) -> tuple[CompiledFunction | None, Any]:
        """The compiled reader, the same object in each call, and the reader's current parameters."""
        if reader is None:
            return None, None
        if self._compiled_reader is None:
            self._compiled_reader = compiled_reader(reader, self.generation, self.mesh)
        return self._compiled_reader, nnx.state(reader)

    def _programs(self) -> list[CompiledFunction]:
        return [*self.source.programs, *([self._compiled_reader] if self._compiled_reader else [])]

    def _compile_seconds(self) -> float:
        return sum(program.compile_seconds for program in self._programs())

    def _outputs(
        self, rows: JsonlRows, program: CompiledFunction | None, state: Any
    ) -> Iterator[tuple[PendingBatch, ReaderOutput | None]]:
        """Each batch with the reader's output.

        While the devices read one batch, the host prepares the next and the caller scores the previous one. One thread
        dispatches all work to the devices here, in one order, as collectives over several processes require.
        """

        def dispatch(batch: PendingBatch) -> tuple[PendingBatch, ReaderOutput | None]:
            arguments = batch.batch, self.choices, batch.prompt, batch.positions
            return batch, program(state, *arguments) if program else None

        done: tuple[PendingBatch, ReaderOutput | None] | None = None
        ready: PendingBatch | None = None
        for numbers, examples in prefetch(self._examples(rows)):
            wait = self.source.begin_retrieval(examples, self.config.retrieval.n_context)
            dispatched = dispatch(ready) if ready else None
            following = self._prepare(numbers, examples, wait(), reads=program is not None)
            if done:
                yield done
            done, ready = dispatched, following
        if done:
            yield done
        if ready:
            yield dispatch(ready)

    def _examples(self, rows: JsonlRows) -> Iterator[tuple[list[int], list[Example]]]:
        """Batches of examples in the order of the rows, with their row indices."""
        pending: list[tuple[int, Example]] = []
        for number in range(len(rows)):
            row, orders = rows[number], range(self.task.examples_per_row)
            pending += [(number, self.task.example(row, which, number, self.tokenizer)) for which in orders]
            while len(pending) >= self.size or (pending and number == len(rows) - 1):
                batch, pending = pending[: self.size], pending[self.size :]
                yield [row for row, _ in batch], [example for _, example in batch]

    def _prepare(
        self, rows: list[int], examples: list[Example], retrieved: RetrievedPassages, *, reads: bool
    ) -> PendingBatch:
        if not reads:
            return PendingBatch(rows, examples, retrieved, None, [], None, None)
        prompts = self.batcher.prompts([example.query for example in examples])
        local_examples, local_passages = self.batcher.select_local(examples, retrieved)
        local_rows = self.batcher.local_rows
        local_prompts = [prompts[row] for row in local_rows if row < len(prompts)]
        passages = self.batcher.passages([example.query for example in local_examples], local_passages)
        (longest,) = process_group().all_max(max(map(len, passages), default=0))
        length = bucket(longest, self.config.text.text_maxlength)
        batch = self.batcher.batch(local_examples, passages, local_prompts, length, retrieved.numbers.shape[1])
        prompt = None
        if prompts:
            longest = bucket(max(map(len, prompts)), self.generation.max_length)
            padded = pad([*local_prompts, *[[]] * (len(local_rows) - len(local_prompts))], longest, FREE)[0]
            prompt = put_batch(self.mesh, padded, self.size)
        positions = None
        if self.task.choices and self.batcher.has_text_before_answer:
            found = self.batcher.letter_positions(local_examples, self.task.choices, self.choice_ids)
            positions = put_batch(self.mesh, np.asarray(found, np.int32), self.size)
        return PendingBatch(rows, examples, retrieved, batch, prompts, prompt, positions)

    def _scored_examples(
        self, rows: JsonlRows, program: CompiledFunction | None, state: Any, *, write: bool
    ) -> Iterator[ScoredExample]:
        """Every example of every row, in order."""
        for batch, output in self._outputs(rows, program, state):
            on_host = None if output is None else ReaderOutput(*map(np.asarray, output))
            for i in range(len(batch.examples)):
                yield self._score(batch, on_host, i, write=write)

    def _score(self, batch: PendingBatch, output: ReaderOutput | None, i: int, *, write: bool) -> ScoredExample:
        """Example `i` of a batch, with a record of the reference's fields."""
        example = batch.examples[i]
        record: Record = {"query": example.query, "answers": example.answers}
        scores: dict[str, float] = {}
        finite = output is None or bool(np.isfinite(output.loss[i]) and np.isfinite(output.choice_logits[i]).all())
        if output:
            start = 1 + len(batch.prompts[i] if batch.prompts else ())
            record["generation"] = self.tokenizer.decode(np.asarray(output.generated)[i, start:])
            if example.answers:
                scores = self.task.score(record["generation"], example.answers)
            if example.answers and example.target is not None and finite:
                scores["eval_loss"] = float(output.loss[i]) / max(int(output.loss_tokens[i]), 1)
        if write and not (output and self.config.run.dont_write_passages):
            record["passages"] = batch.retrieved.store.take(batch.retrieved.numbers[i][batch.retrieved.valid[i]])
        if example.metadata is not None:
            record["metadata"] = example.metadata
        if output and self.task.choices:
            record["choice_logits"] = dict(zip(self.task.choices, output.choice_logits[i].tolist(), strict=True))
        if example.id is not None:
            record["id"] = example.id
        return ScoredExample(batch.rows[i], record, scores, finite)

    def _finish_row(self, examples: list[ScoredExample], totals: dict[str, list[float]]) -> list[Record]:
        """Adds a row's scores to `totals`; returns the row's lines of the predictions file.

        Reference: one line, or without a reader one for each example.
        """
        records = [example.record for example in examples]
        if not totals:
            return records
        line, row_scores = self.task.merge_records(records)
        for scores in (*(example.scores for example in examples), row_scores):
            for metric, value in scores.items():
                totals[metric].append(value)
        return [line]


def choice_tokens(task: Task, tokenizer: Tokenizer) -> Int32[np.ndarray, " c"]:
    """The first token of each of the task's choices; UserError if two begin with the same, which hides the choice."""
    ids = [tokenizer.add_special_tokens(ids)[0] for ids in tokenizer.ids(list(task.choices))]
    if len(set(ids)) < len(ids):
        letters = ", ".join(task.choices)
        raise UserError(
            f"the reader's tokenizer begins two of the letters {letters} with the same token, so that they cannot be "
            "told apart; take another reader"
        )
    return np.asarray(ids, np.int32)


def generation_settings(
    flags: GenerationConfig, pad_id: int, eos_id: int, vocabulary: int | None = None
) -> GenerationSettings:
    """The settings of generation that the flags name; only tokens below `vocabulary`, if given."""
    return GenerationSettings(
        flags.generation_max_length,
        flags.generation_min_length or 0,
        flags.generation_num_beams,
        flags.generation_length_penalty,
        eos_id=eos_id,
        pad_id=pad_id,
        vocabulary=vocabulary,
    )


def compiled_reader(reader: FiD, cfg: GenerationSettings, mesh: Mesh) -> CompiledFunction:
    """`eval_step` as a function of (the reader's state, batch, choices, prompt, positions of the letters)."""
    graph, _ = nnx.split(reader)
    return CompiledFunction(
        "reader",
        lambda state, batch, choices, prompt, positions: eval_step(
            nnx.merge(graph, state), batch, choices, prompt, positions, cfg
        ),
        mesh,
        gather=True,
    )
