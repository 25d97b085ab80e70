"""`atlas evaluate` on indexes that are damaged, or do not match the model: exit status 2 and one line."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from atlas_jax.checkpoints.pretrained import retriever_config
from atlas_jax.checkpoints.weights import export_weights
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from tests.checkpoints.formats import pickles
from tests.commands.sample_evaluation import PASSAGES, SAMPLE, copy_published_index, evaluate_argv, write_file


def test_more_passages_per_query_than_the_index_has_are_refused(assert_refused, finished_run, tmp_path):
    """--n_context or the number to rerank above the size of the index: the flag and the size are named."""
    index = finished_run / "index"
    assert_refused(evaluate_argv(tmp_path, load_index_path=index, n_context=31), "--n_context 31", "30 passages")
    flags = {"retrieve_with_rerank": True, "n_to_rerank_with_retrieve_with_rerank": 31}
    assert_refused(
        evaluate_argv(tmp_path, load_index_path=index, **flags), "--n_to_rerank_with_retrieve_with_rerank 31", "30"
    )


def test_published_shards_that_do_not_match_name_the_file(assert_refused, golden, tmp_path):
    """Passages without embeddings, embeddings without passages, unequal counts, and damaged files."""
    fourth = (golden / "index_4shards" / "passages.3.pt").read_bytes()
    flags = {"save_index_path": tmp_path / "index", "retrieve_only": True}

    def refuse(name: str, *parts: str, **changes: bytes | None) -> None:
        folder = copy_published_index(tmp_path / name, golden, **changes)
        assert_refused(evaluate_argv(tmp_path, load_index_path=folder, **flags), folder, *parts)
        assert not (tmp_path / "index").exists()

    refuse("one", "passages.2.pt: missing, one of 4 shards", passages_2_pt=None)
    refuse("two", "embeddings.1.pt: missing, one of 4 shards", embeddings_1_pt=None)
    refuse("three", "passages.3.pt: missing, one of 4 shards", passages_3_pt=None)
    too_few_passages = pickle.dumps(pickle.loads(fourth)[:-1])
    refuse("four", "passages.3.pt: ", "embeddings.3.pt has", "fetch both again", passages_3_pt=too_few_passages)
    refuse("five", "passages.3.pt: is cut short", passages_3_pt=fourth[:1000])
    refuse("six", "passages.0.pt: holds no list of passages", passages_0_pt=pickle.dumps({"a": 1}))
    refuse("seven", "embeddings.2.pt: ", embeddings_2_pt=(golden / "index_4shards/embeddings.2.pt").read_bytes()[:-9])


def test_published_vectors_of_another_width_name_both_widths(assert_refused, tmp_path):
    """Vectors of width 40 for a retriever of width 48; then integers, which are no vectors; then an empty folder."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "passages.0.pt").write_bytes(pickle.dumps(PASSAGES[:3]))
    pickles.save(folder / "embeddings.0.pt", np.zeros((40, 3), np.float16))
    assert_refused(
        evaluate_argv(tmp_path, load_index_path=folder), folder / "embeddings.0.pt", "width 40", "are 48 wide"
    )
    pickles.save(folder / "embeddings.0.pt", np.zeros((48, 3), np.int64))
    assert_refused(
        evaluate_argv(tmp_path, load_index_path=folder), folder / "embeddings.0.pt", "holds no matrix of vectors"
    )
    shutil.rmtree(folder)
    folder.mkdir()
    assert_refused(evaluate_argv(tmp_path, load_index_path=folder), folder, "neither index.json nor embeddings.0.pt")


def test_an_index_of_another_retriever_is_refused(assert_refused, finished_run, golden, tmp_path):
    """An index folder holds its retriever's fingerprint: another retriever of the same or another width is refused."""
    trained = evaluate_argv(tmp_path, load_index_path=finished_run / "index", model_path=golden / "checkpoint_linear")
    assert_refused(trained, finished_run / "index", "built by another retriever", "--passages")
    narrow = tmp_path / "narrow"
    shutil.copytree(SAMPLE / "retriever", narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"hidden_size": 40}))
    cfg = AtlasConfig(None, retriever_config(str(narrow)))
    zeros = export_weights({path: np.zeros(s.shape, s.dtype) for path, s in param_shapes(cfg).items()}, cfg)
    arrays = {name.removeprefix("retriever.contriever."): np.ascontiguousarray(array) for name, array in zeros.items()}
    save_file(arrays, narrow / "model.safetensors")
    flags = {"retriever_model_path": narrow, "retrieve_only": True, "model_path": None}
    argv = evaluate_argv(tmp_path, load_index_path=finished_run / "index", **flags)
    assert_refused(argv, finished_run / "index", "vectors of width 48", "are 40 wide", "--passages")


def test_a_damaged_index_names_the_file(assert_refused, finished_run, tmp_path):
    """Files of an index folder that are cut short or missing, and an index.json of a later format or another count."""

    def refuse(name: str, change: Callable[[Path], object], *parts: str) -> None:
        folder = tmp_path / name
        shutil.copytree(finished_run / "index", folder)
        change(folder)
        assert_refused(evaluate_argv(tmp_path, load_index_path=folder), folder, *parts)

    def truncate(name: str) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30])

    refuse("one", truncate("embeddings.npy"), "embeddings.npy: not a whole .npy file")
    refuse("two", truncate("passages/text.bin"), "text.bin")
    refuse("three", truncate("index.json"), "index.json: not JSON")
    refuse("four", lambda folder: (folder / "embeddings.npy").unlink(), "embeddings.npy")
    metadata = json.loads((finished_run / "index" / "index.json").read_text())
    refuse("five", lambda f: (f / "index.json").write_text(json.dumps(metadata | {"format": 2})), "format 2, not 1")
    refuse("six", lambda f: (f / "index.json").write_text(json.dumps(metadata | {"count": 29})), "29 vectors, but 30")


@pytest.mark.parametrize("kind", ["file", "folder", "other_index"])
def test_save_index_path_does_not_overwrite_other_files(assert_refused, tmp_path, kind):
    """A file, a folder with another file, or another program's index.json at the path: refused and left unchanged."""
    existing = tmp_path / "there"
    file = existing
    if kind == "file":
        write_file(existing, b"mine")
    else:
        existing.mkdir()
        file = existing / ("thesis.txt" if kind == "folder" else "index.json")
        write_file(file, b'{"mine": 1}')
    before = file.read_bytes()
    argv = evaluate_argv(tmp_path, save_index_path=existing, retrieve_only=True)
    assert_refused(argv, f"--save_index_path {existing}: holds something else than an index; choose a new folder")
    assert file.read_bytes() == before
