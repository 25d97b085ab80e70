"""A jitted function compiled ahead, once for each shape of its arguments, and said so."""

import logging
import time
from collections.abc import Callable
from typing import Any

import jax

logger = logging.getLogger(__name__)


def keep_programs(folder: str) -> None:
    """Compiled programs are kept in a folder, where the next run of the same shapes finds them."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    logger.info("compiled programs are kept in %s", folder)


class Program:
    """Calls `function(state, *args)` compiled; `args` are trees of arrays, `state` always has the same shapes."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self.compile_seconds = 0.0
        self._jitted = jax.jit(function)
        self._compiled: dict[Any, Any] = {}

    def __call__(self, state: Any, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        shapes = (structure, *((x.shape, str(x.dtype)) for x in leaves))
        if shapes not in self._compiled:
            start = time.perf_counter()
            self._compiled[shapes] = self._jitted.lower(state, *args).compile()
            seconds = time.perf_counter() - start
            self.compile_seconds += seconds
            shape = " x ".join(map(str, max((x.shape for x in leaves), key=len, default=())))
            logger.info("compiled %s for %s in %.1f s (program %d)", self.name, shape, seconds, self.count)
        return self._compiled[shapes](state, *args)

    @property
    def count(self) -> int:
        """How many shapes were compiled."""
        return len(self._compiled)
