"""What a person types wrong, and broken files: exit status 2 and one line that says where and what to do about it.

Most commands run in this process. All of them work in a folder of their own, with pieces of the sample.
"""

import contextlib
import errno
import io
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import atlas_jax
from atlas_jax import cli
from atlas_jax.checkpoints.pretrained import retriever_config
from atlas_jax.checkpoints.torch_file import load_torch
from atlas_jax.checkpoints.weights import export_weights, flat_shapes
from atlas_jax.data import jsonl
from atlas_jax.models.atlas import AtlasConfig
from tests.checkpoints import pickles

ROOT = Path(atlas_jax.__file__).parents[1]
SAMPLE = ROOT / "atlas_jax" / "sample"
ROWS = [json.loads(line) for line in (SAMPLE / "mmlu.jsonl").read_text(encoding="utf-8").splitlines()[:2]]
ROWS[1] |= {"options": {"A": "25", "B": "5", "C": "6", "D": "5"}, "answer": "D"}  # B and D are equal, as in 9 of MMLU
PASSAGES = [json.loads(line) for line in (SAMPLE / "passages.jsonl").read_text(encoding="utf-8").splitlines()[:30]]


def lines(rows: list[dict], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def put(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def command(folder: Path, **flags: object) -> list[str]:
    """`atlas evaluate` on two questions and thirty passages in `folder`; `flags` win, None leaves one out."""
    eval_data, passages = folder / "eval.jsonl", folder / "passages.jsonl"
    for file, rows in ((eval_data, ROWS), (passages, PASSAGES)):
        if not file.exists():
            put(file, lines(rows))
    all_flags: dict[str, object] = {
        **{"name": "run", "checkpoint_dir": folder / "runs", "eval_data": eval_data, "passages": passages},
        **{"model_path": SAMPLE / "model", "task": "multiple_choice", "multiple_choice_eval_permutations": "cyclic"},
        **{"reader_model_type": SAMPLE / "reader", "retriever_model_path": SAMPLE / "retriever"},
        **{"n_context": 2, "text_maxlength": 64, "generation_max_length": 3, "write_results": True},
        **flags,
    }
    argv = ["evaluate"]
    for flag, value in all_flags.items():
        if value is not None and value is not False:
            argv += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    return argv


def without(flags: str) -> dict[str, None]:
    return dict.fromkeys(flags.split())


CLOSED_BOOK = {"closed_book": True, **without("passages retriever_model_path")}  # no retriever, no index


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs a command that must fail: status 2, one line that has all of `parts` and a remedy, and nothing left over."""

    def run(argv: list[str], *parts: object, status: int = 2) -> str:
        assert cli.main(argv) == status
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if not line.startswith("[")]  # besides log lines
        assert len(said) == 1, captured.err
        assert said[0].startswith("atlas: ")
        assert captured.out == ""
        for part in parts:
            assert str(part) in said[0]
        assert status != 2 or "; " in said[0] or ": " in said[0].removeprefix("atlas: ")
        assert leftovers(tmp_path) == []
        return said[0]

    return run


def leftovers(folder: Path) -> list[Path]:
    """What an interrupted run must not leave."""
    hidden = [path for path in folder.rglob(".*") if path.suffix in (".draft", ".old") or ".scratch-" in path.name]
    return hidden + list(folder.rglob("*-step-1.jsonl")) + list(folder.rglob("*.metrics.json"))


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights, which takes minutes for XXL, is a failure of the test."""

    def restore(config):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("atlas_jax.evaluation.loop.restore", restore)


# -- What works --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a run that went well: `runs/run/`, and the index it built in `index/`."""
    folder = tmp_path_factory.mktemp("done")
    assert cli.main(command(folder, save_index_path=folder / "index")) == 0
    return folder


def predictions(folder: Path) -> list[dict]:
    text = (folder / "runs" / "run" / "eval-step-1.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_leaves_its_files_and_nothing_else(done):
    """Predictions, scores, the log, the resolved flags and the index; no draft, no scratch folder."""
    assert sorted(path.name for path in (done / "runs" / "run").iterdir()) == [
        *("config.json", "eval-step-1.jsonl", "eval-step-1.metrics.json", "run.log"),
    ]
    assert sorted(path.name for path in (done / "index").iterdir()) == ["embeddings.npy", "index.json", "passages"]
    assert len(predictions(done)) == 2
    assert json.loads((done / "runs/run/config.json").read_text())["n_context"] == 2
    assert "eval.jsonl: 2 rows at" in (done / "runs/run/run.log").read_text()
    assert {path.name for path in done.iterdir()} == {"runs", "index", "eval.jsonl", "passages.jsonl"}


def test_bom_crlf_and_blank_lines_change_nothing(done, tmp_path):
    """A byte order mark, CRLF and blank lines give the predictions of the clean file; so does the saved index."""
    messy = b"\xef\xbb\xbf\r\n" + lines(ROWS[:1], "\r\n") + b"\r\n  \r\n" + lines(ROWS[1:], "\r\n").rstrip()
    folder = tmp_path
    argv = command(folder, eval_data=put(folder / "eval.jsonl", messy), load_index_path=done / "index")
    assert messy != (done / "eval.jsonl").read_bytes()
    assert cli.main(argv) == 0
    assert predictions(folder) == predictions(done)


def test_two_equal_options_keep_their_letters(done):
    """B and D have one text; D, the right one, keeps a probability of its own, that of its place in every order."""
    line = predictions(done)[1]
    assert line["metadata"]["options"] == ROWS[1]["options"]
    assert line["metadata"]["answer"] == "D"
    orders = line["permutations"]
    assert [order["metadata"]["answer"] for order in orders] == ["D", "A", "B", "C"]
    assert set(line["choice_probs"]) == set("ABCD")
    shares = []
    for order in orders:
        logits = order["choice_logits"]
        weights = {letter: np.exp(logits[letter] - max(logits.values())) for letter in "ABCD"}
        shares.append(weights[order["metadata"]["answer"]] / sum(weights.values()))
    np.testing.assert_allclose(line["choice_probs"]["D"], np.mean(shares), rtol=1e-6)
    assert line["choice_probs"]["B"] != line["choice_probs"]["D"]


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["evaluate", "--help"], ["convert", "--help"]])
def test_help(capsys, argv):
    """Help goes to stdout with status 0; it names the commands, or the flags."""
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for word in ("evaluate", "convert") if len(argv) < 2 else ("--model_path", "--reader_model_type"):
        assert word in captured.out


def test_nothing_stays_behind_in_the_process(capsys, tmp_path):
    """After a command its log handlers are gone: a second one in the process logs once, and not into its file."""
    before = list(logging.getLogger().handlers)
    for name in ("one", "two"):
        assert cli.main(command(tmp_path, name=name, n_context=31, max_passages=3, load_index_path=tmp_path)) == 2
        assert logging.getLogger().handlers == before
        assert capsys.readouterr().err.count("million parameters") == 1
    assert "million" in (tmp_path / "runs/one/run.log").read_text()
    assert (tmp_path / "runs/one/run.log").read_text().count("million") == 1


# -- Commands and flags ------------------------------------------------------------------------------------------------


def test_unknown_commands(refused):
    """The nearest command is suggested, or all are named."""
    refused(["evalaute"], "atlas evalaute: no such command", "did you mean evaluate?")
    refused(["--version"], "there are train, evaluate, convert")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"n_contxt": 3}, ["--n_contxt: no such flag", "did you mean --n_context?"]),
        ({"task": "multi_choice"}, ["--task multi_choice: did you mean multiple_choice?"]),
        ({"n_context": "two"}, ["--n_context two: expected a whole number"]),
        ({"n_context": 0}, ["--n_context 0: must be at least 1"]),
        ({"index_mode": "flatt"}, ["--index_mode flatt: did you mean flat?"]),
        ({"precision": "fp16"}, ["--precision fp16", "use bf16"]),
        ({"mesh": "data=3"}, ["--mesh data=3: 3 devices, but there are 8"]),
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
        (["--model_path", str(SAMPLE / "model")], ["--output", "see atlas convert --help"]),
        (["--output", "x", "--modle_path", "y"], ["--modle_path", "see atlas convert --help"]),
        (["--output", "x", "--model_path", str(SAMPLE / "model")], ["--reader_model_type is missing", "t5-base"]),
        (["--output", str(SAMPLE), "--reader_model_type", str(SAMPLE / "reader")], [SAMPLE, "choose a new folder"]),
        (["--output", "x", "--reader_model_type", "t5-bse"], ["t5-bse", "; "]),
        (["--output", "x", "--model_path", "nowhere", "--reader_model_type", "t5-base"], ["nowhere", "model.pth.tar"]),
    ],
)
def test_convert_refuses_too(refused, tmp_path, monkeypatch, argv, parts):
    """`atlas convert`: missing, unknown and wrong flags end in one line, and no folder appears."""
    monkeypatch.chdir(tmp_path)
    refused(["convert", *argv], *parts)
    assert list(tmp_path.iterdir()) == []


# -- Rows --------------------------------------------------------------------------------------------------------------

GOOD = lines(ROWS[:1])
DAMAGED = {  # content -> line (None: the file), and what is said
    "malformed": (GOOD + b'{"question": }\n' + GOOD, 2, "not valid JSON"),
    "truncated": (GOOD + GOOD[:40], 2, "truncated"),
    "utf8": (GOOD + b'{"question": "\xff"}\n', 2, "invalid UTF-8 at byte 15 of the line; save the file as UTF-8"),
    "too_long": (GOOD + b'{"question": "' + b"x" * jsonl.MAX_LINE_BYTES + b'"}\n', 2, "longer than 16777216 bytes"),
    "no_object": (GOOD + b"\n" + b'["question"]\n', 3, "must be a JSON object, found a list"),
    "empty": (b"", None, "no rows, the file is empty"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_questions(refused, no_weights, tmp_path, case):
    """Damage in --eval_data is found before weights are loaded, and the file and the line are named."""
    content, line, said = DAMAGED[case]
    path = put(tmp_path / "bad.jsonl", content)
    refused(command(tmp_path, eval_data=path), f"atlas: {path}{f':{line}' if line else ''}: ", said)


def test_good_questions_reach_the_weights(no_weights, tmp_path):
    """The counter-case of the tests around: nothing but the bad row stops them."""
    with pytest.raises(AssertionError, match="the weights are loaded"):
        cli.main(command(tmp_path))


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_passages(refused, tmp_path, case):
    """The same of --passages; no half index stays in --save_index_path."""
    content, line, said = DAMAGED[case]
    path = put(tmp_path / "bad.jsonl", content.replace(b'"question": "', b'"id": "1", "text": "'))
    argv = command(tmp_path, passages=path, save_index_path=tmp_path / "index", retrieve_only=True)
    refused(argv, f"atlas: {path}{f':{line}' if line else ''}: ", said if case != "utf8" else "invalid UTF-8")
    assert not (tmp_path / "index").exists()


def dropped(row: dict, field: str) -> dict:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (dropped(ROWS[0], "question"), "`question` is missing"),
        (dropped(ROWS[0], "options"), "`options` is missing"),
        (dropped(ROWS[0], "answer"), "`answer` is missing"),
        (ROWS[0] | {"question": 7}, "`question` is not a text"),
        (ROWS[0] | {"options": ["8", "120", "240", "24"]}, "`options` is not an object"),
        (ROWS[0] | {"answer": "E"}, "`answer` is 'E', no option; it must be one of A, B, C, D"),
        (ROWS[0] | {"answer": "120"}, "`answer` is '120', no option"),
        (ROWS[0] | {"answer": 1}, "`answer` is not the letter"),
        (ROWS[0] | {"options": {"A": "8", "B": "120", "C": "240"}}, "`options` has A, B, C where"),
        (ROWS[0] | {"options": dict.fromkeys("ABCDE", "8")}, "--multiple_choice_num_options 4"),
        (ROWS[0] | {"options": dict.fromkeys("abcd", "8")}, "`options` has a, b, c, d where"),
        (ROWS[0] | {"options": {"A": "8", "B": 120, "C": "240", "D": "24"}}, "option B is not a text"),
    ],
)
def test_questions_that_do_not_fit_the_task(refused, no_weights, tmp_path, row, said):
    """A row that is no question of four options is named by file and line before weights are loaded."""
    path = put(tmp_path / "bad.jsonl", lines([ROWS[0], row]))
    refused(command(tmp_path, eval_data=path), f"atlas: {path}:2: ", said)


@pytest.mark.parametrize(
    ("passage", "said"),
    [
        (dropped(PASSAGES[0], "id"), 'a passage without "id"; add the field or remove the passage'),
        (dropped(PASSAGES[0], "text"), 'a passage without "text"; add'),
        (PASSAGES[0] | {"title": 2001}, '"title" must be a string'),
        (PASSAGES[0] | {"text": None}, '"text" must be a string'),
    ],
)
def test_passages_that_do_not_fit(refused, tmp_path, passage, said):
    """A passage without id or text is named by file and line, and no half index stays."""
    path = put(tmp_path / "bad.jsonl", lines([*PASSAGES[:4], passage]))
    argv = command(tmp_path, passages=path, save_index_path=tmp_path / "index", retrieve_only=True)
    refused(argv, f"atlas: {path}:5: ", said)
    assert not (tmp_path / "index").exists()


def test_a_format_that_asks_for_an_unknown_field(refused, tmp_path):
    """--retriever_format with a field that no passage has: the passage, the field, the format."""
    refused(command(tmp_path, retriever_format="{titel}"), "passage 1: no field 'titel'", "'{titel}'")


# -- Indexes -----------------------------------------------------------------------------------------------------------


def test_more_passages_than_there_are(refused, done, tmp_path):
    """--n_context, or what is reranked, above the size of the index: the flag and the size."""
    index = done / "index"
    refused(command(tmp_path, load_index_path=index, n_context=31), "--n_context 31", "30 passages")
    flags = {"retrieve_with_rerank": True, "n_to_rerank_with_retrieve_with_rerank": 31}
    refused(command(tmp_path, load_index_path=index, **flags), "--n_to_rerank_with_retrieve_with_rerank 31", "30")


def published(folder: Path, golden: Path, **changes: bytes | None) -> Path:
    """The golden index of four shards with files changed or, by None, left out; keys are file names with _ for dots."""
    shutil.copytree(golden / "index_4shards", folder)
    for name, content in changes.items():
        path = folder / name.replace("_", ".")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    return folder


def test_published_shards_that_do_not_fit_together(refused, golden, tmp_path):
    """A shard without its other half, or with another number of passages than vectors: the file is named."""
    fourth = (golden / "index_4shards" / "passages.3.pt").read_bytes()
    flags = {"save_index_path": tmp_path / "index", "retrieve_only": True}

    def refuse(name: str, *parts: str, **changes: bytes | None) -> None:
        folder = published(tmp_path / name, golden, **changes)
        refused(command(tmp_path, load_index_path=folder, **flags), folder, *parts)
        assert not (tmp_path / "index").exists()

    refuse("one", "passages.2.pt: missing, one of 4 shards", passages_2_pt=None)
    refuse("two", "embeddings.1.pt: missing, one of 4 shards", embeddings_1_pt=None)
    refuse("three", "passages.3.pt: missing, one of 4 shards", passages_3_pt=None)
    few = pickle.dumps(pickle.loads(fourth)[:-1])
    refuse("four", "passages.3.pt: ", "embeddings.3.pt has", "fetch both again", passages_3_pt=few)
    refuse("five", "passages.3.pt: is cut short", passages_3_pt=fourth[:1000])
    refuse("six", "passages.0.pt: holds no list of passages", passages_0_pt=pickle.dumps({"a": 1}))
    refuse("seven", "embeddings.2.pt: ", embeddings_2_pt=(golden / "index_4shards/embeddings.2.pt").read_bytes()[:-9])


def test_published_vectors_of_another_width(refused, tmp_path):
    """Vectors of 40 for a retriever of 48: both widths and the file; vectors of whole numbers are none."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "passages.0.pt").write_bytes(pickle.dumps(PASSAGES[:3]))
    pickles.save(folder / "embeddings.0.pt", np.zeros((40, 3), np.float16))
    refused(command(tmp_path, load_index_path=folder), folder / "embeddings.0.pt", "width 40", "are 48 wide")
    pickles.save(folder / "embeddings.0.pt", np.zeros((48, 3), np.int64))
    refused(command(tmp_path, load_index_path=folder), folder / "embeddings.0.pt", "holds no matrix of vectors")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(command(tmp_path, load_index_path=folder), folder, "neither index.json nor embeddings.0.pt")


def test_an_index_of_another_retriever(refused, done, golden, tmp_path):
    """Ours says which retriever built it: another one, even of the same width, is refused, as is another width."""
    trained = command(tmp_path, load_index_path=done / "index", model_path=golden / "checkpoint_linear")
    refused(trained, done / "index", "built by another retriever", "--passages")
    narrow = tmp_path / "narrow"
    shutil.copytree(SAMPLE / "retriever", narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"hidden_size": 40}))
    cfg = AtlasConfig(None, retriever_config(str(narrow)))
    zeros = export_weights({path: np.zeros(s.shape, s.dtype) for path, s in flat_shapes(cfg).items()}, cfg)
    arrays = {name.removeprefix("retriever.contriever."): np.ascontiguousarray(array) for name, array in zeros.items()}
    save_file(arrays, narrow / "model.safetensors")
    flags = {"retriever_model_path": narrow, "retrieve_only": True, "model_path": None}
    argv = command(tmp_path, load_index_path=done / "index", **flags)
    refused(argv, done / "index", "vectors of width 48", "are 40 wide", "--passages")


def test_a_damaged_index(refused, done, tmp_path):
    """Ours with a file cut short, missing or of the future: the file is named."""

    def refuse(name: str, change: Callable[[Path], object], *parts: str) -> None:
        folder = tmp_path / name
        shutil.copytree(done / "index", folder)
        change(folder)
        refused(command(tmp_path, load_index_path=folder), folder, *parts)

    def cut(name: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])

    refuse("one", cut("embeddings.npy"), "embeddings.npy: not a whole .npy file")
    refuse("two", cut("passages/text.bin"), "text.bin")
    refuse("three", cut("index.json"), "index.json: not JSON")
    refuse("four", lambda folder: (folder / "embeddings.npy").unlink(), "embeddings.npy")
    about = json.loads((done / "index" / "index.json").read_text())
    refuse("five", lambda f: (f / "index.json").write_text(json.dumps(about | {"format": 2})), "format 2, not 1")
    refuse("six", lambda f: (f / "index.json").write_text(json.dumps(about | {"count": 29})), "29 vectors, but 30")


@pytest.mark.parametrize("kind", ["file", "folder", "other_index"])
def test_save_index_path_spares_what_is_there(refused, tmp_path, kind):
    """A file, a folder of something, or somebody else's index.json there: refused and untouched."""
    there = tmp_path / "there"
    content = there
    if kind == "file":
        put(there, b"mine")
    else:
        there.mkdir()
        content = there / ("thesis.txt" if kind == "folder" else "index.json")
        put(content, b'{"mine": 1}')
    before = content.read_bytes()
    argv = command(tmp_path, save_index_path=there, retrieve_only=True)
    refused(argv, f"--save_index_path {there}: holds something else than an index; choose a new folder")
    assert content.read_bytes() == before


# -- Weights -----------------------------------------------------------------------------------------------------------


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


# -- Ends from outside -------------------------------------------------------------------------------------------------


EVALUATING = "atlas_jax.evaluation.evaluator.Evaluator.__call__"


def failing(error: BaseException) -> Callable:
    """Evaluating that fails after its first line."""

    def evaluate(self, rows, reader, write):
        write("{}\n")
        raise error

    return evaluate


@pytest.mark.parametrize(
    ("error", "status", "parts"),
    [
        (KeyboardInterrupt(), 130, ["atlas: interrupted"]),
        (MemoryError("Unable to allocate 7 GiB"), 2, ["out of memory (Unable to allocate 7 GiB)", "batch_size"]),
        (MemoryError(), 2, ["out of memory (of this machine)"]),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmany lines"), 2, ["RESOURCE_EXHAUSTED", "batch_size"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["eval-step-1.jsonl", "No space left", "free some"]),
        (OSError(errno.EIO, "Input/output error", "/data/x.bin"), 2, ["/data/x.bin: Input/output error", "disk"]),
    ],
)
def test_a_run_that_is_cut_off(refused, tmp_path, monkeypatch, error, status, parts):
    """Ctrl-C, no memory, no space, a failing disk: one line, and no half-written predictions."""
    monkeypatch.setattr(EVALUATING, failing(error))
    refused(command(tmp_path, **CLOSED_BOOK), *parts, status=status)


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    """Errors that no user can mend are not disguised as theirs; the files are cleaned up all the same."""
    for error in (ValueError("a bug"), RuntimeError("a bug"), OSError("without a number")):
        monkeypatch.setattr(EVALUATING, failing(error))
        with pytest.raises(type(error)):
            cli.main(command(tmp_path, **CLOSED_BOOK))
        assert leftovers(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk(refused, tmp_path, monkeypatch):
    """A write that really fails for want of space (/dev/full) names the predictions file."""
    opened = Path.open

    def open_full(path: Path, mode: str = "r", *args, **kwargs) -> io.IOBase:
        full = "eval-step-1.jsonl" in path.name and mode == "w"
        return opened(Path("/dev/full") if full else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    monkeypatch.setattr(EVALUATING, lambda self, rows, reader, write: write("x" * 100_000))
    refused(command(tmp_path, **CLOSED_BOOK), "eval-step-1.jsonl: cannot be written (No space left on device)")


# -- As a process ------------------------------------------------------------------------------------------------------


def atlas(*argv: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment} | options
    # A shell's background job, which the tests may be, ignores SIGINT, and so would what it starts
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from atlas_jax.cli import main; "
    )
    return subprocess.Popen([sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *argv], **options)


def test_a_bad_flag_as_a_process(tmp_path):
    """The shell sees status 2, one line on stderr and nothing on stdout."""
    process = atlas(*command(tmp_path, n_contxt=3))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "atlas: --n_contxt: no such flag; did you mean --n_context?\n"


@pytest.mark.parametrize("argv", [[], ["evaluate", "--help"]])
def test_a_reader_that_leaves_is_no_error(argv):
    """`atlas | head -0`: nothing on stderr, and the status of a broken pipe (argparse hides it: 0)."""
    read, written = os.pipe()
    os.close(read)
    process = atlas(*argv, stdout=written)
    os.close(written)
    _, err = process.communicate(timeout=120)
    assert err == ""
    assert process.returncode == (0 if argv else 141)


def test_ctrl_c_as_a_process(tmp_path):
    """SIGINT while the weights are read or later: status 130, one line, no traceback, nothing half-written.

    The run would last for minutes. Python loses a SIGINT that comes while it collects garbage: a person presses again.
    """
    put(tmp_path / "eval.jsonl", lines(ROWS * 2000))
    process = atlas(*command(tmp_path, save_index_path=tmp_path / "index"))
    assert process.stderr
    logged = ""
    while "million parameters" not in logged:
        logged = process.stderr.readline()
        assert logged, "ended by itself"
    said = []
    for _ in range(4):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = process.communicate(timeout=30)[1].splitlines()
            break
    assert process.returncode == 130
    assert said[-1] == "atlas: interrupted"
    assert leftovers(tmp_path) == []
    assert not list((tmp_path / "runs" / "run").glob("eval-step-1*"))
