"""What a person types wrong: exit status 2 and one line that says what to do about it."""

import pytest

from tests.commands.sample_run import SAMPLE, command, put


def test_unknown_commands(refused):
    """The nearest command is suggested, or all are named."""
    refused(["evalaute"], "atlas evalaute: no such command", "did you mean evaluate?")
    refused(["--version"], "choose from train, evaluate, index, convert")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"n_contxt": 3}, ["--n_contxt: no such flag", "did you mean --n_context?"]),
        ({"task": "multi_choice"}, ["--task multi_choice: did you mean multiple_choice?"]),
        ({"n_context": "two"}, ["--n_context two: expected a whole number"]),
        ({"n_context": 0}, ["--n_context 0: must be at least 1"]),
        ({"index_mode": "flatt"}, ["--index_mode flatt: did you mean flat?"]),
        ({"precision": "fp16"}, ["--precision fp16", "use bf16"]),
        ({"mesh": "data=16"}, ["--mesh data=16: 16 devices, but there are 8"]),
        ({"eval_data": None}, ["no eval file: pass --eval_data FILE.jsonl"]),
        ({"eval_data": "missing.jsonl"}, ["--eval_data missing.jsonl: no such file"]),
        ({"passages": "missing.jsonl"}, ["--passages missing.jsonl: no such file"]),
        ({"passages": None}, ["no passages: pass --load_index_path, --passages"]),
        ({"model_path": "modle"}, ["--model_path modle: no such folder"]),
        ({"reader_model_type": "t5-bse"}, ["--reader_model_type t5-bse", "did you mean t5-base?"]),
        ({"load_index_path": "nowhere"}, ["--load_index_path nowhere: no such folder"]),
        ({"task": None}, ["--task is missing: choose from"]),
    ],
)
def test_wrong_flags(refused, no_weights, tmp_path, flags, parts):
    """The flag, what is wrong with its value, and the nearest right one."""
    refused(command(tmp_path, **flags), *parts)


def test_a_folder_without_weights(refused, tmp_path):
    """--model_path of a folder with something else says what belongs there."""
    refused(command(tmp_path, model_path=SAMPLE / "reader"), SAMPLE / "reader", "model.pth.tar", "atlas.json")


def test_a_run_folder_that_cannot_be_made(refused, tmp_path, no_weights):
    """--checkpoint_dir below a file: the folder and the flag."""
    put(tmp_path / "file", b"")
    refused(command(tmp_path, checkpoint_dir=tmp_path / "file"), tmp_path / "file", "choose another --checkpoint_dir")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model_path", str(SAMPLE / "model")], ["--output is missing", "--inspect"]),
        (["--output", "x", "--modle_path", "y"], ["--modle_path", "see atlas convert --help"]),
        (["--output", "x", "--model_path", str(SAMPLE / "model")], ["--reader_model_type is missing", "t5-base"]),
        (["--output", str(SAMPLE), "--reader_model_type", str(SAMPLE / "reader")], [SAMPLE, "choose a new folder"]),
        (["--output", "x", "--reader_model_type", "t5-bse"], ["t5-bse", "; "]),
        (["--output", "x", "--model_path", "nowhere"], ["--model_path nowhere: no such folder", "model.pth.tar"]),
        (["--output", "x", "--model_path", ".", "--reader_model_type", "t5-base"], ["neither model.pth.tar nor"]),
    ],
)
def test_convert_refuses_too(refused, tmp_path, monkeypatch, argv, parts):
    """`atlas convert`: missing, unknown and wrong flags end in one line, and no folder appears."""
    monkeypatch.chdir(tmp_path)
    refused(["convert", *argv], *parts)
    assert list(tmp_path.iterdir()) == []
