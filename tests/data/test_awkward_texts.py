"""Ids of unusual texts by the sample's tokenizers: equal to those of independent tokenizers (`make_tokens.py`)."""

import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st

from atlas_jax.data.tokens import Tokenizer

ASSETS = Path(__file__).parents[1] / "golden" / "assets"
SAMPLE = Path(__file__).parents[2] / "atlas_jax" / "sample"
TOKENIZERS = {name: Tokenizer.load(SAMPLE / name) for name in ("reader", "retriever")}
SENTENCEPIECE = sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / "reader" / "spiece.model"))

names = pytest.mark.parametrize("name", TOKENIZERS)

GOLDENS = {row["what"]: row for row in json.loads(Path(__file__).with_name("tokens.json").read_text())}
KNOWN_DIFFERENCES = {  # texts whose ids differ between Hugging Face's fast and slow tokenizers
    ("unassigned", "retriever"),
    ("composed_twice", "reader"),
}


def golden_text(text_name: str) -> str:
    text = GOLDENS[text_name]["text"]
    return text if isinstance(text, str) else text[0] * text[1]


def equals_golden(ids: list[int], golden: dict) -> bool:
    """Returns whether the ids are those of tokens.json, which has only a digest of long lists."""
    if "ids" in golden:
        return ids == golden["ids"]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return (len(ids), digest) == (golden["count"], golden["sha256"])


@names
@pytest.mark.parametrize("text_name", GOLDENS)
def test_ids_of_unusual_texts_equal_the_slow_tokenizers(name, text_name):
    """Sentinels, unknown letters, emoji, right to left, white space, NUL, words of 100 000 letters: the goldens' ids.

    `make_tokens.py` took the goldens from sentencepiece and from BERT's tokenizer in Python. The fast tokenizers, which
    the reference uses too, are known to differ for three: an unassigned character, U+0085, a mark after a ligature.
    """
    tokenizer = TOKENIZERS[name]
    [ids] = tokenizer.ids([golden_text(text_name)])
    assert equals_golden(tokenizer.add_special_tokens(ids), GOLDENS[text_name][name]) == (
        (text_name, name) not in KNOWN_DIFFERENCES
    )


def test_sample_and_goldens_have_the_same_tokenizers():
    """The tokenizers in the package's sample have the fingerprints of those in the goldens."""
    for name, tokenizer in TOKENIZERS.items():
        assert Tokenizer.load(ASSETS / name).fingerprint == tokenizer.fingerprint


def test_t5_sentinels_count_down_and_absorb_the_next_space():
    """`<extra_id_0>` has the last id; `<extra_id_0> A` equals `<extra_id_0>A`; other spellings are no sentinels."""
    reader = TOKENIZERS["reader"]
    assert reader.ids([f"<extra_id_{i}>" for i in range(100)]) == [[1999 - i] for i in range(100)]
    [spaced, unspaced, letter] = reader.ids(["<extra_id_0> A", "<extra_id_0>A", "A"])
    assert spaced == unspaced == [1999, *letter]
    assert reader.target_ids(["<extra_id_0> A"]) == [[1999, *letter, 1]]
    assert 1900 not in reader.ids(["<extra_id_100>"])[0]
    assert not set(range(1900, 2000)) & set(reader.ids(["<extra_id_ 0> extra_id_0 <EXTRA_ID_0>"])[0])


@given(st.text(st.characters(exclude_categories=["Cs", "Mn", "Mc", "Me"], exclude_characters="\x85"), max_size=40))
def test_reader_ids_equal_sentencepiece(text):
    """Any text without combining marks and special tokens has the ids that the sentencepiece library gives."""
    assume(not any(special in text for special in ("</s>", "<pad>", "<unk>", "<extra_id_")))
    assert TOKENIZERS["reader"].ids([text]) == [SENTENCEPIECE.encode(text)]
