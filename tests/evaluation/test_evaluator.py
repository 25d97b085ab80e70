"""Evaluation against the reference's: the same passages give the same logits, answers, files and scores."""

import dataclasses
import gzip
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.restore import place_on_mesh, restore
from atlas_jax.config import Config, GenerationConfig, ModelConfig, RetrievalConfig, RunConfig, TaskConfig, TextConfig
from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.errors import UserError
from atlas_jax.evaluation.batches import ReaderBatcher
from atlas_jax.evaluation.evaluator import Evaluator, choice_tokens
from atlas_jax.mesh import make_mesh
from atlas_jax.retrieval.passage_source import RetrievedPassages, RowPassages
from atlas_jax.retrieval.passage_store import build_passages
from atlas_jax.tasks import make_task
from atlas_jax.tasks.multiple_choice import MultipleChoice

SCORER = Path(__file__).parents[2] / "eval/evaluate_mmlu_predictions.py"


def config_of(golden, task: str, *, length: int, batch: int = 1, prompt: str | None = None, **generation) -> Config:
    return Config(
        ModelConfig(
            str(golden / "assets/reader"), str(golden / "assets/retriever"), str(golden / "checkpoint_initial")
        ),
        TaskConfig(task, multiple_choice_eval_permutations="cyclic"),
        RunConfig(per_gpu_batch_size=batch),
        TextConfig(text_maxlength=length, target_maxlength=16, decoder_prompt_format=prompt),
        RetrievalConfig(n_context=5),
        generation=GenerationConfig(**({"generation_max_length": 16} | generation)),
    )


@pytest.fixture(scope="module")
def model(golden):
    """The reference's initial weights on eight devices."""
    config = config_of(golden, "qa", length=160)
    weights, mesh = restore(config), make_mesh()
    return weights, place_on_mesh(weights, config.model, mesh), mesh


class ReferencePassages:
    """A passage source with the passages that the reference retrieved."""

    programs = ()

    def __init__(self, golden, folder):
        self.store = build_passages([golden / "passages.jsonl"], folder)
        passages = self.store.take(range(len(self.store)))
        numbers = {passage["id"]: number for number, passage in enumerate(passages)}
        lines = read_lines((golden / "exp/mmlu/retrieved.jsonl").read_text(encoding="utf-8"))
        self.of_query = {line["query"]: [numbers[i] for i in line["ids"]] for line in lines}

    def begin_retrieval(self, examples, n):
        numbers = np.asarray([self.of_query[example.query] for example in examples])
        assert numbers.shape[1] == n
        return lambda: RetrievedPassages(self.store, numbers, np.ones(numbers.shape, bool))


def read_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def evaluate(config, model, source, rows):
    """Returns the result and the written lines."""
    weights, atlas, mesh = model
    lines: list[dict] = []
    evaluator = Evaluator(config, make_task(config.task), source, weights.tokenizer, mesh)
    return evaluator(rows, atlas.reader, lambda line: lines.append(json.loads(line))), lines


@pytest.fixture(scope="module")
def mmlu(golden, model, tmp_path_factory):
    """All 456 permutations of 114 real questions, with the passages that the reference read."""
    source = ReferencePassages(golden, tmp_path_factory.mktemp("store") / "passages")
    return evaluate(
        config_of(golden, "multiple_choice", length=192), model, source, JsonlRows(golden / "mmlu_eval.jsonl")
    )


@pytest.fixture(scope="module")
def expected(golden) -> list[dict]:
    """The reference's prediction file."""
    file = golden / "exp/mmlu/mmlu_eval-step-1.jsonl.gz"
    return read_lines(gzip.decompress(file.read_bytes()).decode())


NUMBERS = {"choice_logits", "choice_probs", "all_probs", "permutations", "passages"}


@pytest.fixture(scope="module")
def found(mmlu, expected) -> list[dict]:
    """Our predictions, with the reference's letter where its best options tie.

    Where a long question leaves no room for its options, all orders give the same input and all options tie; there the
    reference's float32 rounding chooses an option, and our evaluation takes the first letter.
    """
    lines = [dict(line) for line in mmlu[1]]
    tied = 0
    for line, expected_line in zip(lines, expected, strict=True):
        first, second = sorted(expected_line["choice_probs"].values())[:-3:-1]
        if first - second < 1e-6:
            assert line["generation"] == "A"
            line["generation"] = expected_line["generation"]
            tied += 1
    assert tied == 9
    return lines


def test_predictions_equal_the_references_field_by_field(found, expected):
    """Every field of every question and permutation; float32 numbers to 1e-5 of their size."""
    assert len(found) == len(expected) == 114
    for line, expected_line in zip(found, expected, strict=True):
        assert set(line) - {"passages"} == set(expected_line)
        assert {k: v for k, v in line.items() if k not in NUMBERS} == {
            k: v for k, v in expected_line.items() if k not in NUMBERS
        }
        assert list(line["choice_probs"]) == list("ABCD")
        assert_close(line["choice_probs"], expected_line["choice_probs"])
        assert_close(line["all_probs"], expected_line["all_probs"])
        for order, expected_order in zip(line["permutations"], expected_line["permutations"], strict=True):
            assert {k: v for k, v in order.items() if k not in NUMBERS} == {
                k: v for k, v in expected_order.items() if k not in NUMBERS
            }
            assert_close(order["choice_logits"], expected_order["choice_logits"], 1e-4)
    logits = [list(line["choice_logits"].values()) for line in expected[0]["permutations"]]
    assert np.ptp(logits, axis=0).min() > 1e-2  # logits depend on the order


@pytest.mark.parametrize("spec", ["data=2,fsdp=2,model=2", "passages=5"])
def test_predictions_do_not_depend_on_the_mesh(golden, model, mmlu, tmp_path, spec):
    """The same lines for the first questions with heads, parameters or passages sharded."""
    weights, mesh = model[0], make_mesh(spec)
    config = config_of(golden, "multiple_choice", length=192)
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"".join((golden / "mmlu_eval.jsonl").read_bytes().splitlines(keepends=True)[:6]))
    source = ReferencePassages(golden, tmp_path / "passages")
    _, lines = evaluate(config, (weights, place_on_mesh(weights, config.model, mesh), mesh), source, JsonlRows(rows))
    assert len(lines) == 6
    for line, other in zip(lines, mmlu[1], strict=False):
        assert line["generation"] == other["generation"]
        assert_close(line["choice_probs"], other["choice_probs"])
        assert_close(line["all_probs"], other["all_probs"])


def assert_close(found: dict, expected: dict, tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=tolerance, atol=tolerance)


def test_scores_equal_the_references(golden, mmlu):
    """Accuracy exactly, loss to 1e-6; debiased accuracy differs only by the ties, one of nine."""
    expected = json.loads((golden / "meta.json").read_text())["mmlu_metrics"]
    assert (mmlu[0].rows, mmlu[0].examples) == (114, 456)
    debiased = mmlu[0].scores["debiased_accuracy"] - 100 / 114
    assert mmlu[0].scores | {"debiased_accuracy": debiased} == pytest.approx(expected, rel=1e-6)


def test_the_score_table_equals_the_references(golden, found, tmp_path, capsys):
    """Our predictions through our scorer: the reference's table, letter by letter."""
    path = tmp_path / "mmlu_eval-step-1.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in found))
    argv = [str(SCORER), "--predictions_path", str(path), "--gold_path", str(golden / "mmlu_eval.jsonl")]
    runpy.run_path(str(SCORER))["main"](argv[1:])
    assert capsys.readouterr().out == (golden / "mmlu_table.txt").read_text()


def with_passages(golden, tmp_path) -> JsonlRows:
    """The questions, each with the passages that the reference found."""
    rows = read_lines((golden / "qa.jsonl").read_text())
    found = read_lines((golden / "exp/qa/qa-step-1.jsonl").read_text())
    path = tmp_path / "qa.jsonl"
    path.write_text(
        "".join(json.dumps(r | {"passages": f["passages"]}) + "\n" for r, f in zip(rows, found, strict=True))
    )
    return JsonlRows(path)


def test_rows_with_their_own_passages_equal_the_reference(golden, model, tmp_path, monkeypatch):
    """--use_file_passages with the reference's passages: its predictions file and its scores."""
    config, rows = config_of(golden, "qa", length=160), with_passages(golden, tmp_path)
    losses: list[float] = []

    class RecordingEvaluator(Evaluator):
        def _finish_row(self, examples, totals):
            losses.extend(example.scores["eval_loss"] for example in examples)
            return super()._finish_row(examples, totals)

    monkeypatch.setitem(globals(), "Evaluator", RecordingEvaluator)
    result, found = evaluate(config, model, RowPassages(), rows)
    assert found == read_lines((golden / "exp/qa/qa-step-1.jsonl").read_text())
    expected = json.loads((golden / "meta.json").read_text())["qa_metrics"]
    assert result.scores == pytest.approx(expected | {"eval_loss": np.mean(losses)}, rel=1e-6)
    # The reference averages over the tokens of a batch, then over batches; it ran with 4 questions in each
    targets = model[0].tokenizer.target_ids([f"<extra_id_0> {row['target']}" for row in rows], 16)
    tokens = np.asarray([len(ids) for ids in targets]).reshape(-1, 4)
    batches = (np.reshape(losses, (-1, 4)) * tokens).sum(1) / tokens.sum(1)
    assert batches.mean() == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert np.ptp(tokens) > 0  # so that the two means differ


@pytest.mark.parametrize(("batch", "length"), [(2, 160), (3, 152)])
def test_results_depend_on_neither_batch_nor_bucket(golden, model, tmp_path, batch, length):
    """16 or 24 examples at a time instead of 8, and another longest bucket: the same answers and losses."""
    rows = with_passages(golden, tmp_path)
    one, lines = evaluate(config_of(golden, "qa", length=length), model, RowPassages(), rows)
    other, others = evaluate(config_of(golden, "qa", length=length, batch=batch), model, RowPassages(), rows)
    assert lines == others
    assert one.scores == pytest.approx(other.scores, rel=1e-6)
    assert other.programs <= one.programs


def test_rows_with_fewer_passages_than_n_context(golden, model, tmp_path):
    """Rows with 2 passages and --n_context 5 are read as with --n_context 2; rows with none are answered too."""
    rows = read_lines((golden / "qa.jsonl").read_text())[:3]
    found = read_lines((golden / "exp/qa/qa-step-1.jsonl").read_text())
    path = tmp_path / "few.jsonl"
    few = [row | {"passages": line["passages"][:2]} for row, line in zip(rows, found, strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in few))
    _, five = evaluate(config_of(golden, "qa", length=160), model, RowPassages(), JsonlRows(path))
    _, two = evaluate(replace_n(config_of(golden, "qa", length=160), 2), model, RowPassages(), JsonlRows(path))
    assert five == two
    assert [len(line["passages"]) for line in five] == [2, 2, 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, none = evaluate(config_of(golden, "qa", length=160), model, RowPassages(), JsonlRows(path))
    assert [line["generation"] for line in none] != [line["generation"] for line in five]


def replace_n(config: Config, n: int) -> Config:
    return Config(
        config.model, config.task, config.run, config.text, RetrievalConfig(n_context=n), generation=config.generation
    )


@pytest.mark.parametrize(
    ("form", "prompt", "before"),
    [("{target}", None, "<extra_id_0>"), ("so {target} .", None, "so <extra_id_0>"), (None, "to {query}:", None)],
)
def test_choices_are_read_where_the_letter_is(golden, model, tmp_path, monkeypatch, form, prompt, before):
    """Text before the answer, of the format or of a prompt with the query, moves the letter to a later position.

    A format that adds nothing has the logits of the usual position, which the reference reads; others have not.
    """
    lines = (golden / "mmlu_eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    longest = 160 if prompt else 16
    rows = JsonlRows(tmp_path / "rows.jsonl")
    plain = config_of(golden, "multiple_choice", length=96, generation_max_length=longest)
    plain = dataclasses.replace(plain, retrieval=RetrievalConfig(n_context=1, use_file_passages=True))
    text = dataclasses.replace(plain.text, decoder_format=form, decoder_prompt_format=prompt, target_maxlength=None)
    config, tokenizer, task = dataclasses.replace(plain, text=text), model[0].tokenizer, make_task(plain.task)
    batcher = Evaluator(config, task, RowPassages(), tokenizer, model[2]).batcher
    examples = [task.example(row, 0, 0, tokenizer) for row in rows]
    positions = batcher.letter_positions(examples, task.choices, choice_tokens(task, tokenizer))[:2]
    texts = [before or f"to {example.query}:<extra_id_0>" for example in examples]
    assert positions == [len(ids) for ids in tokenizer.ids(texts)]

    def logits(config):
        written = evaluate(config, model, RowPassages(), rows)[1]
        return [list(p["choice_logits"].values()) for line in written for p in line["permutations"]]

    found = logits(config)
    monkeypatch.setattr(ReaderBatcher, "has_text_before_answer", False)
    assert np.allclose(found, logits(config), atol=1e-3) == (form == "{target}")
    assert form != "{target}" or np.allclose(found, logits(plain), atol=1e-3)


@pytest.mark.parametrize(("form", "limit"), [("({target})", None), ("so it goes {target}", 3)])
def test_formats_that_hide_the_letter_are_refused(golden, model, form, limit):
    """Letters that join with what follows them, or are cut off, cannot be compared: one line names the flags."""
    config = config_of(golden, "multiple_choice", length=96)
    text = dataclasses.replace(config.text, decoder_format=form, target_maxlength=limit)
    task, tokenizer = make_task(config.task), model[0].tokenizer
    batcher = ReaderBatcher(text, tokenizer, model[2], 8)
    example = task.example(JsonlRows(golden / "mmlu_eval.jsonl")[0], 0, 0, tokenizer)
    tokens = choice_tokens(task, tokenizer)
    if form == "({target})":
        tokens = tokens + 1  # as if the letter were another token beside a bracket
    with pytest.raises(UserError, match=r"--decoder_format .*: no token of the target tells the letters apart"):
        batcher.letter_positions([example], task.choices, tokens)


def test_letters_that_begin_with_the_same_token_are_refused(golden, tmp_path):
    """A tokenizer without pieces for " A" to " D" gives each the piece for a space first; the golden one has them."""
    assert len(set(choice_tokens(MultipleChoice(), Tokenizer.load(golden / "assets" / "reader")))) == 4
    tokenizer = json.loads((golden / "assets" / "reader" / "tokenizer.json").read_text(encoding="utf-8"))
    for piece in tokenizer["model"]["vocab"]:
        if piece[0] in ("▁A", "▁B", "▁C", "▁D"):
            piece[0] = f"▁zqx{piece[0][1]}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match="begins two of the letters A, B, C, D with the same token"):
        choice_tokens(MultipleChoice(), Tokenizer.load(tmp_path))
