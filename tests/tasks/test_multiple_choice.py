"""Multiple choice: the reference's prompts and averages, every order of the options, and options that are equal."""

import copy
import gzip
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.tokens import Tokenizer
from atlas_jax.tasks.multiple_choice import MAX_PROMPT_TOKENS, TIE, MultipleChoice, orders

ROW = {"question": "Why?", "options": {"A": "yes", "B": "no", "C": "maybe", "D": "never"}, "answer": "B"}


@pytest.fixture(scope="module")
def tokenizer(golden):
    """The reader's."""
    return Tokenizer.load(golden / "assets" / "reader")


@pytest.fixture(scope="module")
def rows(golden):
    """114 MMLU questions."""
    return [json.loads(line) for line in (golden / "mmlu_eval.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def lines(golden):
    """What the reference wrote for each of them, under cyclic orders."""
    with gzip.open(golden / "exp" / "mmlu" / "mmlu_eval-step-1.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def count(tokenizer, text):
    """Tokens of a text, `</s>` among them."""
    return len(tokenizer.finish(tokenizer.ids([text])[0]))


def row_of(*texts, answer="A", question="Why?"):
    return {"question": question, "options": dict(zip("ABCDE", texts, strict=False)), "answer": answer}


def map_in_order(value):
    """JSON text: equal only where the keys come in the same order."""
    return json.dumps(value, ensure_ascii=False)


def test_every_permutation_is_the_reference_s(tokenizer, rows, lines):
    """Query, target, answers, and metadata with its key order, of all 456; one of the questions is cut."""
    task, cut, seen = MultipleChoice(permutations="cyclic"), 0, 0
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        kept = copy.deepcopy(row)
        examples = task.examples(row, number, tokenizer)
        for example, permuted in zip(examples, line["permutations"], strict=True):
            assert example.query == permuted["query"]
            assert example.answers == permuted["answers"]
            assert example.target == f"<extra_id_0> {permuted['answers'][0]}"
            assert map_in_order(example.metadata) == map_in_order(permuted["metadata"])
            seen += 1
        assert row == kept
        cut += row["question"].strip() not in examples[0].query
    assert (seen, cut) == (456, 1)


def test_finished_rows_are_the_reference_s(rows, lines):
    """From its logits the averages, every probability to float32, and its generation; the line has its key order.

    Nine rows tie: their prompts are cut before the options, so every order answers alike. There the first option is
    chosen, where the reference's depends on rounding.
    """
    task, ties = MultipleChoice(permutations="cyclic"), 0
    for row, golden in zip(rows, lines, strict=True):
        line, scores = task.finish(copy.deepcopy(golden["permutations"]))
        assert list(line) == list(golden)
        assert line["choice_probs"] == pytest.approx(golden["choice_probs"], abs=1e-6)
        assert list(line["all_probs"]) == list(golden["all_probs"])
        for text, probabilities in golden["all_probs"].items():
            assert line["all_probs"][text] == pytest.approx(probabilities, abs=1e-6)
        for field in ("query", "answers", "metadata", "permutations"):
            assert map_in_order(line[field]) == map_in_order(golden[field])
        *_, second, first = sorted(golden["choice_probs"].values())
        tie = first - second < TIE
        assert line["generation"] == ("A" if tie else golden["generation"])
        assert scores == {"debiased_accuracy": float(line["generation"] == row["answer"])}
        ties += tie
    assert ties == 9


@pytest.mark.parametrize(("ahead", "chosen"), [(1e-7, "A"), (3e-6, "C")])
def test_the_first_of_equal_options_is_chosen(ahead, chosen):
    """Rounding decides nothing: C has to be ahead by more than that."""
    logits = {letter: math.log(p) for letter, p in zip("ABCD", (0.3, 0.3, 0.3 + ahead, 0.1 - ahead), strict=True)}
    line, scores = MultipleChoice().finish([{"metadata": ROW, "choice_logits": logits}])
    assert line["generation"] == chosen
    assert scores == {"debiased_accuracy": 0.0}
    line, _ = MultipleChoice().finish([{"metadata": ROW, "choice_logits": dict.fromkeys("ABCD", math.nan)}])
    assert line["generation"] == "A"  # a reader that has diverged still gets to its scores


@pytest.mark.parametrize("options", range(1, 6))
def test_the_orders_of_so_many_options(options):
    """One, as many as options, or their factorial; each shows every option once, the first is their own."""
    own = tuple(range(options))
    for permutations, expected in (("single", 1), ("cyclic", options), ("all", math.factorial(options))):
        found = orders(options, permutations)
        assert len(found) == len(set(found)) == expected
        assert found[0] == own
        assert all(sorted(order) == list(own) for order in found)
    at_each_place = list(zip(*orders(options, "cyclic"), strict=True))
    assert all(sorted(place) == list(own) for place in at_each_place)  # each option once at each letter
    assert orders(4, "cyclic")[1] == (3, 0, 1, 2)  # the last option comes to the front


@pytest.mark.parametrize("options", [2, 4, 5])
@pytest.mark.parametrize("permutations", ["single", "cyclic", "all"])
def test_the_answer_moves_with_its_option(tokenizer, options, permutations):
    """Under every order the letter stands before the right text, and exactly one example is the original."""
    texts = ["north", "south", "east", "west", "up"][:options]
    task = MultipleChoice(options, permutations)
    for right in {0, 1, options - 1}:
        row = row_of(*texts, answer="ABCDE"[right])
        task.check(row)
        examples = task.examples(row, 0, tokenizer)
        for example in examples:
            [letter] = example.answers
            assert example.metadata["options"][letter] == texts[right]
            assert f"({letter}) {texts[right]}" in example.query
            assert example.metadata["answer"] == letter
            assert example.metadata["uid"] == "Why?" + " ".join(texts)
        assert [example.metadata["is_original"] for example in examples] == [True] + [False] * (len(examples) - 1)
        assert examples[0].metadata["answer"] == row["answer"]


@pytest.mark.parametrize("permutations", ["cyclic", "all"])
def test_equal_options_keep_the_right_letter(tokenizer, permutations):
    """ "2" stands at B and D and D is right: the letter follows D. The reference takes the first "2" that it sees."""
    row, task = row_of("1", "2", "3", "2", answer="D"), MultipleChoice(permutations=permutations)
    examples = task.examples(row, 0, tokenizer)
    follows = ["ABCD"[order.index(3)] for order in orders(4, permutations)]
    assert [example.answers for example in examples] == [[letter] for letter in follows]
    theirs = [next(k for k, text in e.metadata["options"].items() if text == "2") for e in examples]
    assert theirs[0] == "B"  # already in the original order
    assert sum(a != b for a, b in zip(theirs, follows, strict=True)) == len(examples) // 2
    assert sum(example.metadata["is_original"] for example in examples) == 1
    swapped = [e.metadata["options"] == row["options"] for e in examples]
    assert sum(swapped) == (2 if permutations == "all" else 1)  # by the texts there would be two originals


def test_equal_options_are_averaged_apart(tokenizer):
    """Four options have four probabilities; the reference's average by text gives D half of B's."""
    row, task = row_of("1", "2", "3", "2", answer="D"), MultipleChoice(permutations="cyclic")
    records = []
    for order, example in zip(orders(4, "cyclic"), task.examples(row, 0, tokenizer), strict=True):
        logits = {letter: math.log([0.1, 0.2, 0.1, 0.6][option]) for letter, option in zip("ABCD", order, strict=True)}
        records.append({"metadata": example.metadata, "choice_logits": logits})
    line, scores = task.finish(records)
    assert line["choice_probs"] == pytest.approx({"A": 0.1, "B": 0.2, "C": 0.1, "D": 0.6})
    assert (line["generation"], scores) == ("D", {"debiased_accuracy": 1.0})
    assert sorted(line["all_probs"]["2"]) == pytest.approx([0.2] * 4 + [0.6] * 4)  # Reference: by text, both options
    by_text = {text: sum(ps) / len(ps) for text, ps in line["all_probs"].items()}
    letter_of_text = {text: letter for letter, text in row["options"].items()}  # the last "2" wins: D
    theirs = {letter_of_text[text]: p for text, p in by_text.items()}
    assert theirs == pytest.approx({"A": 0.1, "C": 0.1, "D": 0.4})  # no B, and a D that no order had


@given(
    logits=st.lists(st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3), min_size=3, max_size=3),
    texts=st.lists(st.sampled_from(["x", "y", "z"]), min_size=3, max_size=3),
)
def test_averages_are_probabilities(logits, texts):
    """They add up to 1 whatever the logits and the texts, and the generation is the greatest of them, or ties."""
    task, records = MultipleChoice(3, "cyclic"), []
    for order, values in zip(orders(3, "cyclic"), logits, strict=True):
        options = {letter: texts[option] for letter, option in zip("ABC", order, strict=True)}
        choice_logits = dict(zip("ABC", values, strict=True))
        records.append({"metadata": {"options": options, "answer": "A"}, "choice_logits": choice_logits})
    line, _ = task.finish(records)
    assert sum(line["choice_probs"].values()) == pytest.approx(1)
    assert line["choice_probs"][line["generation"]] == pytest.approx(max(line["choice_probs"].values()), abs=TIE)
    assert sum(map(len, line["all_probs"].values())) == 9


def test_a_finished_row_keeps_what_evaluation_put_there():
    """Passages and id stay, of the original order; its own logits do not, and the records are left as they were."""
    records = [
        {"query": "q", "passages": [], "metadata": ROW, "choice_logits": dict.fromkeys("ABCD", 0.0), "id": 7},
    ]
    line, _ = MultipleChoice().finish(records)
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
    """What stays is the question's last tokens, as many as leave 356 in all; one token fewer and nothing is cut."""
    task, listed = MultipleChoice(), "(A) yes (B) no (C) maybe (D) never"
    empty = count(tokenizer, f"question:  options: {listed} answer: <extra_id_0>")
    words = ["tribe"] * 400
    while count(tokenizer, f"question: {' '.join(words)} options: {listed} answer: <extra_id_0>") > MAX_PROMPT_TOKENS:
        words.pop()
    fits = " ".join(words)
    assert fits in task.prompt(fits, ROW["options"], tokenizer)
    question = f"first words of it {fits} and the last"
    query = task.prompt(question, ROW["options"], tokenizer)
    kept = query.removeprefix("question: ").removesuffix(f" options: {listed} answer: <extra_id_0>")
    ids = tokenizer.finish(tokenizer.ids([question])[0])
    assert kept == tokenizer.decode(ids[-(MAX_PROMPT_TOKENS - empty) :]).strip()
    assert question.endswith(kept)
    assert "first" not in kept
    assert count(tokenizer, query) <= MAX_PROMPT_TOKENS


@pytest.mark.parametrize("excess", [-1, 0, 1, 3])
def test_options_that_are_too_long_cut_the_other_side(tokenizer, excess):
    """Reference: with a rest below zero the slice drops so many tokens in front; with none it keeps them all."""

    def length(option):
        return count(tokenizer, f"question:  options: (A) {option} (B) no answer: <extra_id_0>")

    assert length("the the") == length("the") + 1  # a token a word
    option = " ".join(["the"] * (1 + MAX_PROMPT_TOKENS + excess - length("the")))
    assert length(option) == MAX_PROMPT_TOKENS + excess
    query = MultipleChoice(2).prompt("one two three four five", {"A": option, "B": "no"}, tokenizer)
    ids = tokenizer.finish(tokenizer.ids(["one two three four five"])[0])
    kept = {-1: ids[-1:], 0: ids, 1: ids[1:], 3: ids[3:]}[excess]
    assert query.startswith(f"question: {tokenizer.decode(kept).strip()} options: (A) the the")
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
def test_rows_that_cannot_be_used(changes, message):
    """What is wrong and what belongs there, in one line; a field that is not there is missing."""
    MultipleChoice().check(ROW)
    with pytest.raises(ValueError, match=message) as error:
        MultipleChoice().check(ROW | changes)
    assert "\n" not in str(error.value)
    for field in ROW:
        with pytest.raises(ValueError, match=f"`{field}` is missing"):
            MultipleChoice().check({name: value for name, value in ROW.items() if name != field})


def test_options_may_be_written_in_any_order(tokenizer):
    """They are shown by letter; `uid` joins them as they are written, as the reference does."""
    row = {"question": "Why?", "options": {"D": "d", "B": "b", "A": "a", "C": "c"}, "answer": "D", "id": 3}
    [example] = MultipleChoice().examples(row, 0, tokenizer)
    assert example.query == "question: Why? options: (A) a (B) b (C) c (D) d answer: <extra_id_0>"
    assert example.metadata["uid"] == "Why?d b a c"
    assert example.passages == [{"title": "", "text": ""}]  # Reference: the row's own are not read


def test_the_letter_alone_is_accurate():
    """Accuracy is of the text itself: no case, space or bracket is forgiven."""
    task = MultipleChoice()
    scores = {text: task.score(text, ["B"])["accuracy"] for text in ("B", "b", " B", "(B)", "A", "")}
    assert scores == {"B": 1.0, "b": 0.0, " B": 0.0, "(B)": 0.0, "A": 0.0, "": 0.0}
    assert task.choices == "ABCD"
    assert MultipleChoice(2).choices == "AB"
