"""Checkpoints are loaded bit-exact as they were saved, and damaged ones are refused in one line."""

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
from orbax.checkpoint._src.serialization import tensorstore_utils

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.formats import orbax_arrays
from atlas_jax.checkpoints.formats.orbax_arrays import verify_shards
from atlas_jax.checkpoints.store import ResumeState, Weights
from atlas_jax.config.run_weights import is_whole
from atlas_jax.errors import UserError
from atlas_jax.mesh import make_mesh, put_parameter
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.storage.lazy_array import LocalShards

TEXTS = ["question: Who? answer: <extra_id_0>", "Z_8 x Z_10, naïve 字", ""]


@pytest.fixture(scope="module")
def resume_state() -> ResumeState:
    """Returns a resume state such as an optimizer and a training loop may have."""
    moments = np.random.default_rng(0).normal(size=(2, 300, 70)).astype(np.float32)
    counts = {"reader/count": np.asarray(12, np.int32), "rng/key": np.arange(2, dtype=np.uint32)}
    return ResumeState(
        {"reader/mu": moments[0], "reader/nu": moments[1], **counts}, {"position": 448, "best": {"em": 0.1}}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_weights, resume_state) -> Path:
    """Saves a checkpoint of the retriever alone with a resume state."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    cfg = AtlasConfig(None, tiny_weights.cfg.retriever)
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith("retriever/")}
    store.save(folder, dataclasses.replace(tiny_weights, params=params, cfg=cfg, step=7, index="5eed"), resume_state)
    return folder


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
def test_devices_read_their_shards_from_the_files(saved, tmp_path, tiny_weights, spec):
    """Arrays read from files are placed as those in memory, bit-exact or in another dtype; changed values are named."""
    mesh = make_mesh(spec)
    stored = store.open_checkpoint(saved).params
    for path, array in tiny_weights.params.items():
        placed, expected = put_parameter(mesh, path, stored[path]), put_parameter(mesh, path, array)
        assert placed.sharding == expected.sharding
        np.testing.assert_array_equal(np.asarray(placed).view(np.uint32), array.view(np.uint32))
        assert put_parameter(mesh, path, stored[path], jnp.bfloat16).dtype == jnp.bfloat16
    verify_shards(stored)
    name = "reader/encoder/layers/mlp/up/kernel"
    changed = tiny_weights.params[name].copy()
    changed.flat[-1] += 1
    store.save(tmp_path / "other", dataclasses.replace(tiny_weights, params={**tiny_weights.params, name: changed}))
    changed_store = store.open_checkpoint(tmp_path / "other").params
    changed_store[name].expected = stored[name].expected
    for path, array in changed_store.items():
        put_parameter(mesh, path, array)
    refusal(lambda: verify_shards(changed_store), f"{tmp_path}/other/params: {name} is not what was saved")


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=2,model=2"])
def test_sharded_arrays_are_saved_the_same(saved, tmp_path, tiny_weights, spec):
    """Sharded arrays are saved bit-exact with the same checksums, in chunks that no two shards have in common."""
    mesh = make_mesh(spec)
    sharded = {path: LocalShards(put_parameter(mesh, path, array)) for path, array in tiny_weights.params.items()}
    assert any(len(array.shards) > 1 for array in sharded.values())
    store.save(tmp_path / "spread", dataclasses.replace(tiny_weights, params=sharded, step=7))
    for path, array in store.load(tmp_path / "spread").params.items():
        np.testing.assert_array_equal(array.view(np.uint32), tiny_weights.params[path].view(np.uint32))
    checksums = [
        json.loads((folder / "atlas.json").read_text())["checksums"] for folder in (saved, tmp_path / "spread")
    ]
    assert checksums[0] == checksums[1]
    for path, array in sharded.items():
        chunk = json.loads((tmp_path / "spread/params" / path / ".zarray").read_text())["chunks"]
        assert all(
            piece == whole or piece % n == 0
            for piece, whole, n in zip(array.shard_shape, array.shape, chunk, strict=True)
        )


def test_a_saved_checkpoint_is_loaded_bit_exact(saved, tiny_weights):
    """A loaded checkpoint has bit-exact parameters, the config, the step, and tokenizers that give the same ids."""
    loaded = store.load(saved)
    assert loaded.step == 7
    assert loaded.index is None
    assert loaded.cfg == tiny_weights.cfg
    assert set(loaded.params) == set(tiny_weights.params)
    for path, array in tiny_weights.params.items():
        assert loaded.params[path].dtype == np.float32
        np.testing.assert_array_equal(loaded.params[path].view(np.uint32), array.view(np.uint32))
    assert loaded.retriever_tokenizer
    assert tiny_weights.retriever_tokenizer
    pairs = ((loaded.tokenizer, tiny_weights.tokenizer), (loaded.retriever_tokenizer, tiny_weights.retriever_tokenizer))
    for tokenizer, expected in pairs:
        assert tokenizer.ids(TEXTS) == expected.ids(TEXTS)
        assert tokenizer.add_special_tokens([5, 6]) == expected.add_special_tokens([5, 6])
        assert tokenizer.fingerprint == expected.fingerprint  # else an index's passages would be tokenized again
    assert loaded.tokenizer.ids(TEXTS) != loaded.retriever_tokenizer.ids(TEXTS)


def test_the_folder_holds_weights_and_tokenizers_only(saved):
    """The folder has weights, tokenizers and configs, but no dropout and no dtype of the run; no draft is left."""
    assert sorted(path.name for path in saved.iterdir()) == ["atlas.json", "params", "reader", "retriever"]
    metadata = json.loads((saved / "atlas.json").read_text())
    assert set(metadata) == {"format", "step", "index", "untied", "reader", "retriever", "files", "checksums"}
    assert not {"dropout", "dtype", "for_cpu"} & {*metadata["reader"], *metadata["retriever"]}
    assert list(saved.parent.iterdir()) == [saved]
    assert store.is_checkpoint(saved)
    assert not store.is_checkpoint(saved / "reader")


@pytest.mark.parametrize("model", ["reader", "retriever"])
def test_a_reader_or_a_retriever_alone_is_saved(tmp_path, tiny_weights, model):
    """A reader without a retriever, and a retriever without a reader, are loaded as they were saved."""
    cfg = AtlasConfig(**{"reader": None, "retriever": None, model: getattr(tiny_weights.cfg, model)})
    params = {path: array for path, array in tiny_weights.params.items() if path.startswith(f"{model}/")}
    tokenizer = None if model == "reader" else tiny_weights.retriever_tokenizer
    store.save(tmp_path / "half", Weights(params, cfg, tiny_weights.tokenizer, tokenizer))
    loaded = store.load(tmp_path / "half")
    assert loaded.cfg == cfg
    assert set(loaded.params) == set(params)
    assert (loaded.retriever_tokenizer is None) == (model == "reader")


def test_run_fields_are_not_saved(tmp_path, tiny_weights):
    """A checkpoint saved in a bfloat16 run with dropout has a float32 config without dropout."""
    cfg = tiny_weights.cfg.with_computation(dtype=jnp.bfloat16, dropout=0.1, for_cpu=True)
    store.save(tmp_path / "half", dataclasses.replace(tiny_weights, cfg=cfg))
    assert store.load_config(tmp_path / "half") == (tiny_weights.cfg, 0)


def files_by_size(folder: Path, tree: str = "params") -> list[Path]:
    """Lists the files that Orbax wrote, largest first."""
    found = [path for path in (folder / tree).rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: -path.stat().st_size)


def test_damaged_parameter_files_are_refused(folder, capfd):
    """The largest file truncated, then missing, then all missing: one line names the file, and stderr stays empty."""
    largest = files_by_size(folder)[0]
    size = largest.stat().st_size
    largest.write_bytes(largest.read_bytes()[: size // 2])
    refusal(lambda: store.load(folder), f"{largest}: {size // 2} bytes, not {size}; copy the checkpoint again")
    largest.unlink()
    refusal(lambda: store.load(folder), f"{largest}: missing")
    shutil.rmtree(folder / "params")
    refusal(lambda: store.load(folder), f"{folder}/params/", "missing")
    assert capfd.readouterr().err == ""


def test_every_missing_file_is_refused(folder):
    """A checkpoint without any one of Orbax's files is refused; with all of them it is loaded."""
    for file in files_by_size(folder):
        file.rename(folder / "aside")
        refusal(lambda file=file: store.load(folder), f"{file}: missing")
        (folder / "aside").rename(file)
    store.load(folder)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "atlas.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parameters_of_another_shape_are_refused(folder):
    """Configs that contradict the arrays' names or shapes are refused; Orbax alone would pad and cut."""
    metadata = json.loads((folder / "atlas.json").read_text())
    for changes in (
        {"reader": metadata["reader"] | {"d_ff": 161}},
        {"reader": metadata["reader"] | {"d_ff": 80}},
        {"reader": metadata["reader"] | {"num_layers": 2}},
        {"untied": True},
        {"retriever": None},
    ):
        edit(folder, **metadata | changes)
        refusal(lambda: store.load(folder), f"{folder}/params: damaged or incomplete")
    edit(folder, **metadata)
    store.load(folder)


def test_a_damaged_atlas_json_is_refused(folder):
    """An atlas.json cut short, of another format, or with missing, unknown or mistyped fields is refused by name."""
    path = folder / "atlas.json"
    text = path.read_text()
    metadata = json.loads(text)
    path.write_text(text[:-20])
    refusal(lambda: store.load(folder), f"{path}: not JSON")
    path.write_text("[]")
    refusal(lambda: store.load(folder), f"{path}: holds no object")
    path.write_text(json.dumps(metadata | {"format": 1}))
    refusal(lambda: store.load(folder), f"{path}: format 1, this program reads 2; use its release")
    path.write_text("{}")
    refusal(lambda: store.load(folder), f"{path}: format None")
    for key in ("step", "index", "untied", "reader", "retriever", "files", "checksums"):
        path.write_text(json.dumps({field: value for field, value in metadata.items() if field != key}))
        refusal(lambda: store.load(folder), f"{path}: damaged ('{key}')")
    for changes in (
        {"step": "seven"},
        {"reader": 5},
        {"reader": metadata["reader"] | {"experts": 8}},
        {"reader": metadata["reader"] | {"d_model": "64"}},
        {"retriever": metadata["retriever"] | {"num_heads": 0}},
        {"files": None},
        {"index": 7},
        {"checksums": []},
    ):
        path.write_text(json.dumps(metadata | changes))
        refusal(lambda: store.load(folder), f"{path}: damaged")


def test_a_missing_tokenizer_is_refused(folder):
    """A checkpoint without a tokenizer is refused; the message names the tokenizer's folder."""
    shutil.rmtree(folder / "retriever")
    refusal(lambda: store.load(folder), folder / "retriever")


def test_an_interrupted_save_keeps_the_old_checkpoint(folder, tiny_weights, monkeypatch):
    """A save interrupted at its end changes nothing and leaves no draft; a complete save replaces the checkpoint."""

    def interrupted(path, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(folder, dataclasses.replace(tiny_weights, step=9))
    assert list(folder.parent.iterdir()) == [folder]
    assert store.load(folder).step == 7
    monkeypatch.undo()
    store.save(folder, dataclasses.replace(tiny_weights, step=9))
    assert list(folder.parent.iterdir()) == [folder]
    assert store.load(folder).step == 9


def arrays_are_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return set(actual) == set(expected) and all(
        actual[name].dtype == array.dtype
        and actual[name].shape == array.shape
        and actual[name].tobytes() == array.tobytes()
        for name, array in expected.items()
    )


def load_all(resume_state: ResumeState | None) -> ResumeState:
    assert resume_state
    return resume_state.load()


def test_a_resume_state_is_loaded_bit_exact(trained, saved, resume_state, tiny_weights, tmp_path):
    """Arrays, JSON values and the index fingerprint are loaded as saved; a model alone has no resume state."""
    state = store.load_resume_state(trained)
    assert state
    assert arrays_are_equal(load_all(state).arrays, resume_state.arrays)
    assert state.metadata == resume_state.metadata
    assert store.load(trained).index == "5eed"
    assert store.load_resume_state(saved) is None
    store.save(tmp_path / "counters", tiny_weights, ResumeState({}, {"position": 1}))  # Orbax keeps no empty folder
    assert store.load_resume_state(tmp_path / "counters") == ResumeState({}, {"position": 1})


def restore_with_orbax(folder: Path) -> dict[str, np.ndarray]:
    """Restores the arrays with Orbax alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        return checkpointer.restore(folder, {name: np.zeros(x.shape, x.dtype) for name, x in metadata.items()})


def flip_bit(file: Path, position: float = 0.5) -> None:
    """Flips one bit, at this fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * position)] ^= 1 << 4
    file.write_bytes(content)


# Errors of TensorStore's threads after their event loop has closed
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_in_any_file_is_detected(trained, resume_state, tmp_path):
    """A bit flipped in the middle of a file is refused, or has no effect: every third file of params, all of training.

    Orbax alone reads changed values without an error.
    """
    params = store.load(trained).params
    silent, refusals = 0, []
    for file in [*files_by_size(trained)[::3], *files_by_size(trained, "training"), trained / "training.json"]:
        folder = Path(shutil.copytree(trained, tmp_path / "checkpoint"))
        flip_bit(folder / file.relative_to(trained))
        try:
            result = store.load(folder).params, load_all(store.load_resume_state(folder))
        except UserError as error:
            refusals.append(str(error))
        else:
            assert arrays_are_equal(result[0], params), file
            assert result[1], file
            assert arrays_are_equal(result[1].arrays, resume_state.arrays), file
            assert result[1].metadata == resume_state.metadata, file
        with contextlib.suppress(Exception):
            silent += not (
                arrays_are_equal(restore_with_orbax(folder / "params"), params)
                and arrays_are_equal(restore_with_orbax(folder / "training"), resume_state.arrays)
            )
        shutil.rmtree(folder)
    assert all(message.startswith(f"{tmp_path}/checkpoint/") and "\n" not in message for message in refusals)
    assert sum("is not what was saved" in message for message in refusals) >= silent >= 1
    assert len(refusals) > silent


def test_changed_values_and_files_are_refused_by_name(folder, trained, tmp_path):
    """Changed values in complete files are refused by folder and array; truncated and missing files by path."""
    metadata = json.loads((folder / "atlas.json").read_text())
    name = "reader/embed/embedding"
    metadata["checksums"]["params"][name] = metadata["checksums"]["params"][name][::-1]
    edit(folder, **metadata)
    refusal(lambda: store.load(folder), f"{folder}/params: {name} is not what was saved; copy the checkpoint again")
    assert is_whole(folder)  # its file sizes are right
    for name in ("training.json", "training/_METADATA"):
        damaged = Path(shutil.copytree(trained, tmp_path / name.replace("/", "-")))
        (damaged / name).write_bytes((damaged / name).read_bytes()[:-3])
        refusal(lambda damaged=damaged: store.load_resume_state(damaged), f"{damaged}/{name}", "bytes, not")
        (damaged / name).unlink()
        refusal(lambda damaged=damaged: store.load(damaged), f"{damaged}/{name}: missing")
        assert not is_whole(damaged)


def test_everything_is_synced_before_the_folder_appears(tmp_path, tiny_weights, resume_state, monkeypatch):
    """All files and folders of the draft are synced before its rename, and the parent folder after it."""
    synced: list[Path] = []

    def fsync(*paths: Path) -> None:
        assert (tmp_path / "checkpoint").exists() == bool(synced)
        synced.extend(paths)

    monkeypatch.setattr(store, "fsync", fsync)
    store.save(tmp_path / "checkpoint", tiny_weights, resume_state)
    *draft, parent = synced
    root = draft[-1]
    written = {path.relative_to(tmp_path / "checkpoint") for path in (tmp_path / "checkpoint").rglob("*")}
    assert {path.relative_to(root) for path in draft} == {Path("."), *written}
    assert parent == tmp_path


def test_an_unwritable_folder_is_refused(tmp_path, tiny_weights):
    """A checkpoint folder below a file is refused in one line with the folder."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "checkpoint"
    refusal(lambda: store.save(folder, tiny_weights), f"{folder}: cannot be written")


def test_orbax_is_silent(saved, capsys, caplog):
    """Loading logs and prints nothing, though Orbax by default logs each of its steps."""
    with caplog.at_level(logging.INFO):
        store.load(saved)
    assert [record for record in caplog.records if record.levelno < logging.ERROR] == []
    assert capsys.readouterr() == ("", "")


def test_a_checkpoint_larger_than_the_free_space_is_not_begun(tmp_path, tiny_weights, monkeypatch):
    """The message has the needed and the free space, and nothing is written; with enough space it is saved."""
    needed = sum(array.nbytes for array in tiny_weights.params.values())
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if fits:
            store.save(tmp_path / "full", tiny_weights)
        else:
            with pytest.raises(UserError, match=r"needs 0\.0 GB, but 0\.0 GB are left there; free some space"):
                store.save(tmp_path / "full", tiny_weights)
        assert [path.name for path in tmp_path.iterdir()] == ["full"] * fits


def test_file_systems_need_neither_locks_nor_synced_folders(folder, tmp_path, monkeypatch):
    """TensorStore takes no locks, neither for Orbax nor for the arrays, and syncs only where folders can be."""
    orbax_context = tensorstore_utils.get_ts_context(use_ocdbt=False).spec.to_json(include_defaults=False)
    assert orbax_context["file_io_locking"] == {"mode": "none"}
    assert orbax_context["file_io_sync"] is False
    assert orbax_arrays._write_context(tmp_path).spec.to_json(include_defaults=True)["file_io_sync"] is True
    monkeypatch.setattr(orbax_arrays, "can_sync_folders", lambda folder: False)
    context = orbax_arrays._write_context(tmp_path).spec.to_json(include_defaults=False)
    assert (context["file_io_sync"], context["file_io_locking"]) == (False, {"mode": "none"})
    store.save(tmp_path / "saved", store.load(folder))
    assert is_whole(tmp_path / "saved")
