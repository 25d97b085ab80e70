"""`atlas evaluate`: checks the rows, restores the weights, opens the index, then evaluates file after file."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from atlas_jax.checkpoints.restore import (
    NOT_FINITE_REMEDY,
    compute_dtype,
    place_on_mesh,
    restore,
    retriever_fingerprint,
)
from atlas_jax.checkpoints.store import Weights
from atlas_jax.config import Config, to_dict
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.errors import UserError
from atlas_jax.evaluation.evaluator import Evaluator, Result, choice_tokens
from atlas_jax.mesh import check_mesh, make_mesh, sharded_sizes
from atlas_jax.models.atlas import AtlasModel
from atlas_jax.models.fid import FiD
from atlas_jax.retrieval.passage_index import check_passage_index
from atlas_jax.retrieval.passage_retriever import PassageRetriever
from atlas_jax.retrieval.passage_source import PassageSource, RowPassages
from atlas_jax.runtime.compiled import enable_compilation_cache
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.cache import cache_folder
from atlas_jax.storage.files import atomic_file, write_json
from atlas_jax.storage.shared_files import shared_scratch
from atlas_jax.tasks import Task, make_task
from atlas_jax.tasks.row_checks import checked_rows

logger = logging.getLogger(__name__)

SCRATCH = ".scratch-evaluate-"
ZERO_SHOT_STEP = 1  # in names of result files; Reference: the step of a model that was not trained in this run
CONFIG, CONFIG_OF_EVALUATION = "config.json", "config-evaluate.json"  # the flags of a run, and of its evaluation


def evaluate(config: Config, run: Path) -> dict[str, Result]:
    """Evaluates every file of --eval_data with one model; returns results by path.

    Predictions and scores go to the folder `run`, files that all processes use to --checkpoint_dir. The step in their
    names is that of the run's own checkpoint; with --model_path, ZERO_SHOT_STEP.
    """
    trained = (run / "checkpoint").is_dir()  # config.json there has the flags of the training
    write_json(run / (CONFIG_OF_EVALUATION if trained else CONFIG), to_dict(config))
    task = make_task(config.task, config.run.seed)
    files = checked_files(config.run.eval_data, task)
    check_passage_index(config)
    enable_compilation_cache(config.run.compile_cache, cache_folder(config.run.cache_dir))
    check_mesh(config.run.mesh)  # before the weights are read
    weights = restore(config)
    if weights.cfg.reader:
        choice_tokens(task, weights.tokenizer)  # refuses a tokenizer before the index is opened
    mesh = evaluation_mesh(config, weights)
    model = place_on_mesh(weights, config.model, mesh)
    with shared_scratch(config.run_folder, SCRATCH) as scratch:
        source = passage_source(config, weights, model, mesh, scratch)
        evaluator = Evaluator(config, task, source, weights.tokenizer, mesh)
        step = weights.step if config.model.model_path == "none" and weights.step else ZERO_SHOT_STEP
        results = {}
        for name, rows in files.items():
            result = evaluate_file(evaluator, rows, model.reader, run, result_stem(name, step))
            if result.not_finite == result.examples:
                raise UserError(f"{rows.path}: the reader's output is not finite for any row; {NOT_FINITE_REMEDY}")
            results[rows.path] = result
        return results


def evaluate_file(evaluator: Evaluator, rows: JsonlRows, reader: FiD | None, run: Path, stem: str) -> Result:
    """Evaluates one file; writes {stem}.metrics.json and, with --write_results, {stem}.jsonl into `run`.

    All processes return the result; process 0 writes the predictions.
    """
    writes = evaluator.config.run.write_results and process_group().index == 0
    with _predictions(run / f"{stem}.jsonl", write=writes) as write:
        result = evaluator(rows, reader, write)
    report(run / f"{stem}.metrics.json", Path(rows.path).name, result)
    return result


def result_stem(name: str, step: int) -> str:
    """The name, without its suffix, of the files that an evaluation at this step writes."""
    return f"{name}-step-{step}"


def checked_files(paths: Sequence[str], task: Task) -> dict[str, JsonlRows]:
    """The checked rows of the files to evaluate, by the name of their results; see `result_names`."""
    return {name: checked_rows(path, task) for name, path in zip(result_names(paths), paths, strict=True)}


def result_names(paths: Sequence[str]) -> list[str]:
    """The name of each file's results: its stem, or its file name if stems are equal; UserError if those are too."""
    stems, names = [Path(path).stem for path in paths], [Path(path).name for path in paths]
    found = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names, strict=True)]
    for name, path in zip(found, paths, strict=True):
        if found.count(name) > 1:
            raise UserError(f"--eval_data {path}: another file is called {name} too, and so would its results be")
    return found


def evaluation_mesh(config: Config, weights: Weights) -> Mesh:
    """The mesh of --mesh for inference with these weights."""
    widths = sharded_sizes(weights.params)
    if weights.cfg.reader:
        widths |= {"passages": {config.retrieval.n_context}}
    count = sum(array.size for array in weights.params.values())
    return make_mesh(config.run.mesh, widths=widths, nbytes=count * np.dtype(compute_dtype(config.model)).itemsize)


def passage_source(config: Config, weights: Weights, model: AtlasModel, mesh: Mesh, scratch: Path) -> PassageSource:
    """The source of passages: a retriever with its index, or the rows themselves."""
    if model.retriever is None or weights.retriever_tokenizer is None:
        return RowPassages()
    fingerprints = [retriever_fingerprint(weights.params), *([weights.index] if weights.index else [])]
    retriever = PassageRetriever.open(config, model.retriever, weights.retriever_tokenizer, mesh, scratch, fingerprints)
    if model.reader is not None:
        retriever.tokenize_for_reader(config.text, weights.tokenizer)
    return retriever


@contextlib.contextmanager
def _predictions(path: Path, *, write: bool) -> Iterator[Callable[[str], object] | None]:
    """Yields a function that writes to a predictions file, which appears when it is complete; None unless `write`."""
    if not write:
        yield None
        return
    with atomic_file(path) as draft, draft.open("w", encoding="utf-8") as out:
        yield out.write


def report(path: Path, name: str, result: Result) -> None:
    """Writes and logs the result of an evaluation."""
    rate = result.rows / result.seconds
    write_json(
        path,
        result.scores
        | {
            "examples": result.rows,
            "unscored": result.unscored,
            "not_finite": result.not_finite,
            "prompts": result.examples,
            "examples_per_second": rate,
            "compile_seconds": result.compile_seconds,
            "programs": result.programs,
        },
    )
    scores = " | ".join(f"{value:.3f} {metric}" for metric, value in result.scores.items())
    logger.info("%s: %s", name, scores or f"passages found for {result.rows} rows")
    if result.not_finite:
        logger.warning("%s: the loss or the logits of %d prompts are not finite", name, result.not_finite)
    if result.unscored:
        logger.info("%s: %d of %d rows have no answer and are in no score", name, result.unscored, result.rows)
    logger.info("%s: %d rows at %.2f/s, and %.1f s of compilation", name, result.rows, rate, result.compile_seconds)
