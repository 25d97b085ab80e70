"""`atlas convert --inspect` describes a folder without reading an array."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.formats import orbax_arrays
from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.checkpoints.inspection import inspect, lines
from atlas_jax.checkpoints.weights import weight_entries
from atlas_jax.commands import convert
from atlas_jax.errors import UserError
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage import lazy_array
from tests.checkpoints.formats import pickles
from tests.checkpoints.test_weights import their_shape


@pytest.fixture(autouse=True)
def fail_on_array_reads(monkeypatch):
    """Makes every read of an array fail the test."""

    def fail(*_):
        raise AssertionError("an array is read")

    for module, name in (
        (orbax_arrays.StoredArray, "read"),
        (lazy_array.StackedViews, "read"),
        (lazy_array, "copy_into"),
    ):
        monkeypatch.setattr(module, name, fail)


@pytest.mark.parametrize("name", ["initial", "fixed_queryside"])
def test_a_reference_checkpoint_is_described(golden, name):
    """Folder and file give the same shapes, inferred from arrays, encoders, step, and each parameter counted once."""
    folder = golden / f"checkpoint_{name}"
    facts = inspect(folder)
    assert facts == inspect(folder / "model.pth.tar")
    assert (facts["kind"], facts["step"]) == ("a checkpoint of the PyTorch reference", 0 if name == "initial" else 6)
    expected = {"d_model": 64, "num_heads": 4, "head_dim": 16, "d_ff": 160, "num_layers": 3, "vocab_size": 2048}
    assert {field: facts["reader"][field] for field in expected} == expected
    assert (facts["reader"]["activation"], facts["reader"]["output_tied_to_input"]) == ("gated-gelu", False)
    assert facts["retriever"]["d_model"] == 48
    assert facts["retriever"]["encoders"].startswith("one for both" if name == "initial" else "one for queries and")
    model = load_torch(folder / "model.pth.tar")["model"]
    aliases = [key for key in model if key.endswith(("position_ids", "embed_tokens.weight"))]
    assert facts["parameters"] == sum(array.size for key, array in model.items() if key not in aliases)
    assert (facts["dtype"], facts["bytes"]) == (["float32"], (folder / "model.pth.tar").stat().st_size)


@pytest.mark.parametrize(("array", "trained"), [(None, False), ("index/words", False), ("reader/mu/words", True)])
def test_our_checkpoint_is_described(tiny_weights, tmp_path, array, trained):
    """atlas.json gives step and parameter count; an optimizer, a missing file and a missing tokenizer are reported.

    The last checkpoint of a finished run has no optimizer, but may have the encoder that built its index.
    """
    resume_state = store.ResumeState({array: np.ones(3, np.float32)}, {}) if array else None
    store.save(tmp_path / "ours", dataclasses.replace(tiny_weights, step=7), resume_state)
    facts = inspect(tmp_path / "ours")
    assert (facts["kind"], facts["step"], facts["optimizer"]) == ("a checkpoint of ours", 7, trained)
    assert facts["parameters"] == sum(array.size for array in tiny_weights.params.values())
    assert (facts["tokenizers"], facts["whole"]) == (["reader", "retriever"], True)
    assert facts["retriever"]["norm"] == "atlas"
    assert facts["bytes"] > 4 * facts["parameters"]
    shutil.rmtree(tmp_path / "ours/retriever")
    (tmp_path / "ours/params/_METADATA").unlink()
    facts = inspect(tmp_path / "ours")
    assert (facts["tokenizers"], facts["whole"]) == (["reader"], False)


def test_hugging_face_folders_are_described(golden, tmp_path):
    """A T5 and a BERT, with or without weights, are described; a folder of several lists each by name."""
    facts = inspect(golden / "t5_1_0")
    assert (facts["reader"]["output_tied_to_input"], facts["reader"]["num_decoder_layers"]) == (True, 3)
    assert (facts["weights"], facts["tokenizers"]) == ("model.safetensors", ["reader"])
    both = inspect(golden / "assets")
    assert list(both) == ["kind", "reader", "retriever"]
    assert both["retriever"]["retriever"]["norm"] == "atlas"
    bare = shutil.copytree(
        golden / "assets/retriever",
        tmp_path / "bare",
        ignore=shutil.ignore_patterns("*.safetensors", "*.json", "*.txt"),
    )
    shutil.copy(golden / "assets/retriever/config.json", bare)
    facts = inspect(Path(bare))
    assert (facts["weights"], facts["tokenizers"], "parameters" in facts) == (None, [], False)


@pytest.mark.parametrize("name", T5_CONFIGS)
def test_published_reader_shapes_are_named(tmp_path, monkeypatch, name):
    """The reader's published names are found from the shapes in the file, whose arrays here take no memory."""
    cfg = AtlasConfig(T5_CONFIGS[name], ContrieverConfig(), untied=True)
    zero = np.zeros((), np.float32)
    shared = np.broadcast_to(zero, their_shape("reader.shared.weight", cfg))
    model = {e.name: np.broadcast_to(zero, their_shape(e.name, cfg)) for e in weight_entries(cfg)}
    model |= {e.name: shared for e in weight_entries(cfg) if e.path == "reader/embed/embedding"}
    if not T5_CONFIGS[name].tied:
        model["reader.lm_head.weight"] = np.broadcast_to(np.ones((), np.float32), shared.shape)
    monkeypatch.setattr("atlas_jax.checkpoints.inspection.open_reference_arrays", lambda file: (model, 5))
    (tmp_path / "model.pth.tar").write_bytes(b"")
    facts = inspect(tmp_path)
    assert facts["reader"]["shape_of"] == [alias for alias, known in T5_CONFIGS.items() if known == T5_CONFIGS[name]]
    assert name in facts["reader"]["shape_of"]
    assert facts["retriever"]["shape_of"] == ["facebook/contriever"]


def test_an_index_is_refused_and_its_command_named(golden):
    """The message names `atlas index inspect`."""
    with pytest.raises(UserError, match="is an index; atlas index inspect"):
        inspect(golden / "index_1shard")


def test_unknown_folders_and_files_are_refused(tmp_path):
    """An empty folder, a missing one and tensors of no T5 or BERT are refused in one line with path and remedy."""
    with pytest.raises(UserError, match="holds nothing known here; give the folder of a checkpoint"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="holds nothing known here"):
        inspect(tmp_path / "nowhere")
    file = pickles.save(tmp_path / "model.pth.tar", {"model": {"reader.x": np.zeros(3, np.float32)}, "step": 1})
    with pytest.raises(UserError, match=r"its reader is no T5 .*; is this an Atlas checkpoint\?") as caught:
        inspect(file)
    assert str(caught.value).startswith(f"{file}: ")
    file = pickles.save(tmp_path / "model.pth.tar", {"model": {"retriever.contriever.x": np.zeros(3, np.float32)}})
    with pytest.raises(UserError, match="its retriever is no BERT"):
        inspect(file)


def test_facts_are_printed_as_lines_or_json(golden, capsys):
    """The command prints lines for people, or with --json the facts as JSON."""
    folder = golden / "checkpoint_initial"
    convert.main(["--inspect", str(folder)])
    output = capsys.readouterr().out
    assert output.splitlines() == lines(inspect(folder))
    assert "kind: a checkpoint of the PyTorch reference\nstep: 0\nreader:\n  shape of: none\n  d model: 64\n" in output
    assert "parameters: 0.7 million (748912)\ndtype: float32\n" in output
    assert "size: 0.00 GB" in output
    convert.main(["--inspect", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out) == inspect(folder)
