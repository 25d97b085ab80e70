"""Our checkpoints: what is saved comes back bit for bit, and what is damaged is refused in one line."""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.formats.orbax_arrays import verify_shards
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.errors import UserError
from atlas_jax.mesh import make_mesh, put_parameter
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.storage.lazy_array import LocalShards

TEXTS = ["question: Who? answer: <extra_id_0>", "Z_8 x Z_10, naïve 字", ""]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_weights) -> Path:
    """A checkpoint of the golden weights at step 7."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    store.save(folder, dataclasses.replace(tiny_weights, step=7))
    return folder


@pytest.fixture(scope="module")
def resume_state() -> ResumeState:
    """What an optimizer and a loop may keep."""
    moments = np.random.default_rng(0).normal(size=(2, 300, 70)).astype(np.float32)
    counts = {"reader/count": np.asarray(12, np.int32), "rng/key": np.arange(2, dtype=np.uint32)}
    return ResumeState(
        {"reader/mu": moments[0], "reader/nu": moments[1], **counts}, {"position": 448, "best": {"em": 0.1}}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_weights, resume_state) -> Path:
    """A checkpoint to go on training from, of the retriever alone."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    cfg = AtlasConfig(None, tiny_weights.cfg.retriever)
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith("retriever/")}
    store.save(folder, dataclasses.replace(tiny_weights, params=params, cfg=cfg, step=7, index="5eed"), resume_state)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def refusal(call: Callable[[], object], *parts: object) -> str:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    for part in parts:
        assert str(part) in message
    return message


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,model=2", "passages=5"])
def test_devices_get_their_share_from_the_files(saved, tmp_path, tiny_weights, spec):
    """Where an array in memory would lie, bit for bit, or as another type; verified, so a changed number is named."""
    mesh = make_mesh(spec)
    stored = store.open_checkpoint(saved).params
    for path, array in tiny_weights.params.items():
        found, wanted = put_parameter(mesh, path, stored[path]), put_parameter(mesh, path, array)
        assert found.sharding == wanted.sharding
        np.testing.assert_array_equal(np.asarray(found).view(np.uint32), array.view(np.uint32))
        assert put_parameter(mesh, path, stored[path], jnp.bfloat16).dtype == jnp.bfloat16
    verify_shards(stored)
    name = "reader/encoder/layers/mlp/up/kernel"
    changed = tiny_weights.params[name].copy()
    changed.flat[-1] += 1
    store.save(tmp_path / "other", dataclasses.replace(tiny_weights, params={**tiny_weights.params, name: changed}))
    other = store.open_checkpoint(tmp_path / "other").params
    other[name].expected = stored[name].expected
    for path, array in other.items():
        put_parameter(mesh, path, array)
    refusal(lambda: verify_shards(other), f"{tmp_path}/other/params: {name} is not what was saved")


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,model=2"])
def test_what_lies_spread_over_devices_is_saved_the_same(saved, tmp_path, tiny_weights, spec):
    """Bit for bit and with the same checksums, from pieces whose chunks no two of them share."""
    mesh = make_mesh(spec)
    shares = {path: LocalShards(put_parameter(mesh, path, array)) for path, array in tiny_weights.params.items()}
    assert any(len(shard.pieces) > 1 for shard in shares.values())
    store.save(tmp_path / "spread", dataclasses.replace(tiny_weights, params=shares, step=7))
    for path, array in store.load(tmp_path / "spread").params.items():
        np.testing.assert_array_equal(array.view(np.uint32), tiny_weights.params[path].view(np.uint32))
    checksums = [
        json.loads((folder / "atlas.json").read_text())["checksums"] for folder in (saved, tmp_path / "spread")
    ]
    assert checksums[0] == checksums[1]
    for path, shard in shares.items():
        chunk = json.loads((tmp_path / "spread/params" / path / ".zarray").read_text())["chunks"]
        assert all(
            piece == whole or piece % n == 0 for piece, whole, n in zip(shard.piece, shard.shape, chunk, strict=True)
        )


def test_what_is_saved_comes_back(saved, tiny_weights):
    """Parameters bit for bit, shapes, step, and tokenizers that give the same ids; the source is not needed."""
    found = store.load(saved)
    assert found.step == 7
    assert found.index is None
    assert found.cfg == tiny_weights.cfg
    assert set(found.params) == set(tiny_weights.params)
    for path, array in tiny_weights.params.items():
        assert found.params[path].dtype == np.float32
        np.testing.assert_array_equal(found.params[path].view(np.uint32), array.view(np.uint32))
    assert found.retriever_tokenizer
    assert tiny_weights.retriever_tokenizer
    pairs = ((found.tokenizer, tiny_weights.tokenizer), (found.retriever_tokenizer, tiny_weights.retriever_tokenizer))
    for ours, theirs in pairs:
        assert ours.ids(TEXTS) == theirs.ids(TEXTS)
        assert ours.finish([5, 6]) == theirs.finish([5, 6])
        assert ours.fingerprint == theirs.fingerprint  # or an index's token ids would be made again
    assert found.tokenizer.ids(TEXTS) != found.retriever_tokenizer.ids(TEXTS)


def test_what_is_in_the_folder(saved):
    """Weights, tokenizers and shapes, nothing of the run: no dropout, no compute type; and no draft beside it."""
    assert sorted(path.name for path in saved.iterdir()) == ["atlas.json", "params", "reader", "retriever"]
    about = json.loads((saved / "atlas.json").read_text())
    assert set(about) == {"format", "step", "index", "untied", "reader", "retriever", "files", "checksums"}
    assert not {"dropout", "dtype", "row_by_row"} & {*about["reader"], *about["retriever"]}
    assert list(saved.parent.iterdir()) == [saved]
    assert store.is_checkpoint(saved)
    assert not store.is_checkpoint(saved / "reader")


@pytest.mark.parametrize("part", ["reader", "retriever"])
def test_half_a_model(tmp_path, tiny_weights, part):
    """A reader without a retriever and the reverse, untied too, come back as they were."""
    cfg = AtlasConfig(**{"reader": None, "retriever": None, part: getattr(tiny_weights.cfg, part)})
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith(f"{part}/")}
    tokenizer = None if part == "reader" else tiny_weights.retriever_tokenizer
    store.save(tmp_path / "half", Weights(params, cfg, tiny_weights.tokenizer, tokenizer))
    found = store.load(tmp_path / "half")
    assert found.cfg == cfg
    assert set(found.params) == set(params)
    assert (found.retriever_tokenizer is None) == (part == "reader")


def test_how_a_run_computes_is_not_kept(tmp_path, tiny_weights):
    """A checkpoint written in a bfloat16 run with dropout is a float32 one without."""
    cfg = tiny_weights.cfg.computing(dtype=jnp.bfloat16, dropout=0.1, for_cpu=True)
    store.save(tmp_path / "half", dataclasses.replace(tiny_weights, cfg=cfg))
    assert store.load_config(tmp_path / "half") == (tiny_weights.cfg, 0)


def files(folder: Path, tree: str = "params") -> list[Path]:
    """What Orbax wrote, the largest first."""
    found = [path for path in (folder / tree).rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: -path.stat().st_size)


def test_damaged_parameters(copy, capfd):
    """The largest file cut short, then gone, then no params at all: one line with the file, and none from elsewhere."""
    largest = files(copy)[0]
    size = largest.stat().st_size
    largest.write_bytes(largest.read_bytes()[: size // 2])
    refusal(lambda: store.load(copy), f"{largest}: {size // 2} bytes, not {size}; copy the checkpoint again")
    largest.unlink()
    refusal(lambda: store.load(copy), f"{largest}: missing")
    shutil.rmtree(copy / "params")
    refusal(lambda: store.load(copy), f"{copy}/params/", "missing")
    assert capfd.readouterr().err == ""


def test_every_missing_file_is_noticed(copy):
    """Without any one of Orbax's files the weights are refused; with all of them again they are read."""
    for file in files(copy):
        file.rename(copy / "aside")
        refusal(lambda file=file: store.load(copy), f"{file}: missing")
        (copy / "aside").rename(file)
    store.load(copy)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "atlas.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parameters_of_another_shape(copy):
    """Shapes that contradict the arrays, a part more or a part less, are refused; Orbax alone would pad and cut."""
    about = json.loads((copy / "atlas.json").read_text())
    for changes in (
        {"reader": about["reader"] | {"d_ff": 161}},
        {"reader": about["reader"] | {"d_ff": 80}},
        {"reader": about["reader"] | {"num_layers": 2}},
        {"untied": True},
        {"retriever": None},
    ):
        edit(copy, **about | changes)
        refusal(lambda: store.load(copy), f"{copy}/params: damaged or incomplete")
    edit(copy, **about)
    store.load(copy)


def test_a_damaged_atlas_json(copy):
    """Cut short, another format, fields missing, unknown or of another kind: the file and what to do."""
    path = copy / "atlas.json"
    text = path.read_text()
    about = json.loads(text)
    path.write_text(text[:-20])
    refusal(lambda: store.load(copy), f"{path}: not JSON")
    path.write_text("[]")
    refusal(lambda: store.load(copy), f"{path}: holds no object")
    path.write_text(json.dumps(about | {"format": 1}))
    refusal(lambda: store.load(copy), f"{path}: format 1, this program reads 2; use its release")
    path.write_text("{}")
    refusal(lambda: store.load(copy), f"{path}: format None")
    for key in ("step", "index", "untied", "reader", "retriever", "files", "checksums"):
        path.write_text(json.dumps({field: value for field, value in about.items() if field != key}))
        refusal(lambda: store.load(copy), f"{path}: damaged ('{key}')")
    for changes in (
        {"step": "seven"},
        {"reader": 5},
        {"reader": about["reader"] | {"experts": 8}},
        {"reader": about["reader"] | {"d_model": "64"}},
        {"retriever": about["retriever"] | {"num_heads": 0}},
        {"files": None},
        {"index": 7},
        {"checksums": []},
    ):
        path.write_text(json.dumps(about | changes))
        refusal(lambda: store.load(copy), f"{path}: damaged")


def test_missing_tokenizers(copy):
    """A checkpoint without its tokenizer says so, and where."""
    shutil.rmtree(copy / "retriever")
    refusal(lambda: store.load(copy), copy / "retriever")


def test_an_interrupted_save_leaves_the_old_one(copy, tiny_weights, monkeypatch):
    """A save that fails or is interrupted at its end changes nothing and leaves no draft; a whole one replaces it."""

    def interrupted(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(copy, dataclasses.replace(tiny_weights, step=9))
    assert list(copy.parent.iterdir()) == [copy]
    assert store.load(copy).step == 7
    monkeypatch.undo()
    store.save(copy, dataclasses.replace(tiny_weights, step=9))
    assert list(copy.parent.iterdir()) == [copy]
    assert store.load(copy).step == 9


def same(found: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> bool:
    return set(found) == set(arrays) and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and found[name].tobytes() == array.tobytes()
        for name, array in arrays.items()
    )


def loaded(resume_state: ResumeState | None) -> ResumeState:
    assert resume_state
    return resume_state.load()


def test_the_memory_of_a_training_comes_back(trained, saved, resume_state, tiny_weights, tmp_path):
    """Arrays bit for bit with their shapes and types, the JSON beside them, the index; a model alone has no memory."""
    found = store.load_resume_state(trained)
    assert found
    assert same(loaded(found).arrays, resume_state.arrays)
    assert found.about == resume_state.about
    assert store.load(trained).index == "5eed"
    assert store.load_resume_state(saved) is None
    store.save(tmp_path / "counters", tiny_weights, ResumeState({}, {"position": 1}))  # Orbax keeps no empty folder
    assert store.load_resume_state(tmp_path / "counters") == ResumeState({}, {"position": 1})


def plain(folder: Path) -> dict[str, np.ndarray]:
    """What Orbax reads without us."""
    with ocp.StandardCheckpointer() as checkpointer:
        there = checkpointer.metadata(folder).item_metadata
        return checkpointer.restore(folder, {name: np.zeros(x.shape, x.dtype) for name, x in there.items()})


def flip(file: Path, place: float = 0.5) -> None:
    """One bit, so far into the file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1 << 4
    file.write_bytes(content)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # TensorStore's threads, of a closed loop
def test_a_flipped_bit_in_any_file_is_found(trained, resume_state, tmp_path):
    """In the middle of a third of Orbax's files and of ours: refused, or what is read is what was saved.

    Orbax alone reads other numbers without a word.
    """
    params = store.load(trained).params
    silent, refusals = 0, []
    for file in [*files(trained)[::3], *files(trained, "training"), trained / "training.json"]:
        copy = Path(shutil.copytree(trained, tmp_path / "checkpoint"))
        flip(copy / file.relative_to(trained))
        try:
            found = store.load(copy).params, loaded(store.load_resume_state(copy))
        except UserError as error:
            refusals.append(str(error))
        else:
            assert same(found[0], params), file
            assert found[1], file
            assert same(found[1].arrays, resume_state.arrays), file
            assert found[1].about == resume_state.about, file
        with contextlib.suppress(Exception):
            silent += not (same(plain(copy / "params"), params) and same(plain(copy / "training"), resume_state.arrays))
        shutil.rmtree(copy)
    assert all(message.startswith(f"{tmp_path}/checkpoint/") and "\n" not in message for message in refusals)
    assert sum("is not what was saved" in message for message in refusals) >= silent >= 1
    assert len(refusals) > silent


def test_a_changed_number_is_named(copy, trained, tmp_path):
    """A checkpoint whose files are whole but whose numbers are others: the folder, the array and the remedy."""
    about = json.loads((copy / "atlas.json").read_text())
    name = "reader/embed/embedding"
    about["checksums"]["params"][name] = about["checksums"]["params"][name][::-1]
    edit(copy, **about)
    refusal(lambda: store.load(copy), f"{copy}/params: {name} is not what was saved; copy the checkpoint again")
    assert store.is_whole(copy)  # by its sizes
    for name in ("training.json", "training/_METADATA"):
        other = Path(shutil.copytree(trained, tmp_path / name.replace("/", "-")))
        (other / name).write_bytes((other / name).read_bytes()[:-3])
        refusal(lambda other=other: store.load_resume_state(other), f"{other}/{name}", "bytes, not")
        (other / name).unlink()
        refusal(lambda other=other: store.load(other), f"{other}/{name}: missing")
        assert not store.is_whole(other)


def test_all_is_on_the_disk_before_the_folder_appears(tmp_path, tiny_weights, resume_state, monkeypatch):
    """Every file and folder of the draft is synced before it gets its name, and then the folder that holds the name."""
    synced: list[Path] = []

    def fsync(*paths: Path) -> None:
        assert (tmp_path / "checkpoint").exists() == bool(synced)
        synced.extend(paths)

    monkeypatch.setattr(store, "fsync", fsync)
    store.save(tmp_path / "checkpoint", tiny_weights, resume_state)
    *draft, parent = synced
    root = draft[-1]
    there = {path.relative_to(tmp_path / "checkpoint") for path in (tmp_path / "checkpoint").rglob("*")}
    assert {path.relative_to(root) for path in draft} == {Path("."), *there}
    assert parent == tmp_path


def test_a_folder_that_cannot_be_written(tmp_path, tiny_weights):
    """A path below a file: one line with the folder."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "checkpoint"
    refusal(lambda: store.save(folder, tiny_weights), f"{folder}: cannot be written")


def test_orbax_is_silent(saved, capsys, caplog):
    """Reading says nothing: Orbax would tell its own life in the log."""
    with caplog.at_level(logging.INFO):
        store.load(saved)
    assert [record for record in caplog.records if record.levelno < logging.ERROR] == []
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path, tiny_weights, monkeypatch):
    """The bytes that are needed and those that are left are named, and nothing stays; with room it is saved."""
    needed = sum(array.nbytes for array in tiny_weights.params.values())
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            store.save(tmp_path / "full", tiny_weights)
        else:
            with pytest.raises(UserError, match=r"needs 0\.0 GB, but 0\.0 GB are left there; free some space"):
                store.save(tmp_path / "full", tiny_weights)
        assert [path.name for path in tmp_path.iterdir()] == ["full"] * fits
