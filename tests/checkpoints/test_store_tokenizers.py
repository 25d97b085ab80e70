"""A checkpoint carries its tokenizers, those of older versions and of transformers 4.18 too."""

import dataclasses
import json
import logging
import shutil

from atlas_jax.checkpoints import store
from atlas_jax.data.tokens import Tokenizer


def test_a_tokenizer_of_an_older_version_goes_on_unchanged(folder, tmp_path, caplog):
    """Versions that left clean-up out of tokenizer_config.json decoded without it: so does this one, and says so."""
    path = folder / "reader" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["clean_up_tokenization_spaces"]
    path.write_text(json.dumps(config).ljust(path.stat().st_size)[: path.stat().st_size])  # sizes are checked
    with caplog.at_level(logging.WARNING):
        old = store.load(folder)
    assert [record.message for record in caplog.records] == [
        f"{folder}/reader: saved by an older version, whose token ids can differ from the reference's; the checkpoint "
        "goes on unchanged; to get the reference's ids, convert the published weights again with atlas convert"
    ]
    assert old.tokenizer.decode(old.tokenizer.ids(["a . b"])[0]) == "a . b"
    caplog.clear()
    store.save(tmp_path / "next", old)
    with caplog.at_level(logging.WARNING):
        assert store.load(tmp_path / "next").tokenizer.decode(old.tokenizer.ids(["a . b"])[0]) == "a . b"
    assert len(caplog.records) == 1


def test_a_checkpoint_carries_the_tokens_of_transformers_4_18(tiny_weights, golden, tmp_path, caplog):
    """A reader folder with spiece.model alone: its ids, its clean-up and the file itself are in the checkpoint."""
    (tmp_path / "reader").mkdir()
    shutil.copy(golden / "assets" / "reader" / "spiece.model", tmp_path / "reader")
    tokenizer = Tokenizer.load(tmp_path / "reader")
    store.save(tmp_path / "checkpoint", dataclasses.replace(tiny_weights, tokenizer=tokenizer, step=7))
    with caplog.at_level(logging.WARNING):
        loaded = store.load(tmp_path / "checkpoint").tokenizer
    assert caplog.records == []
    assert loaded.fingerprint == tokenizer.fingerprint != tiny_weights.tokenizer.fingerprint
    assert loaded.decode(loaded.ids(["a . b"])[0]) == "a. b"
    assert (tmp_path / "checkpoint" / "reader" / "spiece.model").is_file()
