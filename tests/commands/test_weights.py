"""Weights that are broken, do not fit or are hostile: exit status 2 and one line."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np

from atlas_jax.checkpoints.formats.torch_reader import load_torch
from atlas_jax.commands.main import main
from tests.checkpoints.formats import pickles
from tests.commands.sample_run import SAMPLE, command, published


def test_truncated_weights(refused, tmp_path):
    """model.pth.tar cut anywhere: the file and the remedy."""
    whole = (SAMPLE / "model" / "model.pth.tar").read_bytes()
    path = tmp_path / "model.pth.tar"
    for end in (0, 1, 50, 10_000, len(whole) // 2, len(whole) - 100_000, len(whole) - 50, len(whole) - 1):
        path.write_bytes(whole[:end])
        refused(command(tmp_path, model_path=tmp_path), f"{path}: ")


def test_weights_of_another_model(refused, tmp_path, golden):
    """Another --reader_model_type than the weights', a key missing, or one more: names and shapes are said."""
    asked = golden / "t5_1_0"
    said = refused(command(tmp_path, reader_model_type=asked), SAMPLE / "model/model.pth.tar", "--reader_model_type")
    assert "reader.encoder.block.0.layer.1.DenseReluDense.wi.weight" in said

    wide = tmp_path / "wide"
    shutil.copytree(SAMPLE / "reader", wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"d_ff": 192}))
    key = "reader.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    argv = command(tmp_path, reader_model_type=wide)
    refused(argv, f"{key} has shape (160, 64), this model needs (192, 64)", "--reader_model_type")

    model = load_torch(SAMPLE / "model" / "model.pth.tar")["model"]
    path = tmp_path / "model.pth.tar"
    argv = command(tmp_path, model_path=tmp_path)
    pickles.save(path, {"model": {name: array for name, array in model.items() if name != key}, "step": 3})
    refused(argv, f"{path}: ", f"it lacks {key};")
    pickles.save(path, {"model": model | {"reader.extra": np.zeros(2, np.float32)}, "step": 3})
    refused(argv, f"{path}: ", "nothing takes reader.extra;")


def test_files_that_are_no_checkpoint(refused, tmp_path):
    """A torch file of another content: a tensor, a dict without `model`, numbers as weights, a step that is none."""
    model = load_torch(SAMPLE / "model" / "model.pth.tar")["model"]
    path = tmp_path / "model.pth.tar"
    for content, said in (
        (np.zeros(3, np.float32), "holds no `model` of named tensors"),
        ({"state_dict": model}, "holds no `model` of named tensors"),
        ({"model": {**dict.fromkeys(model, 3)}}, "holds no `model` of named tensors"),
        ({"model": model, "step": np.zeros(2, np.float32)}, "its `step` is"),
    ):
        pickles.save(path, content)
        refused(command(tmp_path, model_path=tmp_path), f"{path}: ", said, "is this an Atlas checkpoint?")


class Evil:
    """A pickle of this runs a command when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_wants_to_run_something(refused, golden, tmp_path):
    """os.system in weights or in passages is refused by name, and has not run; pickle itself would run it."""
    marker = tmp_path / "ran"
    evil = pickle.dumps(Evil(marker), 2)
    path = pickles.write(tmp_path / "model.pth.tar", evil[2:-1])
    refused(command(tmp_path, model_path=tmp_path), f"{path}: ", "'posix.system'")
    refused(["convert", "--model_path", str(tmp_path), "--reader_model_type", str(SAMPLE / "reader"),
             "--retriever_model_path", str(SAMPLE / "retriever"), "--output", str(tmp_path / "out")],
            "'posix.system'")  # fmt: skip
    index = published(tmp_path / "published", golden, passages_0_pt=evil)
    refused(command(tmp_path, load_index_path=index), index / "passages.0.pt", "'posix.system'")
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()


def test_convert_refuses_in_one_line(refused, tmp_path):
    """A form that nobody knows, no --output, one that is there, nothing to look at: said before anything is opened."""
    argv = ["convert", "--model_path", str(SAMPLE / "model"), "--reader_model_type", str(SAMPLE / "reader"),
            "--retriever_model_path", str(SAMPLE / "retriever")]  # fmt: skip
    refused([*argv, "--output", str(tmp_path / "out"), "--to", "gguf"], "--to: invalid choice: 'gguf'", "huggingface")
    refused(argv, "--output is missing: name the folder to write, or --inspect PATH to only look")
    (tmp_path / "there").mkdir()
    refused([*argv, "--output", str(tmp_path / "there"), "--to", "reference"], "there: is there; choose a new folder")
    refused(["convert", "--inspect", str(tmp_path / "there")], "there: holds nothing known here; give the folder of a")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_convert_shows_what_there_is(capsys):
    """`--inspect` answers on stdout; `--help` has an example of each form."""
    assert main(["convert", "--inspect", str(SAMPLE / "model")]) == 0
    assert "kind: a checkpoint of the PyTorch reference\n" in capsys.readouterr().out
    assert main(["convert", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(text in told for text in ("--to huggingface", "--to reference", "--inspect models/atlas/xxl"))
