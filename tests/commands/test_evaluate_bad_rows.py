"""`atlas evaluate` on bad questions and passages: exit status 2 and one line with the file, the line and the remedy."""

import pytest

from atlas_jax.commands.main import main
from atlas_jax.data import jsonl
from tests.commands.sample_evaluation import PASSAGES, ROWS, evaluate_argv, to_jsonl, write_file

VALID = to_jsonl(ROWS[:1])
DAMAGED = {  # content of the file, number of the bad line (None: the whole file), part of the message
    "malformed": (VALID + b'{"question": }\n' + VALID, 2, "not valid JSON"),
    "truncated": (VALID + VALID[:40], 2, "truncated"),
    "utf8": (VALID + b'{"question": "\xff"}\n', 2, "invalid UTF-8 at byte 15 of the line; save the file as UTF-8"),
    "too_long": (VALID + b'{"question": "' + b"x" * jsonl.MAX_LINE_BYTES + b'"}\n', 2, "longer than 16777216 bytes"),
    "no_object": (VALID + b"\n" + b'["question"]\n', 3, "must be a JSON object, found a list"),
    "empty": (b"", None, "no rows, the file is empty"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_questions_name_file_and_line(assert_refused, no_weights, tmp_path, case):
    """Damage in --eval_data is found before the weights are loaded; the message names the file and the line."""
    content, line, message = DAMAGED[case]
    path = write_file(tmp_path / "bad.jsonl", content)
    assert_refused(evaluate_argv(tmp_path, eval_data=path), f"atlas: {path}{f':{line}' if line else ''}: ", message)


def test_valid_questions_get_as_far_as_the_weights(no_weights, tmp_path):
    """The counter-case of the tests with `no_weights`: without a bad row the run goes on to load the weights."""
    with pytest.raises(AssertionError, match="the weights are loaded"):
        main(evaluate_argv(tmp_path))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_passages_name_file_and_line(assert_refused, tmp_path, case):
    """Damage in --passages: the message names the file and the line, and --save_index_path is not created."""
    content, line, message = DAMAGED[case]
    path = write_file(tmp_path / "bad.jsonl", content.replace(b'"question": "', b'"id": "1", "text": "'))
    argv = evaluate_argv(tmp_path, passages=path, save_index_path=tmp_path / "index", retrieve_only=True)
    assert_refused(argv, f"atlas: {path}{f':{line}' if line else ''}: ", message if case != "utf8" else "invalid UTF-8")
    assert not (tmp_path / "index").exists()


def without(row: dict, field: str) -> dict:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without(ROWS[0], "question"), "`question` is missing"),
        (without(ROWS[0], "options"), "`options` is missing"),
        (ROWS[0] | {"question": 7}, "`question` is not a text"),
        (ROWS[0] | {"options": ["8", "120", "240", "24"]}, "`options` is not an object"),
        (ROWS[0] | {"answer": "E"}, "`answer` is 'E', no option; it must be one of A, B, C, D"),
        (ROWS[0] | {"answer": "120"}, "`answer` is '120', no option"),
        (ROWS[0] | {"answer": 1}, "`answer` is not the letter"),
        (ROWS[0] | {"options": {"A": "8", "B": "120", "C": "240"}}, "`options` has A, B, C where"),
        (ROWS[0] | {"options": dict.fromkeys("ABCDE", "8")}, "--multiple_choice_num_options 4"),
        (ROWS[0] | {"options": dict.fromkeys("abcd", "8")}, "`options` has a, b, c, d where"),
        (ROWS[0] | {"options": {"A": "8", "B": 120, "C": "240", "D": "24"}}, "option B is not a text"),
    ],
)
def test_questions_that_are_not_multiple_choice_are_refused(assert_refused, no_weights, tmp_path, row, message):
    """A row that is no question with four options is named by file and line before the weights are loaded."""
    path = write_file(tmp_path / "bad.jsonl", to_jsonl([ROWS[0], row]))
    assert_refused(evaluate_argv(tmp_path, eval_data=path), f"atlas: {path}:2: ", message)


@pytest.mark.parametrize(
    ("passage", "message"),
    [
        (without(PASSAGES[0], "id"), 'a passage without "id"; add the field or remove the passage'),
        (without(PASSAGES[0], "text"), 'a passage without "text"; add'),
        (PASSAGES[0] | {"title": 2001}, '"title" must be a string'),
        (PASSAGES[0] | {"text": None}, '"text" must be a string'),
    ],
)
def test_passages_without_id_or_text_are_refused(assert_refused, tmp_path, passage, message):
    """A passage whose fields are missing or no strings is named by file and line; no index is created."""
    path = write_file(tmp_path / "bad.jsonl", to_jsonl([*PASSAGES[:4], passage]))
    argv = evaluate_argv(tmp_path, passages=path, save_index_path=tmp_path / "index", retrieve_only=True)
    assert_refused(argv, f"atlas: {path}:5: ", message)
    assert not (tmp_path / "index").exists()


def test_a_format_with_an_unknown_field_is_refused(assert_refused, tmp_path):
    """--retriever_format with a field that no passage has: the message names the passage, the field and the format."""
    assert_refused(evaluate_argv(tmp_path, retriever_format="{titel}"), "passage 1: no field 'titel'", "'{titel}'")
