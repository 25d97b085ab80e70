"""`--model_path none`: weights of a folder, of the hub's cache or of the hub, and random ones only when asked for."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.formats.safetensors_file import open_safetensors, write_safetensors
from atlas_jax.checkpoints.pretrained import reader_config, retriever_config
from atlas_jax.checkpoints.restore import restore
from atlas_jax.checkpoints.store import Weights
from atlas_jax.commands.main import main
from atlas_jax.config import Config, ModelConfig, RetrievalConfig, RunConfig, TaskConfig
from atlas_jax.errors import UserError
from atlas_jax.models.contriever import ContrieverConfig
from tests.checkpoints.formats import pickles
from tests.commands.sample_evaluation import SAMPLE
from tests.preprocessing.download_server import Fault
from tests.runtime.processes import free_port
from tests.storage.hub_server import copy_without_weights, environment, path_of, publish, run_hub, stop, use_hub

READER, RETRIEVER = "google/t5-base-lm-adapt", "facebook/contriever"
NAMES = (READER, RETRIEVER)


def restored(reader: object = READER, retriever: object = RETRIEVER, *, seed: int = 0, **flags) -> Weights:
    """Restores what the flags name, without --model_path."""
    model = ModelConfig(str(reader), str(retriever), random_weights=flags.pop("random_weights", False))
    return restore(Config(model, TaskConfig("qa"), RunConfig(seed=seed), retrieval=RetrievalConfig(**flags))).load()


def assert_equal(actual: Weights, expected: Weights) -> None:
    assert actual.cfg == expected.cfg
    assert set(actual.params) == set(expected.params)
    for path, array in actual.params.items():
        np.testing.assert_array_equal(array, expected.params[path], err_msg=path)


@pytest.fixture(scope="module")
def assets(golden) -> tuple[Path, Path]:
    return golden / "assets/reader", golden / "assets/retriever"


@pytest.fixture(scope="module")
def expected(assets) -> Weights:
    return restored(*assets)


@pytest.fixture
def server(monkeypatch, tmp_path, assets):
    """A hub that has the goldens' T5 and Contriever under published names, and an empty cache."""
    with run_hub() as started:
        for name, folder in zip(NAMES, assets, strict=True):
            publish(started, name, folder)
        use_hub(monkeypatch, started, tmp_path / "cache")
        yield started


def downloads(server) -> list[str]:
    """Names of the weights' files that were asked for, in order."""
    files = [Path(path) for path, _ in server.gets()]
    return [file.name for file in files if file.suffix in (".safetensors", ".bin") or ".index." in file.name]


def shards_of(folder: Path, target: Path) -> Path:
    """Writes a folder's model.safetensors as two shards and their index."""
    arrays = open_safetensors(folder / "model.safetensors")
    copy_without_weights(folder, target)
    names = sorted(arrays)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(target / file, {name: arrays[name] for name in part}, lambda count: None)
        weight_map |= dict.fromkeys(part, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


# -- The hub -----------------------------------------------------------------------------------------------------------


def test_published_names_have_the_weights_of_the_hub(server, expected):
    """Equal to those of the folders, with their config.json; safetensors come first; a second run needs no hub."""
    for name in NAMES:
        server.files[path_of(name, "pytorch_model.bin")] = b"not read"
    assert_equal(restored(), expected)
    assert downloads(server) == ["model.safetensors"] * 2
    requests = len(server.requests)
    stop(server)
    assert_equal(restored(), expected)
    assert len(server.requests) == requests
    assert reader_config(READER) == expected.cfg.reader


def test_unused_models_are_not_downloaded(server):
    """--retrieve_only needs no reader's weights, and --use_file_passages no retriever's."""
    restored(retrieve_only=True)
    assert {path.split("/resolve/")[0] for path, _ in server.gets() if "safetensors" in path} == {RETRIEVER}
    server.requests.clear()
    restored(use_file_passages=True)
    assert {path.split("/resolve/")[0] for path, _ in server.gets()} <= {READER, "api/agent-harnesses"}


def test_pytorch_files_are_read_and_never_unpickled(server, expected, assets, tmp_path):
    """Without safetensors pytorch_model.bin gives the same weights; a pickle that runs a command is refused."""
    for name, folder in zip(NAMES, assets, strict=True):
        del server.files[path_of(name, "model.safetensors")]
        file = pickles.save(tmp_path / "weights", dict(open_safetensors(folder / "model.safetensors")))
        server.files[path_of(name, "pytorch_model.bin")] = file.read_bytes()
    assert_equal(restored(), expected)
    assert downloads(server) == ["pytorch_model.bin"] * 2
    marker = tmp_path / "ran"
    malicious = pickle.dumps(Malicious(marker), 2)
    file = pickles.write(tmp_path / "weights", malicious[2:-1])
    publish(server, "someone/bert", copy_without_weights(assets[1], tmp_path / "bert"))
    server.files[path_of("someone/bert", "pytorch_model.bin")] = file.read_bytes()
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .*posix\.system"):
        restored(retriever="someone/bert", retrieve_only=True)
    assert not marker.exists()
    pickle.loads(malicious)
    assert marker.exists()


class Malicious:
    """An object whose pickle runs a shell command when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_shards_are_downloaded_with_their_index(server, expected, assets, tmp_path):
    """All shards of the index, also where an earlier run was cut off between them; one that is missing is named."""
    del server.files[path_of(READER, "model.safetensors")]
    publish(server, READER, shards_of(assets[0], tmp_path / "shards"))
    second = path_of(READER, "model-00002-of-00002.safetensors")
    server.faults["HEAD", second] = [Fault(503)]
    with pytest.raises(UserError, match=f"{READER}: .*answers 503"):
        restored()
    assert_equal(restored(), expected)
    assert downloads(server).count("model-00001-of-00002.safetensors") == 1
    del server.files[second]
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which is no file"):
        restored()


def test_weights_that_are_missing_are_noticed_before_a_download(server, expected):
    """No weights in the repository, or no such repository: one line with the remedy, and nothing is fetched."""
    del server.files[path_of(RETRIEVER, "model.safetensors")]
    with pytest.raises(UserError, match=rf"^{RETRIEVER}: no weights on the hub http://.*--random_weights\)$"):
        restored()
    with pytest.raises(UserError, match=r"^nobody/nothing: no such folder, and no such repository on the hub"):
        restored(retriever="nobody/nothing")
    with pytest.raises(UserError, match=r"^/nowhere/at/all: no such folder"):
        restored(retriever="/nowhere/at/all")
    assert downloads(server) == []


def test_any_bert_of_the_hub_can_retrieve(server, expected, assets, tmp_path):
    """Its config.json comes from the hub; modules.json of sentence-transformers too, which changes the layer norm."""
    publish(server, "facebook/contriever-msmarco", assets[1])
    plain = restored(retriever="facebook/contriever-msmarco", retrieve_only=True)
    assert plain.cfg.retriever == expected.cfg.retriever
    publish(server, "someone/minilm", assets[1])
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    server.files[path_of("someone/minilm", "modules.json")] = json.dumps(modules).encode()
    server.files[path_of("someone/minilm", "1_Pooling/config.json")] = b'{"pooling_mode_cls_token": true}'
    for _ in range(2):  # the second time without the hub
        cfg = retriever_config("someone/minilm")
        assert (cfg.norm, cfg.pooling, cfg.normalize) == ("standard", "cls", True)
        assert retriever_config("facebook/contriever-msmarco").norm == "atlas"
        server.files.clear()
    server.files[path_of("someone/empty", "README.md")] = b""
    with pytest.raises(UserError, match=r"someone/empty: no config\.json on the hub http://"):
        retriever_config("someone/empty")


def test_a_cache_that_does_not_know_of_modules_is_warned_of(server, assets, tmp_path, caplog):
    """Another program cached config.json alone and the hub is not there: read as a plain BERT, which the log says."""
    cached = tmp_path / "cache" / "models--someone--bert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1")
    copy_without_weights(assets[1], cached / "snapshots" / "1")
    stop(server)
    assert retriever_config("someone/bert").norm == "atlas"
    assert "until then it is read as a model without modules.json" in caplog.text


def test_published_shapes_need_no_network(server):
    """The table answers where nothing is cached and no weights are needed, as in `atlas plan`."""
    assert reader_config(READER).d_model == 768
    assert retriever_config(RETRIEVER) == ContrieverConfig()
    assert server.requests == []


HOST = """
import os
from atlas_jax.config import RunConfig
from atlas_jax.runtime.cluster import connect
from atlas_jax.storage.hub import hub_file
with connect(RunConfig(coordinator=os.environ["COORDINATOR"], num_processes=2, process_id=int(os.environ["INDEX"]))):
    print(hub_file("facebook/contriever", ["model.safetensors"], "give up"))
"""


def test_hosts_with_caches_of_their_own_get_the_same_commit(server, tmp_path, assets):
    """Process 0 downloads first; another host takes its commit, though its own cache has another one of main."""
    older = tmp_path / "1" / "hub" / "models--facebook--contriever"
    (older / "refs").mkdir(parents=True)
    (older / "refs" / "main").write_text("0" * 40)
    (older / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (older / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(b"older")
    coordinator = f"127.0.0.1:{free_port()}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HOST],
            env=environment(server, tmp_path / str(index), XLA_FLAGS="", COORDINATOR=coordinator, INDEX=str(index)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    paths = [Path(output.strip()) for output, _ in outputs]
    assert [path.read_bytes() for path in paths] == [(assets[1] / "model.safetensors").read_bytes()] * 2
    assert paths[0] != paths[1]
    assert downloads(server) == ["model.safetensors"] * 2


# -- Folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_weights_is_refused(assets, tmp_path):
    """Also one with shards and no index, or an index that names a missing shard: the message names what to add."""
    folder = copy_without_weights(assets[1], tmp_path / "encoder")
    with pytest.raises(UserError, match=rf"^{folder}: no weights \(model\.safetensors, .*--random_weights\)$"):
        restored(assets[0], folder)
    shards = shards_of(assets[1], tmp_path / "shards")
    restored(assets[0], shards)
    (shards / "model-00001-of-00002.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"index\.json: names model-00001-of-00002\.safetensors, which is no file"):
        restored(assets[0], shards)
    (tmp_path / "elsewhere").rename(shards / "model-00001-of-00002.safetensors")
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"holds model-00001-of-00002\.safetensors but no model\.safetensors\.index"):
        restored(assets[0], shards)


@pytest.mark.parametrize("command", ["evaluate", "train", "convert", "index build"])
def test_no_command_invents_weights(command, assets, tmp_path, capsys, golden):
    """Without weights each ends with status 2 and one line, and writes no result; the sample's folders have none."""
    folder = copy_without_weights(assets[1], tmp_path / "encoder")
    models = ["--reader_model_type", str(assets[0]), "--retriever_model_path", str(folder)]
    passages = ["--passages", str(SAMPLE / "passages.jsonl"), "--max_passages", "4"]
    data = ["--task", "multiple_choice", "--checkpoint_dir", str(tmp_path / "runs"), "--name", "run"]
    argv = {
        "evaluate": [*data, *passages, "--eval_data", str(SAMPLE / "mmlu.jsonl")],
        "train": [*data, *passages, "--train_data", str(SAMPLE / "mmlu.jsonl"), "--total_steps", "1"],
        "convert": ["--output", str(tmp_path / "out")],
        "index build": [*passages, "--output", str(tmp_path / "out")],
    }[command]
    assert main([*command.split(), *models, *argv]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(errors) == 1
    assert errors[0].startswith(f"atlas: {folder}: no weights")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "runs").rglob("*.metrics.json"))


def test_random_weights_are_drawn_when_asked_for(assets, server):
    """Both models, from --seed alone: nothing is read from folders, and of a name only the tokenizer is fetched."""
    drawn, again, other = (restored(*assets, seed=seed, random_weights=True) for seed in (0, 0, 1))
    assert_equal(drawn, again)
    read = restored(*assets)
    for path, array in read.params.items():
        assert drawn.params[path].shape == array.shape
    for weights in (other, read):
        for model in ("reader/", "retriever/"):
            paths = [path for path in drawn.params if path.startswith(model) and path.endswith(("kernel", "embedding"))]
            assert paths
            assert not any(np.array_equal(drawn.params[path], weights.params[path]) for path in paths)
    named = restored(random_weights=True)
    assert_equal(named, drawn)
    assert downloads(server) == []


def test_random_weights_contradict_a_model_path():
    """The flag with --model_path is refused at once, naming both."""
    with pytest.raises(UserError, match="--random_weights: --model_path models/xxl has weights; leave one"):
        ModelConfig("t5-small", model_path="models/xxl", random_weights=True)
    assert ModelConfig("t5-small", model_path="models/xxl").random_weights is False
