"""A jitted function compiled ahead, once for each shape of its arguments, and said so."""

import concurrent.futures
import hashlib
import logging
import os
import platform
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


def enable_compilation_cache(folder: str) -> None:
    """Compiled programs are kept in a folder, where the next run of the same shapes finds them.

    `auto`: where the environment says (JAX_COMPILATION_CACHE_DIR), else in the user's cache; `none`: nowhere.
    """
    if folder == "auto":
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(_users_cache())
    jax.config.update("jax_compilation_cache_dir", None if folder == "none" else folder)
    if folder != "none":
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        logger.info("compiled programs are kept in %s", folder)


def _users_cache() -> Path:
    """One folder for each kind of processor, which JAX would not tell apart: homes are shared between machines."""
    cpu = Path("/proc/cpuinfo")  # of Linux
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "atlas_jax" / f"programs-{platform.machine()}-{kind}"


class CompiledFunction:
    """Calls `function(state, *args)` compiled; `args` are trees of arrays, `state` always has the same shapes.

    With `donate` the state of a call is used up: its memory holds the results. On a mesh these are the next state,
    which lies where this one does, and others. Results are split as XLA likes it, or with `gather` whole everywhere.
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
        self._results = NamedSharding(mesh, PartitionSpec()) if mesh and gather else None
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, state: Any, *args: Any) -> Any:
        return self.compile_for(state, *args)(state, *args)

    def compile_for(self, state: Any, *args: Any) -> jax.stages.Compiled:
        """Compiles for these shapes, unless that is done, and runs nothing."""
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, *((x.shape, str(x.dtype)) for x in leaves))
        if shapes not in self._compiled:
            start = time.perf_counter()
            lowered = self._lower(state, *args)
            self._compiled[shapes] = _in_thread(f"compile {self.name}", lowered.compile)
            seconds = time.perf_counter() - start
            shape = " x ".join(map(str, max((x.shape for x in leaves), key=len, default=())))
            logger.info("compiled %s for %s in %.1f s (program %d)", self.name, shape, seconds, self.count)
            process_group().barrier()  # who found it in a cache is not to think that another one, who did not, is stuck
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[shapes]

    def _lower(self, state: Any, *args: Any) -> jax.stages.Lowered:
        donated = 0 if self._donate else ()
        if self._mesh is None:
            return jax.jit(self._function, donate_argnums=donated).lower(state, *args)
        results: Any = self._results
        if self._donate:
            results = jax.tree.map(lambda x: x.sharding, state), results
        with jax.set_mesh(self._mesh):
            return jax.jit(self._function, donate_argnums=donated, out_shardings=results).lower(state, *args)

    @property
    def count(self) -> int:
        """How many shapes were compiled."""
        return len(self._compiled)


def _in_thread(name: str, function: Callable[[], T]) -> T:
    """Calls it in a thread of its own: XLA holds up the signals of its caller, who, waiting here, gets them at once.

    When one ends the wait, XLA goes on. It would crash with the interpreter gone, so the thread is no daemon.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()
    running = threading.Lock()  # a bare one: `join` and `Future.result` do not survive what a signal handler raises
    running.acquire()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)
        finally:
            running.release()

    threading.Thread(target=call, name=name).start()
    while not running.acquire(timeout=0.1):  # a signal just before the wait does not wake it
        pass
    return result.result()
