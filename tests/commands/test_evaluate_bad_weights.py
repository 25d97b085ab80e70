"""`atlas evaluate` on weights that are damaged, of another model or malicious: exit status 2 and one line."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np

from atlas_jax.checkpoints.formats.torch_reader import load_torch
from tests.checkpoints.formats import pickles
from tests.commands.sample_evaluation import SAMPLE, copy_published_index, evaluate_argv


def test_a_folder_without_weights_is_refused(assert_refused, tmp_path):
    """--model_path names a folder without weights: the message names the folder and the files that it may hold."""
    assert_refused(
        evaluate_argv(tmp_path, model_path=SAMPLE / "reader"), SAMPLE / "reader", "model.pth.tar", "atlas.json"
    )


def test_truncated_weights_are_refused(assert_refused, tmp_path):
    """model.pth.tar truncated at any place: the message names the file."""
    whole = (SAMPLE / "model" / "model.pth.tar").read_bytes()
    path = tmp_path / "model.pth.tar"
    for end in (0, 1, 50, 10_000, len(whole) // 2, len(whole) - 100_000, len(whole) - 50, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert_refused(evaluate_argv(tmp_path, model_path=tmp_path), f"{path}: ")


def test_weights_of_another_model_name_the_arrays(assert_refused, tmp_path, golden):
    """Weights of another --reader_model_type, a missing array, or one too many: names and shapes are in the message."""
    other_reader = golden / "t5_1_0"
    message = assert_refused(
        evaluate_argv(tmp_path, reader_model_type=other_reader), SAMPLE / "model/model.pth.tar", "--reader_model_type"
    )
    assert "reader.encoder.block.0.layer.1.DenseReluDense.wi.weight" in message

    wide = tmp_path / "wide"
    shutil.copytree(SAMPLE / "reader", wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"d_ff": 192}))
    key = "reader.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    argv = evaluate_argv(tmp_path, reader_model_type=wide)
    assert_refused(argv, f"{key} has shape (160, 64), this model needs (192, 64)", "--reader_model_type")

    model = load_torch(SAMPLE / "model" / "model.pth.tar")["model"]
    path = tmp_path / "model.pth.tar"
    argv = evaluate_argv(tmp_path, model_path=tmp_path)
    pickles.save(path, {"model": {name: array for name, array in model.items() if name != key}, "step": 3})
    assert_refused(argv, f"{path}: ", f"it lacks {key};")
    pickles.save(path, {"model": model | {"reader.extra": np.zeros(2, np.float32)}, "step": 3})
    assert_refused(argv, f"{path}: ", "nothing takes reader.extra;")


def test_torch_files_that_are_no_checkpoint_are_refused(assert_refused, tmp_path):
    """A tensor, a dict without `model`, integers in place of tensors, a `step` that is no number."""
    model = load_torch(SAMPLE / "model" / "model.pth.tar")["model"]
    path = tmp_path / "model.pth.tar"
    for content, message in (
        (np.zeros(3, np.float32), "holds no `model` of named tensors"),
        ({"state_dict": model}, "holds no `model` of named tensors"),
        ({"model": {**dict.fromkeys(model, 3)}}, "holds no `model` of named tensors"),
        ({"model": model, "step": np.zeros(2, np.float32)}, "its `step` is"),
    ):
        pickles.save(path, content)
        assert_refused(
            evaluate_argv(tmp_path, model_path=tmp_path), f"{path}: ", message, "is this an Atlas checkpoint?"
        )


class Malicious:
    """An object whose pickle runs a shell command when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_malicious_pickle_is_refused_and_not_executed(assert_refused, golden, tmp_path):
    """os.system in weights or in passages is named in the message and not called; pickle.loads itself would call it."""
    marker = tmp_path / "ran"
    malicious = pickle.dumps(Malicious(marker), 2)
    path = pickles.write(tmp_path / "model.pth.tar", malicious[2:-1])
    assert_refused(evaluate_argv(tmp_path, model_path=tmp_path), f"{path}: ", "'posix.system'")
    assert_refused(["convert", "--model_path", str(tmp_path), "--reader_model_type", str(SAMPLE / "reader"),
             "--retriever_model_path", str(SAMPLE / "retriever"), "--output", str(tmp_path / "out")],
            "'posix.system'")  # fmt: skip
    index = copy_published_index(tmp_path / "published", golden, passages_0_pt=malicious)
    assert_refused(evaluate_argv(tmp_path, load_index_path=index), index / "passages.0.pt", "'posix.system'")
    assert not marker.exists()
    pickle.loads(malicious)
    assert marker.exists()
