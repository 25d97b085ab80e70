"""Ahead-of-time compilation of a jitted function, once for each shape of its arguments, and the compilation cache."""

import concurrent.futures
import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from atlas_jax.runtime.process_group import process_group

logger = logging.getLogger(__name__)

T = TypeVar("T")


def enable_compilation_cache(folder: str, cache: Path) -> None:
    """Sets the folder of JAX's persistent compilation cache, from which later runs load compiled programs.

    `auto` is JAX_COMPILATION_CACHE_DIR or else a folder in `cache`; `none` turns the cache off, as does, with a
    warning, a folder that cannot be written.
    """
    if folder == "auto":
        variable = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        folder = os.path.expanduser(variable) if variable else str(cache / _programs_name())
    if folder != "none":
        try:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            logger.warning("compiled programs are not kept: %s cannot be written (%s)", folder, error.strerror)
            folder = "none"
    jax.config.update("jax_compilation_cache_dir", None if folder == "none" else folder)
    if folder != "none":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        logger.info("compiled programs are kept in %s", folder)


def _programs_name() -> str:
    """Returns the name of the folder of programs, one for each set of CPU features.

    JAX's cache keys do not include these features, and machines with different CPUs may share a home folder.
    """
    cpu = Path("/proc/cpuinfo")  # Linux only
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    return f"programs-{platform.machine()}-{kind}"


class CompiledFunction:
    """Calls `function(state, *args)` compiled; `args` are trees of arrays, `state` has the same shapes in every call.

    With `donate` the buffers of `state` are donated to the results. On a mesh the function then returns the next state,
    which keeps the shardings of `state`, and other results. XLA chooses the sharding of the other results, or, with
    `gather`, they are replicated on all devices.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        mesh: Mesh | None = None,
        *,
        donate: bool = False,
        gather: bool = False,
    ):
        self.name = name
        self.compile_seconds = 0.0
        self._function, self._mesh, self._donate = function, mesh, donate
        self._out_shardings = NamedSharding(mesh, PartitionSpec()) if mesh and gather else None
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, state: Any, *args: Any) -> Any:
        return self.compile_for(state, *args)(state, *args)

    def compile_for(self, state: Any, *args: Any) -> jax.stages.Compiled:
        """Compiles for the shapes and dtypes of these arguments, unless already compiled; does not run the function.

        All processes of a run have to call this: they wait for each other. The shapes of `state` are not compared.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, *((x.shape, str(x.dtype)) for x in leaves))
        if shapes not in self._compiled:
            start = time.perf_counter()
            lowered = self._lower(state, *args)
            self._compiled[shapes] = _in_thread(f"compile {self.name}", lowered.compile)
            seconds = time.perf_counter() - start
            shape = " x ".join(map(str, max((x.shape for x in leaves), key=len, default=())))
            logger.info("compiled %s for %s in %.1f s (program %d)", self.name, shape, seconds, self.count)
            process_group().barrier()  # else a process with a cache hit could report a slower process as stuck
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[shapes]

    def _lower(self, state: Any, *args: Any) -> jax.stages.Lowered:
        donated = 0 if self._donate else ()
        if self._mesh is None:
            return jax.jit(self._function, donate_argnums=donated).lower(state, *args)
        out_shardings: Any = self._out_shardings
        if self._donate:
            out_shardings = jax.tree.map(lambda x: x.sharding, state), out_shardings
        with jax.set_mesh(self._mesh):
            return jax.jit(self._function, donate_argnums=donated, out_shardings=out_shardings).lower(state, *args)

    @property
    def count(self) -> int:
        """Number of compiled programs, one for each set of argument shapes."""
        return len(self._compiled)


def _in_thread(name: str, function: Callable[[], T]) -> T:
    """Returns `function()`, called in a new thread, so that signal handlers run in this thread while XLA compiles.

    If a handler raises, the wait ends and XLA continues to compile. The thread is not a daemon, since XLA would crash
    once the interpreter is gone.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    running = threading.Lock()  # not `join` or `Future.result`, which an exception of a signal handler would break
    running.acquire()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)
        finally:
            running.release()

    threading.Thread(target=call, name=name).start()
    while not running.acquire(timeout=0.1):  # with a timeout: a signal just before the wait does not end it
        pass
    return result.result()
