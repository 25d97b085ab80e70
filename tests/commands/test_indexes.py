"""Indexes that are broken or do not fit: exit status 2 and one line."""

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
from tests.commands.sample_run import PASSAGES, SAMPLE, command, published, put


def test_more_passages_than_there_are(refused, done, tmp_path):
    """--n_context, or what is reranked, above the size of the index: the flag and the size."""
    index = done / "index"
    refused(command(tmp_path, load_index_path=index, n_context=31), "--n_context 31", "30 passages")
    flags = {"retrieve_with_rerank": True, "n_to_rerank_with_retrieve_with_rerank": 31}
    refused(command(tmp_path, load_index_path=index, **flags), "--n_to_rerank_with_retrieve_with_rerank 31", "30")


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
    zeros = export_weights({path: np.zeros(s.shape, s.dtype) for path, s in param_shapes(cfg).items()}, cfg)
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
