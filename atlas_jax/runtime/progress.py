"""Progress of long work: a tqdm bar on a terminal, an occasional line in a log file."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 30.0
MEGABYTE = 1_000_000


@contextlib.contextmanager
def progress(description: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """Yields `advance(count)`, which adds `count` finished units; shows rate and, with a `total`, the time left."""
    if sys.stderr.isatty():
        with logging_redirect_tqdm(), tqdm(total=total, desc=description, unit=f" {unit}", dynamic_ncols=True) as bar:
            yield bar.update
        return
    start = last_line = time.monotonic()
    done = logged = 0

    def log_line() -> None:
        nonlocal logged
        logged = done
        seconds = max(time.monotonic() - start, 1e-9)
        of_total = f" of {total}" if total else ""
        left = f", {(total - done) * seconds / max(done, 1):.0f} s left" if total and done < total else ""
        logger.info("%s: %d%s %s, %.1f/s, %.0f s%s", description, done, of_total, unit, done / seconds, seconds, left)

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        if time.monotonic() - last_line > SECONDS_PER_LINE:
            last_line = time.monotonic()
            log_line()

    yield advance
    if done > logged:
        log_line()


@contextlib.contextmanager
def byte_progress(description: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """`progress` in megabytes; yields a function to call with the number of bytes just processed."""
    done = 0
    with progress(description, "MB", total and total // MEGABYTE) as advance_megabytes:

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            advance_megabytes(done // MEGABYTE - before // MEGABYTE)

        yield advance
