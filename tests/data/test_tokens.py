"""Text to ids: equal to Hugging Face and the reference, and which tokenizers can split a text at a space; padding."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from huggingface_hub import constants
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Core

from atlas_jax.data.tokenizer_files import TokenizerFiles
from atlas_jax.data.tokens import Tokenizer, bucket, ends_in_visible_character, pad
from atlas_jax.errors import UserError

ASSETS = Path(__file__).parent.parent / "golden" / "assets"
SAMPLE = Path(__file__).parents[2] / "atlas_jax" / "sample"
TOKENIZERS = {name: Tokenizer.load(ASSETS / name) for name in ("reader", "retriever")}
HF = {  # as their files say: some versions of transformers put a pre-tokenizer of their own into a T5's
    name: transformers.PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / name / "tokenizer.json"))
    for name in TOKENIZERS
}
TEXTS = ("question: what is Tribe? answer: <extra_id_0>", "", " two  spaces ", "naïve 漢字 👍🏽 שלום</s> x", "y" * 300)

names = pytest.mark.parametrize("name", TOKENIZERS)
awkward = st.lists(
    st.text(max_size=8)
    | st.sampled_from(["<extra_id_0>", "</s>", "[SEP]", " ", "\u200b", "\ufffd", "▁", "é", "\u0600"])
).map("".join)


def trained_tokenizer(pre_tokenizer, normalizer=None, model=None, trainer=trainers.BpeTrainer, added=()) -> Tokenizer:
    """Returns a tokenizer trained on a few words, with merges across spaces if its pre-tokenizer allows them."""
    core = Core(model or models.BPE(unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizer
    text = ["the title of the book", "a title: the book", "answer: the title"] * 20
    core.train_from_iterator(text, trainer(vocab_size=400, special_tokens=["<pad>", "<unk>"], show_progress=False))
    core.add_tokens(list(added))
    return Tokenizer(TokenizerFiles(core, {"pad_token": "<pad>"}, {}))


def test_batch_equals_the_reference(golden):
    """Reader, retriever, query and label ids and masks equal those of the reference's batch."""
    text, arrays = json.loads((golden / "batch.json").read_text()), np.load(golden / "batch.npz")
    reader, retriever = TOKENIZERS["reader"], TOKENIZERS["retriever"]

    def padded(tokenizer, texts, length=160):
        return pad(
            [tokenizer.add_special_tokens(ids, length) for ids in tokenizer.ids(texts)], length, tokenizer.pad_id
        )

    pairs = [(query, p) for query, passages in zip(text["query"], text["passages"], strict=True) for p in passages]
    whole = padded(reader, ["{query} title: {title} context: {text}".format(query=q, **p) for q, p in pairs])
    passages = padded(retriever, ["{title} {text}".format(**p) for _, p in pairs])
    for (ids, mask), kind in ((whole, "reader"), (passages, "retriever"), (padded(retriever, text["query"]), "query")):
        np.testing.assert_array_equal(ids, arrays[f"{kind}_ids"].reshape(-1, 160))
        np.testing.assert_array_equal(mask, arrays[f"{kind}_mask"].reshape(-1, 160))
    targets, mask = pad(reader.target_ids(text["target"], 16), 16, reader.pad_id)
    np.testing.assert_array_equal(np.where(mask, targets, -100), arrays["labels"])


@names
@given(text=awkward, max_length=st.integers(2, 40))
def test_ids_with_special_tokens_equal_hugging_face(name, text, max_length):
    """`ids` and `add_special_tokens` equal the Hugging Face tokenizer for any text and length, and without a limit."""
    tokenizer, hf = TOKENIZERS[name], HF[name]
    [ids] = tokenizer.ids([text])
    assert (
        tokenizer.add_special_tokens(ids, max_length) == hf(text, max_length=max_length, truncation=True)["input_ids"]
    )
    assert tokenizer.add_special_tokens(np.array(ids, np.uint16)) == hf(text)["input_ids"]


def test_truncation_and_padding_in_the_file_do_not_affect_ids(tmp_path):
    """A tokenizer.json that was saved with truncation and padding, as some are published, leaves `ids` uncut."""
    core = Core.from_file(str(ASSETS / "reader" / "tokenizer.json"))
    core.enable_truncation(4)
    core.enable_padding(length=4)
    core.save(str(tmp_path / "tokenizer.json"))
    assert len(core.encode(TEXTS[0]).ids) == 4
    assert Tokenizer.load(tmp_path).ids(TEXTS) == TOKENIZERS["reader"].ids(TEXTS)


def test_ids_of_a_batch_equal_those_of_single_texts():
    """A batch of several chunks gives its ids in order; an empty batch gives an empty list."""
    tokenizer = TOKENIZERS["reader"]
    texts = [f"passage {i}" for i in range(2500)]
    assert tokenizer.ids(texts) == [tokenizer.ids([text])[0] for text in texts]
    assert tokenizer.ids([]) == []


def test_targets_end_in_one_eos_unless_cut():
    """Text and exactly one `</s>`, which a cut can remove; decoding drops special tokens."""
    reader = TOKENIZERS["reader"]
    [target], [with_eos] = reader.target_ids(["<extra_id_0> Tribe"]), reader.target_ids(["<extra_id_0> Tribe</s>"])
    assert target == with_eos == [*reader.ids(["<extra_id_0> Tribe"])[0], 1]
    assert reader.target_ids(["<extra_id_0> Tribe"], 2) == [target[:2]]
    assert reader.decode(np.array([0, *target, 0])) == "Tribe"
    assert (reader.prefix, reader.suffix, reader.pad_id, reader.vocab_size) == ((), (1,), 0, 2000)
    assert (TOKENIZERS["retriever"].prefix, TOKENIZERS["retriever"].suffix) == ((2,), (3,))


@names
@given(a=awkward, b=awkward)
def test_ids_of_two_parts_equal_those_of_the_whole(name, a, b):
    """T5's and BERT's tokenizers: any two texts around a space, if the first ends in a visible character."""
    tokenizer = TOKENIZERS[name]
    assume(tokenizer.splits_after(a))
    assert tokenizer.splits_at_spaces
    left, right, whole = tokenizer.ids([a, f" {b}", f"{a} {b}"])
    assert left + right == whole


@names
def test_texts_split_after_every_visible_character(name):
    """Holds for each visible character of Unicode's first plane, and emoji, before a space and a combining mark."""
    ends = [f"x{c}" for c in map(chr, [*range(0x10000), *range(0x1F000, 0x1FB00)]) if ends_in_visible_character(c)]
    left, right = TOKENIZERS[name].ids(ends), TOKENIZERS[name].ids([" \u0308x"])[0]
    assert [ids + right for ids in left] == TOKENIZERS[name].ids([f"{a} \u0308x" for a in ends])
    assert len(ends) > 50_000


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
UNSPLIT = pre_tokenizers.Metaspace(split=False)
SPACE = {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}
NOT_SPLITTING = {  # tokenizers whose ids of a whole are not those of its parts, and two parts that show it
    "byte_level_bpe": ({"pre_tokenizer": BYTES}, "the title of the", "book"),
    "metaspace_unsplit": ({"pre_tokenizer": UNSPLIT}, "the", "title"),
    "no_pre_tokenizer": ({"pre_tokenizer": None}, "the title of the", "book"),
    "token_with_a_space": ({**SPACE, "added": ["the title"]}, "the", "title"),
    "replaces_over_spaces": ({**SPACE, "normalizer": normalizers.Replace("the title", "book")}, "the", "title"),
    "prepends": (
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never"), "normalizer": normalizers.Prepend("a")},
        "the",
        "title",
    ),
    "eats_a_space": (
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first"), "added": [AddedToken("<x>", rstrip=True)]},
        "<x>",
        "title",
    ),
}


@pytest.mark.parametrize("case", NOT_SPLITTING)
def test_tokenizers_with_pieces_across_spaces_do_not_split(case):
    """Each tokenizer gives other ids for the whole than for the parts, and has `splits_at_spaces` False."""
    build, a, b = NOT_SPLITTING[case]
    tokenizer = trained_tokenizer(**build)
    left, right, whole = tokenizer.ids([a, f" {b}", f"{a} {b}"])
    assert left + right != whole
    assert not tokenizer.splits_at_spaces


def test_a_text_that_ends_in_a_space_does_not_split():
    """Counter-case for `ends_in_visible_character`: the tokenizer replaces runs of spaces, and splitting cuts a run."""
    tokenizer = trained_tokenizer(pre_tokenizers.Metaspace(), normalizers.Replace(Regex(" {2,}"), "▁"))
    assert tokenizer.splits_at_spaces
    left, right, whole = tokenizer.ids(["the ", " title", "the  title"])
    assert left + right != whole
    assert not ends_in_visible_character("the ")


def test_splits_at_spaces_is_false_for_unknown_configurations():
    """GPT-2's pattern does split before a space, but is not among the known ones; several known ones are True."""
    assert not trained_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False)).splits_at_spaces
    assert not trained_tokenizer(
        pre_tokenizers.WhitespaceSplit(), model=models.BPE(unk_token="<unk>", dropout=0.1)
    ).splits_at_spaces
    metaspace, plain_replace = pre_tokenizers.Metaspace(), normalizers.Replace(" {2,}", "▁")
    assert trained_tokenizer(
        metaspace, normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(left=False)])
    ).splits_at_spaces
    assert not trained_tokenizer(metaspace, plain_replace).splits_at_spaces  # a plain string, not T5's expression
    sequence = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])
    assert trained_tokenizer(sequence, normalizers.Lowercase()).splits_at_spaces


@pytest.mark.parametrize(
    ("text", "visible"), [("a", 1), ("é", 1), ("?", 1), ("字", 1), ("", 0), ("a\u200b", 0), ("a\n", 0)]
)
def test_ends_in_visible_character(text, visible):
    """True for letters, marks and signs; False for an empty text, white space, control and format characters."""
    assert ends_in_visible_character(text) == bool(visible)


def test_a_saved_tokenizer_keeps_its_fingerprint_and_ids(tmp_path):
    """The fingerprint is equal after save and load and in another process, and differs between tokenizers."""
    reader = TOKENIZERS["reader"]
    reader.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == reader.fingerprint != TOKENIZERS["retriever"].fingerprint
    assert loaded.ids(TEXTS) == reader.ids(TEXTS)
    code = f"from atlas_jax.data.tokens import Tokenizer; print(Tokenizer.load({str(ASSETS / 'reader')!r}).fingerprint)"
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == reader.fingerprint
    assert other.stderr == ""  # no advice of transformers about PyTorch


def test_a_hub_name_is_read_from_the_cache_offline(tmp_path, monkeypatch):
    """A name that is not in the hub's cache is a UserError of one line with the remedy; a cached one loads."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        Tokenizer.load("google-t5/t5-small")
    message = str(caught.value)
    assert message.startswith("google-t5/t5-small: no such folder, and tokenizer.json is not in the hub's cache")
    assert message.endswith("or name a folder that holds tokenizer.json")
    assert "\n" not in message
    cached = tmp_path / "models--google-t5--t5-small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1")
    shutil.copytree(SAMPLE / "reader", cached / "snapshots" / "1")
    assert Tokenizer.load("google-t5/t5-small").fingerprint == TOKENIZERS["reader"].fingerprint


def test_tokenizers_that_cannot_be_loaded_are_errors(tmp_path):
    """No vocabulary in the folder (transformers would invent one), broken files, unknown names, no pad token."""
    (tmp_path / "config.json").write_text((ASSETS / "reader" / "config.json").read_text())
    with pytest.raises(UserError, match=r"no tokenizer in this folder; copy one of tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="repair its files"):
        Tokenizer.load(tmp_path)
    for name in ("nobody/nothing", str(tmp_path / "misspelt")):
        with pytest.raises(UserError, match=f"{name}: no such folder.*name a folder that holds tokenizer.json"):
            Tokenizer.load(name)
    Core(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=f"{tmp_path}: no pad token; set pad_token in its tokenizer_config.json"):
        Tokenizer.load(tmp_path)


@given(st.lists(st.lists(st.integers(1, 70_000), max_size=20), max_size=6), st.integers(20, 30))
def test_pad_appends_pad_ids_and_masks_them(rows, length):
    """Rows on the left, `pad_id` on the right, the mask true for the rows; arrays and lists give the same."""
    ids, mask = pad(rows, length, 7)
    assert ids.shape == mask.shape == (len(rows), length)
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == rows
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    assert (ids[~mask] == 7).all()
    np.testing.assert_array_equal(ids, pad([np.array(row, np.int32) for row in rows], length, 7)[0])


def test_pad_refuses_a_row_that_is_too_long():
    """ValueError rather than cutting the row."""
    with pytest.raises(ValueError, match="a row of 3 ids does not fit into 2"):
        pad([[1, 2, 3]], 2, 0)


def test_buckets_are_few_with_little_padding():
    """12 lengths up to 512; beyond 128 tokens less than a fifth is padding; the maximum is the largest bucket."""
    lengths = sorted({bucket(n, 512) for n in range(513)})
    assert lengths == [32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]
    for maximum in (7, 100, 356, 500, 2000):
        for n in range(maximum + 1):
            assert n <= bucket(n, maximum) <= maximum
            assert n <= 128 or (bucket(n, maximum) - n) / bucket(n, maximum) < 0.2
        assert bucket(maximum, maximum) == maximum
    with pytest.raises(ValueError, match="513 tokens"):
        bucket(513, 512)
