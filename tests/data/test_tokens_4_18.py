"""Ids and texts of transformers 4.18.0, which the reference pins, by a T5 folder that holds only spiece.model.

tokens_4_18.jsonl.xz: 399 texts with that version's ids and its decoded texts, without and with special tokens.
"""

import json
import lzma
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from atlas_jax.data.tokens import Tokenizer, clean_up_spaces
from atlas_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
SPIECE = GOLDEN / "assets" / "reader" / "spiece.model"
with lzma.open(GOLDEN / "tokens_4_18.jsonl.xz", "rt", encoding="utf-8") as lines:
    ROWS = [json.loads(line) for line in lines]


parts = st.lists(st.text(max_size=6) | st.sampled_from(["<extra_id_0>", "</s>", " ", "▁", "\ufffd", "x"])).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """Of a folder as T5 1.1 and lm-adapt are published, but for weights: spiece.model alone."""
    folder = tmp_path_factory.mktemp("spiece")
    shutil.copy(SPIECE, folder)
    return Tokenizer.load(folder)


def ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text with special tokens."""
    return [tokenizer.add_special_tokens(row) for row in tokenizer.ids(texts)]


def test_ids_and_texts_equal_transformers_4_18(tokenizer):
    """Every text has the ids of then, and every list of ids the two texts of then."""
    assert len(ROWS) == 399
    assert ids(tokenizer, [row["text"] for row in ROWS]) == [row["ids"] for row in ROWS]
    assert [tokenizer.decode(row["ids"]) for row in ROWS] == [row["decoded"] for row in ROWS]
    decoded = [tokenizer.decode(row["ids"], skip_special_tokens=False) for row in ROWS]
    assert decoded == [row["decoded_all"] for row in ROWS]


def test_a_space_before_a_sentinel_or_at_the_end_is_a_piece(tokenizer):
    """`answer: <extra_id_0>` has the piece `▁`, id 3 in T5's vocabulary, before the sentinel."""
    [sentinel], [space] = tokenizer.ids(["<extra_id_0>"]), tokenizer.ids([" "])
    answer, spaced, with_sentinel = tokenizer.ids(["answer:", "answer: ", "answer: <extra_id_0>"])
    assert len(space) == len(sentinel) == 1
    assert spaced == answer + space
    assert with_sentinel == answer + space + sentinel


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path, tokenizer):
    """A folder whose tokenizer.json splits at white space keeps those ids, which differ from the golden ones."""
    tokenizer.save(tmp_path)
    core = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), core.pre_tokenizer])
    core.save(str(tmp_path / "tokenizer.json"))
    texts = [row["text"] for row in ROWS]
    loaded = ids(Tokenizer.load(tmp_path), texts)
    assert loaded == [encoding.ids for encoding in core.encode_batch(texts)]
    assert sum(a != row["ids"] for a, row in zip(loaded, ROWS, strict=True)) == 249


@pytest.mark.parametrize(
    ("config", "expected"), [({}, "A.B, c? didn't"), ({"clean_up_tokenization_spaces": False}, "A .B , c ? did n't")]
)
def test_decoding_cleans_up_unless_the_configuration_says_otherwise(tmp_path, tokenizer, config, expected):
    """A tokenizer.json beside a configuration that is silent on it: spaces before punctuation are dropped."""
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.decode(loaded.ids(["A .B , c ? did n't"])[0]) == expected


def test_clean_up_replaces_in_the_order_of_transformers():
    """Each replacement of version 4.18, one text in which their order matters, and one without any."""
    assert clean_up_spaces("a . b ? c ! d , e ' f do n't i 'm it 's we 've you 're") == (
        "a. b? c! d, e'f don't i'm it's we've you're"
    )
    assert clean_up_spaces("a ' . ' b") == "a '.'b"  # " ." first; " ' " first would give "a'.'b"
    assert clean_up_spaces("a (b) c; d-e") == "a (b) c; d-e"


@given(parts, st.text(max_size=8))
def test_query_and_passage_may_be_tokenized_apart(tokenizer, a, b):
    """`splits_at_spaces` holds: any two texts around a space, if the tokenizer `splits_after` the first."""
    assert tokenizer.splits_at_spaces
    assume(tokenizer.splits_after(a))
    left, right, whole = tokenizer.ids([a, f" {b}", f"{a} {b}"])
    assert left + right == whole


def test_a_text_that_normalizes_to_a_space_cannot_end_a_part(tokenizer):
    """U+FFFD becomes a space, which joins with the next one; tokenizing apart would count both."""
    assert not tokenizer.splits_after("x\ufffd")
    left, right, whole = tokenizer.ids(["x\ufffd", " y", "x\ufffd y"])
    assert left + right != whole


def test_saving_carries_spiece_model_and_the_ids(tmp_path, tokenizer):
    """A saved tokenizer has the same ids, texts and fingerprint, and brings spiece.model for other programs."""
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (tmp_path / "spiece.model").read_bytes() == SPIECE.read_bytes()
    assert ids(loaded, [row["text"] for row in ROWS]) == [row["ids"] for row in ROWS]
    assert [loaded.decode(row["ids"]) for row in ROWS] == [row["decoded"] for row in ROWS]


def test_the_configuration_names_sentinels_and_added_tokens(tmp_path):
    """extra_ids and additional_special_tokens of tokenizer_config.json, and tokens that added_tokens.json appends."""
    shutil.copy(SPIECE, tmp_path)
    sentinels = [f"<extra_id_{i}>" for i in range(5)]
    config = {"extra_ids": 5, "additional_special_tokens": [*sentinels, "<new>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra_id_0>": 1904, "[Q]": 1906}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.ids([*sentinels, "<new>", "[Q]"]) == [[1904], [1903], [1902], [1901], [1900], [1905], [1906]]
    assert len(tokenizer.ids(["<extra_id_5>"])[0]) > 1
    assert tokenizer.decode([1904, 1905]) == ""
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[Q]": 1950}))
    with pytest.raises(UserError, match=r"added_tokens.json has \[Q\] as 1950, the vocabulary as 1906"):
        Tokenizer.load(tmp_path)


def test_damaged_sentencepiece_models_are_errors(tmp_path):
    """A cut file, and a model that is not a unigram model: one line that names the folder."""
    from sentencepiece import sentencepiece_model_pb2

    (tmp_path / "spiece.model").write_bytes(SPIECE.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{tmp_path}: the tokenizer cannot be loaded .*repair its files"):
        Tokenizer.load(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString(SPIECE.read_bytes())
    proto.trainer_spec.model_type = 2
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="not a unigram model"):
        Tokenizer.load(tmp_path)
