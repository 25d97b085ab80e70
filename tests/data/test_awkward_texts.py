"""Ids of texts that are no plain English, by the tokenizers of the sample: equal to what tokenizers of others give."""

import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.data.tokens import Tokenizer

ASSETS = Path(__file__).parents[1] / "golden" / "assets"
SAMPLE = Path(__file__).parents[2] / "atlas_jax" / "sample"
TOKENIZERS = {name: Tokenizer.load(SAMPLE / name) for name in ("reader", "retriever")}
SENTENCEPIECE = sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "reader" / "spiece.model"))

names = pytest.mark.parametrize("name", TOKENIZERS)

GOLDEN = {row["what"]: row for row in json.loads(Path(__file__).with_name("tokens.json").read_text())}
DIFFER = {
    ("unassigned", "retriever"),
    ("next_line", "reader"),
    ("composed_twice", "reader"),
}  # fast from slow, upstream


def golden_text(what: str) -> str:
    text = GOLDEN[what]["text"]
    return text if isinstance(text, str) else text[0] * text[1]


def is_golden(ids: list[int], golden: dict) -> bool:
    """Whether these are the ids of tokens.json, which has only a digest of long ones."""
    if "ids" in golden:
        return ids == golden["ids"]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return (len(ids), digest) == (golden["count"], golden["sha256"])


@names
@pytest.mark.parametrize("what", GOLDEN)
def test_awkward_texts_equal_the_slow_tokenizers(name, what):
    """Sentinels, unknown letters, emoji, right to left, white space, NUL, words of 100 000: the ids of others.

    `make_tokens.py` took them from sentencepiece and from BERT's tokenizer in Python. Three are known to differ from
    the fast tokenizers, which the reference uses too: an unassigned character, U+0085, a mark after a ligature.
    """
    tokenizer = TOKENIZERS[name]
    [ids] = tokenizer.ids([golden_text(what)])
    assert is_golden(tokenizer.finish(ids), GOLDEN[what][name]) == ((what, name) not in DIFFER)


def test_the_goldens_have_the_tokenizers_of_the_sample():
    """What holds for the tokenizers that come with the package holds for those of the goldens."""
    for name, tokenizer in TOKENIZERS.items():
        assert Tokenizer.load(ASSETS / name).fingerprint == tokenizer.fingerprint


def test_sentinels():
    """T5 counts its sentinels down from the last id, and the space behind one is not a token: `<extra_id_0> A`."""
    reader = TOKENIZERS["reader"]
    assert reader.ids([f"<extra_id_{i}>" for i in range(100)]) == [[1999 - i] for i in range(100)]
    [answer, joined, capital] = reader.ids(["<extra_id_0> A", "<extra_id_0>A", "A"])
    assert answer == joined == [1999, *capital]
    assert reader.target_ids(["<extra_id_0> A"]) == [[1999, *capital, 1]]
    assert 1900 not in reader.ids(["<extra_id_100>"])[0]
    assert not set(range(1900, 2000)) & set(reader.ids(["<extra_id_ 0> extra_id_0 <EXTRA_ID_0>"])[0])


@given(st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me"], exclude_characters="\x85"), max_size=40))
def test_reader_ids_equal_sentencepiece(text):
    """Any text without marks, by the model file that T5 comes with, directly: the same ids."""
    assert TOKENIZERS["reader"].ids([text]) == [SENTENCEPIECE.encode(text)]
