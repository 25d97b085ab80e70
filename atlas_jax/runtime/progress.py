"""Long work, visible: a bar on a terminal, a line now and then in a log file."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 30.0


@contextlib.contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """Yields a function to tell how many more are done; shows rate and time left."""
    if sys.stderr.isatty():
        with logging_redirect_tqdm(), tqdm(total=total, desc=what, unit=f" {unit}", dynamic_ncols=True) as bar:
            yield bar.update
        return
    start = last = time.monotonic()
    done = 0

    def tell() -> None:
        seconds = max(time.monotonic() - start, 1e-9)
        of = f" of {total}" if total else ""
        left = f", {(total - done) * seconds / max(done, 1):.0f} s left" if total and done < total else ""
        logger.info("%s: %d%s %s, %.1f/s, %.0f s%s", what, done, of, unit, done / seconds, seconds, left)

    def more(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last > SECONDS_PER_LINE:
            last = time.monotonic()
            tell()

    yield more
    if done:
        tell()
