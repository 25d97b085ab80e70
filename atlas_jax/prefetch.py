"""The host works ahead of the device."""

import collections
import concurrent.futures
from collections.abc import Generator, Iterable
from typing import TypeVar

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
