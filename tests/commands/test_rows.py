"""Broken questions and passages: exit status 2 and one line that says where and what to do about it."""

import pytest

from atlas_jax.commands.main import main
from atlas_jax.data import jsonl
from tests.commands.sample_run import PASSAGES, ROWS, command, lines, put

GOOD = lines(ROWS[:1])
DAMAGED = {  # content -> line (None: the file), and what is said
    "malformed": (GOOD + b'{"question": }\n' + GOOD, 2, "not valid JSON"),
    "truncated": (GOOD + GOOD[:40], 2, "truncated"),
    "utf8": (GOOD + b'{"question": "\xff"}\n', 2, "invalid UTF-8 at byte 15 of the line; save the file as UTF-8"),
    "too_long": (GOOD + b'{"question": "' + b"x" * jsonl.MAX_LINE_BYTES + b'"}\n', 2, "longer than 16777216 bytes"),
    "no_object": (GOOD + b"\n" + b'["question"]\n', 3, "must be a JSON object, found a list"),
    "empty": (b"", None, "no rows, the file is empty"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_questions(refused, no_weights, tmp_path, case):
    """Damage in --eval_data is found before weights are loaded, and the file and the line are named."""
    content, line, said = DAMAGED[case]
    path = put(tmp_path / "bad.jsonl", content)
    refused(command(tmp_path, eval_data=path), f"atlas: {path}{f':{line}' if line else ''}: ", said)


def test_good_questions_reach_the_weights(no_weights, tmp_path):
    """The counter-case of the tests around: nothing but the bad row stops them."""
    with pytest.raises(AssertionError, match="the weights are loaded"):
        main(command(tmp_path))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_passages(refused, tmp_path, case):
    """The same of --passages; no half index stays in --save_index_path."""
    content, line, said = DAMAGED[case]
    path = put(tmp_path / "bad.jsonl", content.replace(b'"question": "', b'"id": "1", "text": "'))
    argv = command(tmp_path, passages=path, save_index_path=tmp_path / "index", retrieve_only=True)
    refused(argv, f"atlas: {path}{f':{line}' if line else ''}: ", said if case != "utf8" else "invalid UTF-8")
    assert not (tmp_path / "index").exists()


def dropped(row: dict, field: str) -> dict:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (dropped(ROWS[0], "question"), "`question` is missing"),
        (dropped(ROWS[0], "options"), "`options` is missing"),
        (dropped(ROWS[0], "answer"), "`answer` is missing"),
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
def test_questions_that_do_not_fit_the_task(refused, no_weights, tmp_path, row, said):
    """A row that is no question of four options is named by file and line before weights are loaded."""
    path = put(tmp_path / "bad.jsonl", lines([ROWS[0], row]))
    refused(command(tmp_path, eval_data=path), f"atlas: {path}:2: ", said)


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        (dropped(PASSAGES[0], "id"), 'a passage without "id"; add the field or remove the passage'),
        (dropped(PASSAGES[0], "text"), 'a passage without "text"; add'),
        (PASSAGES[0] | {"title": 2001}, '"title" must be a string'),
        (PASSAGES[0] | {"text": None}, '"text" must be a string'),
    ],
)
def test_passages_that_do_not_fit(refused, tmp_path, passage, said):
    """A passage without id or text is named by file and line, and no half index stays."""
    path = put(tmp_path / "bad.jsonl", lines([*PASSAGES[:4], passage]))
    argv = command(tmp_path, passages=path, save_index_path=tmp_path / "index", retrieve_only=True)
    refused(argv, f"atlas: {path}:5: ", said)
    assert not (tmp_path / "index").exists()


def test_a_format_that_asks_for_an_unknown_field(refused, tmp_path):
    """--retriever_format with a field that no passage has: the passage, the field, the format."""
    refused(command(tmp_path, retriever_format="{titel}"), "passage 1: no field 'titel'", "'{titel}'")
