"""The host works ahead of the device."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(items: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The items in order, made by a thread that is at most `depth` ahead; its errors are raised here."""
    iterator = iter(items)
    end = object()
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        made = collections.deque(pool.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := made.popleft().result()) is not end:
                made.append(pool.submit(next, iterator, end))
                yield item  # type: ignore[misc]
        finally:
            for future in made:
                future.cancel()


def map_in_order(work: Callable[[S], T], items: Iterable[S], workers: int) -> Generator[T, None, None]:
    """`map(work, items)` by that many threads, of whose results as many wait; the first error is raised here.

    When this ends or is closed, none of them works any more.
    """
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="in-order") as pool:
        made: collections.deque[concurrent.futures.Future[T]] = collections.deque()
        try:
            for item in items:
                made.append(pool.submit(work, item))
                if len(made) > workers:
                    yield made.popleft().result()
            while made:
                yield made.popleft().result()
        finally:
            for future in made:
                future.cancel()
