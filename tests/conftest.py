"""Setup of every test: offline, eight CPU devices, shape annotations checked, rank promotion forbidden.

All tests, and the processes that they start, share one compilation cache.
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path

# The workers of pytest-xdist inherit the cache folder of the process that starts them
os.environ["ATLAS_TEST_PROGRAMS"] = os.environ.get("ATLAS_TEST_PROGRAMS") or tempfile.mkdtemp(prefix="atlas-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["ATLAS_TEST_PROGRAMS"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

from atlas_jax.runtime.cpu_threads import set_cpu_threads

set_cpu_threads()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and its children ignore SIGINT
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("atlas_jax", "beartype.beartype")  # imports from here on check their annotations

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


# Folders and files whose tests compile models, train, or start processes; `make check` leaves them out
SLOW = ("checkpoints", "commands", "compatibility", "evaluation", "launch", "mesh", "models", "recipes", "training")
SLOW_FILES = (
    "docs/test_commands.py",
    "runtime/test_cluster.py",
    "runtime/test_process_group.py",
    "storage/test_hub.py",
)
QUICK_FILES = ("checkpoints/formats", "commands/test_flags.py")
QUICK_FILES += ("training/test_optimizer.py", "training/test_reporting.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks slow tests and runs the longest first, so that no worker waits for another at the end."""
    items.sort(key=lambda item: (item.path.name != "test_commands.py", item.path.parent.name != "training"))
    for item in items:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        if path.startswith((*SLOW, *SLOW_FILES)) and not path.startswith(QUICK_FILES):
            item.add_marker("slow")


def pytest_sessionfinish() -> None:
    """Removes the compilation cache of this run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["ATLAS_TEST_PROGRAMS"], ignore_errors=True)


@pytest.fixture(scope="module")
def quick_compiler():
    """Compiles without most of LLVM's optimizations, which is fastest for programs that run once or are only read."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def quick_compiler_in_subprocesses():
    """Sets the option of `quick_compiler` for the commands that a test starts."""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.fixture(scope="module")
def one_faiss_thread():
    """Limits faiss to one thread: its threads spin while they wait, which is slow on shared cores."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the figures that the PyTorch reference computed."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def published(golden, tmp_path_factory) -> Path:
    """A folder with copies of the golden index_1shard and index_4shards, beside whose shards a run writes its copy."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("index_1shard", "index_4shards"):
        shutil.copytree(golden / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def mesh():
    """A mesh of all eight devices, over which the batch is sharded."""
    from atlas_jax.mesh import make_mesh

    return make_mesh()


@pytest.fixture(scope="session")
def tiny_config(golden):
    """The flags of the goldens: the reference's checkpoint before training, 160 tokens."""
    from atlas_jax.config import Config, ModelConfig, TaskConfig, TextConfig

    reader, retriever = (str(golden / "assets" / name) for name in ("reader", "retriever"))
    return Config(
        model=ModelConfig(reader, retriever, model_path=str(golden / "checkpoint_initial")),
        task=TaskConfig("qa"),
        text=TextConfig(text_maxlength=160),
    )


@pytest.fixture(scope="session")
def tiny_weights(tiny_config):
    """The weights and tokenizers of `tiny_config`'s checkpoint."""
    from atlas_jax.checkpoints.restore import restore

    return restore(tiny_config).load()


@pytest.fixture(scope="session")
def processes():
    """A `Processes`, which starts several processes of one run."""
    from tests.runtime.processes import Processes

    with Processes() as started:
        yield started
