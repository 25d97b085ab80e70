"""Background threads that compute items ahead of their consumer: the host works while the device computes."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Yields the items in order; one thread computes up to `depth` items ahead. Its errors are raised here."""
    iterator = iter(items)
    end = object()
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        pending = collections.deque(pool.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc]
        finally:
            for future in pending:
                future.cancel()


def map_in_order(function: Callable[[S], T], items: Iterable[S], workers: int) -> Generator[T, None, None]:
    """`map(function, items)` on `workers` threads, at most `workers` results ahead; the first error is raised here.

    When the generator ends or is closed, all its threads have ended.
    """
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="in-order") as pool:
        pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
