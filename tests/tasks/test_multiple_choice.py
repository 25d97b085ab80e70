"""Multiple choice: prompts and averages equal the reference's; orders of the options; options with equal texts."""

import copy
import gzip
import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.multiple_choice import (
    MAX_PROMPT_TOKENS,
    TIE_MARGIN,
    MultipleChoice,
    count_orders,
    option_order,
)

ROW = {"question": "Why?", "options": {"A": "yes", "B": "no", "C": "maybe", "D": "never"}, "answer": "B"}


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The reader's tokenizer."""
    return Tokenizer.load(golden / "assets" / "reader")


@pytest.fixture(scope="module")
def rows(golden):
    """Rows of 114 MMLU questions."""
    return [json.loads(line) for line in (golden / "mmlu_eval.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def predictions(golden):
    """The reference's predictions file for the same rows, with cyclic permutations."""
    with gzip.open(golden / "exp" / "mmlu" / "mmlu_eval-step-1.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def token_count(tokenizer, text):
    """Returns the number of tokens of a text, including `</s>`."""
    return len(tokenizer.add_special_tokens(tokenizer.ids([text])[0]))


def make_row(*texts, answer="A", question="Why?"):
    return {"question": question, "options": dict(zip("ABCDE", texts, strict=False)), "answer": answer}


def examples_of(task, row, tokenizer, number=0):
    """All examples of a row."""
    return [task.example(row, which, number, tokenizer) for which in range(task.examples_per_row)]


def option_orders(count, permutations):
    """All orders of options."""
    return [option_order(count, permutations, which) for which in range(count_orders(count, permutations))]


def ordered_json(value):
    """Returns JSON text, which is equal only if keys are in the same order."""
    return json.dumps(value, ensure_ascii=False)


def test_examples_equal_the_reference(tokenizer, rows, predictions):
    """Query, target, answers, and metadata with its key order, of all 456; one question is cut."""
    task, cut, compared = MultipleChoice(permutations="cyclic"), 0, 0
    for number, (row, line) in enumerate(zip(rows, predictions, strict=True)):
        row_before = copy.deepcopy(row)
        examples = examples_of(task, row, tokenizer, number)
        for example, permuted in zip(examples, line["permutations"], strict=True):
            assert example.query == permuted["query"]
            assert example.answers == permuted["answers"]
            assert example.target == f"<extra_id_0> {permuted['answers'][0]}"
            assert ordered_json(example.metadata) == ordered_json(permuted["metadata"])
            compared += 1
        assert row == row_before
        cut += row["question"].strip() not in examples[0].query
    assert (compared, cut) == (456, 1)


def test_merged_records_equal_the_reference(rows, predictions):
    """From the reference's logits: averages and all probabilities to float32, generation, and the record's key order.

    Nine rows tie: their prompts are cut before the options, so every order gives the same logits. For these the first
    option is chosen, where the reference's choice depends on rounding.
    """
    task, ties = MultipleChoice(permutations="cyclic"), 0
    for row, golden in zip(rows, predictions, strict=True):
        line, scores = task.merge_records(copy.deepcopy(golden["permutations"]))
        assert list(line) == list(golden)
        assert line["choice_probs"] == pytest.approx(golden["choice_probs"], abs=1e-6)
        assert list(line["all_probs"]) == list(golden["all_probs"])
        for text, probabilities in golden["all_probs"].items():
            assert line["all_probs"][text] == pytest.approx(probabilities, abs=1e-6)
        for field in ("query", "answers", "metadata", "permutations"):
            assert ordered_json(line[field]) == ordered_json(golden[field])
        *_, second, first = sorted(golden["choice_probs"].values())
        tie = first - second < TIE_MARGIN
        assert line["generation"] == ("A" if tie else golden["generation"])
        assert scores == {"debiased_accuracy": float(line["generation"] == row["answer"])}
        ties += tie
    assert ties == 9


@pytest.mark.parametrize(("margin", "chosen"), [(1e-7, "A"), (3e-6, "C")])
def test_the_first_of_tied_options_is_chosen(margin, chosen):
    """C wins over A only by more than TIE_MARGIN, so rounding decides nothing; NaN logits give the first option."""
    logits = {letter: math.log(p) for letter, p in zip("ABCD", (0.3, 0.3, 0.3 + margin, 0.1 - margin), strict=True)}
    line, scores = MultipleChoice().merge_records([{"metadata": ROW, "choice_logits": logits}])
    assert line["generation"] == chosen
    assert scores == {"debiased_accuracy": 0.0}
    line, _ = MultipleChoice().merge_records([{"metadata": ROW, "choice_logits": dict.fromkeys("ABCD", math.nan)}])
    assert line["generation"] == "A"  # a reader that has diverged is still scored


@pytest.mark.parametrize("options", range(1, 6))
def test_option_orders_are_distinct_permutations(options):
    """There are one, as many as options, or their factorial; the first is the original, cyclic ones rotate it."""
    original = tuple(range(options))
    for permutations, expected in (("single", 1), ("cyclic", options), ("all", math.factorial(options))):
        orders = option_orders(options, permutations)
        assert len(orders) == len(set(orders)) == expected
        assert orders[0] == original
        assert permutations != "all" or orders == list(itertools.permutations(original))
        assert all(sorted(order) == list(original) for order in orders)
    options_by_letter = list(zip(*option_orders(options, "cyclic"), strict=True))
    assert all(sorted(at_letter) == list(original) for at_letter in options_by_letter)  # each option once per letter
    assert option_orders(4, "cyclic")[1] == (3, 0, 1, 2)  # the last option comes to the front


def test_one_order_of_many_is_made_without_the_others(tokenizer):
    """Ten options have 3,628,800 orders; the last is the reversed one, and an evaluation takes some of all of them."""
    row = {"question": "Why?", "options": {letter: f"text {n}" for n, letter in enumerate("ABCDEFGHIJ")}, "answer": "A"}
    task = MultipleChoice(10, "all")
    assert task.examples_per_row == 3_628_800
    example = task.example(row, 3_628_799, 0, tokenizer)
    assert list(example.metadata["options"].values()) == [f"text {n}" for n in reversed(range(10))]
    assert example.answers == ["J"]
    few = MultipleChoice(10, "all", max_orders=7)
    orders = [few.order(which) for which in range(few.examples_per_row)]
    assert len(orders) == len(set(orders)) == 7
    assert orders[0] == tuple(range(10))
    assert {order[0] for order in orders} == {0, 1, 2, 4, 5, 7, 8}  # spread over all
    assert MultipleChoice(4, "cyclic", max_orders=7).examples_per_row == 4


@pytest.mark.parametrize("options", [2, 4, 5])
@pytest.mark.parametrize("permutations", ["single", "cyclic", "all"])
def test_the_answer_moves_with_its_option(tokenizer, options, permutations):
    """In every order the answer is the letter of the right text; only the first example is the original."""
    texts = ["north", "south", "east", "west", "up"][:options]
    task = MultipleChoice(options, permutations)
    for right in {0, 1, options - 1}:
        row = make_row(*texts, answer="ABCDE"[right])
        task.check(row)
        examples = examples_of(task, row, tokenizer, 0)
        for example in examples:
            [letter] = example.answers
            assert example.metadata["options"][letter] == texts[right]
            assert f"({letter}) {texts[right]}" in example.query
            assert example.metadata["answer"] == letter
            assert example.metadata["uid"] == "Why?" + " ".join(texts)
        assert [example.metadata["is_original"] for example in examples] == [True] + [False] * (len(examples) - 1)
        assert examples[0].metadata["answer"] == row["answer"]


@pytest.mark.parametrize("permutations", ["cyclic", "all"])
def test_the_answer_moves_with_its_option_among_equal_texts(tokenizer, permutations):
    """B and D are both "2" and D is right: the answer follows D. The reference takes the first letter with "2"."""
    row, task = make_row("1", "2", "3", "2", answer="D"), MultipleChoice(permutations=permutations)
    examples = examples_of(task, row, tokenizer, 0)
    letters_of_d = ["ABCD"[order.index(3)] for order in option_orders(4, permutations)]
    assert [example.answers for example in examples] == [[letter] for letter in letters_of_d]
    reference = [next(k for k, text in e.metadata["options"].items() if text == "2") for e in examples]
    assert reference[0] == "B"  # already in the original order
    assert sum(a != b for a, b in zip(reference, letters_of_d, strict=True)) == len(examples) // 2
    assert sum(example.metadata["is_original"] for example in examples) == 1
    same_texts = [e.metadata["options"] == row["options"] for e in examples]
    assert sum(same_texts) == (2 if permutations == "all" else 1)  # texts alone do not identify the original


def test_options_with_equal_texts_are_averaged_separately(tokenizer):
    """Four options have four probabilities; the reference averages by text, which mixes those of B and D."""
    row, task = make_row("1", "2", "3", "2", answer="D"), MultipleChoice(permutations="cyclic")
    records = []
    for order, example in zip(option_orders(4, "cyclic"), examples_of(task, row, tokenizer, 0), strict=True):
        logits = {letter: math.log([0.1, 0.2, 0.1, 0.6][option]) for letter, option in zip("ABCD", order, strict=True)}
        records.append({"metadata": example.metadata, "choice_logits": logits})
    line, scores = task.merge_records(records)
    assert line["choice_probs"] == pytest.approx({"A": 0.1, "B": 0.2, "C": 0.1, "D": 0.6})
    assert (line["generation"], scores) == ("D", {"debiased_accuracy": 1.0})
    # Reference: probabilities are listed by text, so "2" has those of both options
    assert sorted(line["all_probs"]["2"]) == pytest.approx([0.2] * 4 + [0.6] * 4)
    by_text = {text: sum(ps) / len(ps) for text, ps in line["all_probs"].items()}
    letter_of_text = {text: letter for letter, text in row["options"].items()}  # the last "2" wins: D
    reference = {letter_of_text[text]: p for text, p in by_text.items()}
    assert reference == pytest.approx({"A": 0.1, "C": 0.1, "D": 0.4})  # no B, and a probability of D that no order had


@given(
    logits=st.lists(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3), min_size=3, max_size=3),
    texts=st.lists(st.sampled_from(["x", "y", "z"]), min_size=3, max_size=3),
)
def test_averaged_probabilities_sum_to_1(logits, texts):
    """The sum is 1 for any logits and texts; the generation has the largest probability, to TIE_MARGIN."""
    task, records = MultipleChoice(3, "cyclic"), []
    for order, values in zip(option_orders(3, "cyclic"), logits, strict=True):
        options = {letter: texts[option] for letter, option in zip("ABC", order, strict=True)}
        choice_logits = dict(zip("ABC", values, strict=True))
        records.append({"metadata": {"options": options, "answer": "A"}, "choice_logits": choice_logits})
    line, _ = task.merge_records(records)
    assert sum(line["choice_probs"].values()) == pytest.approx(1)
    assert line["choice_probs"][line["generation"]] == pytest.approx(max(line["choice_probs"].values()), abs=TIE_MARGIN)
    assert sum(map(len, line["all_probs"].values())) == 9


def test_a_merged_record_keeps_the_fields_of_the_first_record():
    """All but the logits, such as passages and id; the records themselves are not changed."""
    records = [
        {"query": "q", "passages": [], "metadata": ROW, "choice_logits": dict.fromkeys("ABCD", 0.0), "id": 7},
    ]
    line, _ = MultipleChoice().merge_records(records)
    assert list(line) == [
        "query",
        "passages",
        "metadata",
        "id",
        "generation",
        "choice_probs",
        "all_probs",
        "permutations",
    ]
    assert line["permutations"] == records
    assert "choice_logits" in records[0]


def test_a_long_question_loses_its_start(tokenizer):
    """A prompt of over 356 tokens keeps the question's last tokens, 356 in all; the longest that fits is not cut."""
    task, listed = MultipleChoice(), "(A) yes (B) no (C) maybe (D) never"
    tokens_of_empty_prompt = token_count(tokenizer, f"question:  options: {listed} answer: <extra_id_0>")
    words = ["tribe"] * 400
    while (
        token_count(tokenizer, f"question: {' '.join(words)} options: {listed} answer: <extra_id_0>")
        > MAX_PROMPT_TOKENS
    ):
        words.pop()
    fits = " ".join(words)
    assert fits in task.prompt(fits, ROW["options"], tokenizer)
    question = f"first words of it {fits} and the last"
    query = task.prompt(question, ROW["options"], tokenizer)
    kept_question = query.removeprefix("question: ").removesuffix(f" options: {listed} answer: <extra_id_0>")
    ids = tokenizer.add_special_tokens(tokenizer.ids([question])[0])
    assert kept_question == tokenizer.decode(ids[-(MAX_PROMPT_TOKENS - tokens_of_empty_prompt) :]).strip()
    assert question.endswith(kept_question)
    assert "first" not in kept_question
    assert token_count(tokenizer, query) <= MAX_PROMPT_TOKENS


@pytest.mark.parametrize("excess", [-1, 0, 1, 3])
def test_options_over_the_limit_cut_the_start_of_the_question(tokenizer, excess):
    """Reference: `tokens[-budget:]` drops `excess` tokens for a negative budget, and keeps all for a budget of 0."""

    def length(option):
        return token_count(tokenizer, f"question:  options: (A) {option} (B) no answer: <extra_id_0>")

    assert length("the the") == length("the") + 1  # one token per word
    option = " ".join(["the"] * (1 + MAX_PROMPT_TOKENS + excess - length("the")))
    assert length(option) == MAX_PROMPT_TOKENS + excess
    query = MultipleChoice(2).prompt("one two three four five", {"A": option, "B": "no"}, tokenizer)
    ids = tokenizer.add_special_tokens(tokenizer.ids(["one two three four five"])[0])
    kept_ids = {-1: ids[-1:], 0: ids, 1: ids[1:], 3: ids[3:]}[excess]
    assert query.startswith(f"question: {tokenizer.decode(kept_ids).strip()} options: (A) the the")
    assert query.endswith(f"{option} (B) no answer: <extra_id_0>")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "`question` is not a text"),
        ({"options": ["yes"]}, "`options` is not an object of letters and texts"),
        ({"answer": 1}, "`answer` is not the letter of an option"),
        ({"answer": "E"}, "`answer` is 'E', no option; it must be one of A, B, C, D"),
        ({"answer": "no"}, "`answer` is 'no', no option"),
        ({"options": {"A": "a", "B": "b", "C": "c", "D": None}}, "option D is not a text"),
        (
            {"options": {"A": "a", "B": "b"}},
            "`options` has A, B where --multiple_choice_num_options 4 means A, B, C, D",
        ),
        ({"options": {}}, "`options` has nothing where"),
        ({"options": {"a": "1", "b": "2", "c": "3", "d": "4"}}, "`options` has a, b, c, d where"),
    ],
)
def test_invalid_rows_are_errors(changes, message):
    """The ValueError says in one line what is wrong and what is needed, or that the field is missing."""
    MultipleChoice().check(ROW)
    with pytest.raises(ValueError, match=message) as error:
        MultipleChoice().check(ROW | changes)
    assert "\n" not in str(error.value)
    for field in ROW:
        with pytest.raises(ValueError, match=f"`{field}` is missing"):
            MultipleChoice().check({name: value for name, value in ROW.items() if name != field})


def test_options_may_be_listed_in_any_order(tokenizer):
    """The query lists options by letter; `uid` joins them in the row's order, as in the reference."""
    row = {"question": "Why?", "options": {"D": "d", "B": "b", "A": "a", "C": "c"}, "answer": "D", "id": 3}
    example = MultipleChoice().example(row, 0, 0, tokenizer)
    assert example.query == "question: Why? options: (A) a (B) b (C) c (D) d answer: <extra_id_0>"
    assert example.metadata["uid"] == "Why?d b a c"
    assert example.passages == [{"title": "", "text": ""}]  # Reference: the row's own passages are not read


def test_accuracy_requires_exactly_the_letter():
    """Another case, a space or a bracket does not match; `choices` are the letters."""
    task = MultipleChoice()
    scores = {text: task.score(text, ["B"])["accuracy"] for text in ("B", "b", " B", "(B)", "A", "")}
    assert scores == {"B": 1.0, "b": 0.0, " B": 0.0, "(B)": 0.0, "A": 0.0, "": 0.0}
    assert task.choices == "ABCD"
    assert MultipleChoice(2).choices == "AB"
