"""Files of Hugging Face's hub: from its cache, else downloaded into it; a download that was cut off is resumed.

The library `huggingface_hub` decides where the cache and the hub are (HF_HOME, HF_ENDPOINT, HF_TOKEN) and whether the
network may be used (HF_HUB_OFFLINE). It cannot resume a download of another process, so the bytes are fetched here.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import byte_progress
from atlas_jax.storage.files import fsync

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

logger = logging.getLogger(__name__)

ATTEMPTS = 4  # in a row without a byte, before a download is given up
MAIN = "main"  # the revision of a repository unless a commit is named


def is_hub_name(name: str) -> bool:
    """Whether `name` is no folder here but can be a repository's name, as google/t5-base-lm-adapt is."""
    return re.fullmatch(r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w[\w.-]*", name) is not None and not Path(name).is_dir()


def address() -> str:
    """Returns the address of the hub."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def cached_file(name: str, files: Sequence[str], revision: str = MAIN) -> Path | None:
    """Returns the path of the first of `files` that the hub's cache has of a repository; None if it has none."""
    import huggingface_hub  # takes a second, and only names of the hub need it

    paths = (huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files)
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def has_file(name: str, files: Sequence[str], remedy: str) -> bool:
    """Whether the cache or the repository on the hub has one of `files`; downloads nothing. See `hub_file`."""

    def find() -> bool:
        with _explained(name, files, remedy):
            return _find(name, files, MAIN) is not None

    return bool(process_group().run_on_first(find))


def hub_file(
    name: str, files: Sequence[str], remedy: str, companions: Sequence[str] = (), revision: str = MAIN
) -> Path | None:
    """Returns the path in the hub's cache of the first of `files` that a repository has; None if it has none of them.

    What is in the cache comes first, and then the hub is not asked. Otherwise the file is downloaded, after those of
    `companions` that the repository has. UserError, which ends in `remedy`, if the hub cannot be asked or refuses. A
    collective call: process 0 downloads first, and all get the same commit.
    """

    def fetch(files: Sequence[str], revision: str) -> tuple[str, Path] | None:
        with _explained(name, files, remedy):
            file = _find(name, files, revision)
            if file is None:
                return None
            path = cached_file(name, [file], revision)
            if path is None:
                for companion in companions:
                    if _find(name, [companion], revision):
                        _download(name, companion, revision)
                path = _download(name, file, revision)
            return file, path

    def fetch_first() -> list[str] | None:
        found = fetch(files, revision)
        return found and [found[0], found[1].parts[-1 - len(Path(found[0]).parts)]]  # .../snapshots/{commit}/{file}

    found = process_group().run_on_first(fetch_first)
    if found is None:
        return None
    file, commit = found
    paths = process_group().run_on_all(lambda: [str(path) for _, path in filter(None, [fetch([file], commit)])])
    return Path(*paths[process_group().index])


def _find(name: str, files: Sequence[str], revision: str) -> str | None:
    """Returns the first of `files` that is in the cache or else on the hub; None if the repository has none of them."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    cached = {file: huggingface_hub.try_to_load_from_cache(name, file, revision=revision) for file in files}
    if found := next((file for file, path in cached.items() if isinstance(path, str)), None):
        return found
    for file in [file for file, path in cached.items() if path is None]:  # else the cache knows that there is no such
        try:
            _metadata(name, file, revision)
            return file
        except HfHubHTTPError as error:
            if not _says_no_such_file(error):
                raise
            with contextlib.suppress(OSError):  # a HfHubHTTPError; the library's cache then records that there is none
                huggingface_hub.hf_hub_download(name, file, revision=revision)
    return None


def _metadata(name: str, file: str, revision: str) -> "HfFileMetadata":
    """Asks the hub for a file's commit, size and ETag, which is its SHA-256 if it is large."""
    import huggingface_hub

    metadata = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file, revision=revision))
    if not metadata.commit_hash or not metadata.etag:
        raise ValueError("what answers there is no hub: it names no commit")
    return metadata


def _download(name: str, file: str, revision: str) -> Path:
    """Downloads a file into the cache, in one process at a time, and returns its path there."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    metadata = _metadata(name, file, revision)
    folder = f"models--{name.replace('/', '--')}"
    blob = Path(constants.HF_HUB_CACHE, folder, "blobs", metadata.etag or "")
    lock = Path(constants.HF_HUB_CACHE, ".locks", folder, f"{blob.name}.download.lock")
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            url = huggingface_hub.hf_hub_url(name, file, revision=metadata.commit_hash)
            _download_blob(f"{name}/{file}", url, blob, metadata.size)
    return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))  # finds the blob, and links to it


def _download_blob(title: str, url: str, blob: Path, size: int | None) -> None:
    """Downloads a file of `size` bytes to `blob`, from where a process before this one was cut off."""
    partial = blob.with_name(f"{blob.name}.atlas.incomplete")
    with open(partial, "ab") as output:
        missing = None if size is None else size - output.tell()
        if missing and missing > (free := shutil.disk_usage(blob.parent).free):
            raise UserError(
                f"{title}: {missing / 1e9:.1f} GB are to be downloaded to {blob.parent}, which has room for "
                f"{free / 1e9:.1f} GB; free some, or set HF_HOME to another folder"
            )
        if output.tell():
            logger.info("%s: resuming a download after %d MB", title, output.tell() // 1_000_000)
        with byte_progress(f"downloading {title}", missing) as advance:
            _append_until_complete(url, output, size, advance)
    if not _is_whole(partial, size, blob.name):
        partial.unlink()
        raise UserError(f"{title}: arrived damaged, and was removed; start the command again")
    fsync(partial)
    os.replace(partial, blob)


def _is_whole(path: Path, size: int | None, etag: str) -> bool:
    """Whether a file has the size and, if its ETag is one, the SHA-256 that the hub names."""
    if size is not None and path.stat().st_size != size:
        return False
    with open(path, "rb") as content:
        return len(etag) != 64 or hashlib.file_digest(content, "sha256").hexdigest() == etag


def _append_until_complete(url: str, output: IO[bytes], size: int | None, advance: Callable[[int], object]) -> None:
    """Appends the bytes that a file lacks, anew after each interruption; raises the error of the last attempt."""
    failures = 0
    while size is None or output.tell() < size:
        start = output.tell()
        error: Exception | None = None
        try:
            _append(url, output, advance)
            if size is None:
                return
        except OSError:  # the hub refuses (HfHubHTTPError), or the disk does
            raise
        except Exception as failure:  # of the HTTP library: the connection broke
            error = failure
        failures = failures + 1 if output.tell() <= start else 0
        if failures >= ATTEMPTS:
            raise error or ConnectionError("it sends less than it promises")
        if output.tell() < (size or 0):
            logger.warning("%s: interrupted after %d bytes; resuming", url, output.tell())
            time.sleep(1)


def _append(url: str, output: IO[bytes], advance: Callable[[int], object]) -> None:
    """Appends to `output` what follows in the file at `url`, as it comes."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    start = output.tell()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the whole file comes, from its first byte
            output.seek(0)
            output.truncate()
        for chunk in response.iter_bytes():
            output.write(chunk)
            advance(len(chunk))


def _says_no_such_file(error: Exception) -> bool:
    """Whether an HTTP error of the hub is about a file that an existing repository does not have."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    is_http = isinstance(error, HfHubHTTPError) and error.response.status_code == 404
    return is_http and not isinstance(error, RepositoryNotFoundError)


@contextlib.contextmanager
def _explained(name: str, files: Sequence[str], remedy: str) -> Iterator[None]:
    """Raises every error of the block as a UserError of one line that says why a file cannot be had."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_CACHE.startswith("~"):  # the library would make a folder of that name
        raise UserError(f"{name}: no such folder, and no home folder with the hub's cache; set HF_HOME, or {remedy}")
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError:
        how = f"accept its terms at {constants.ENDPOINT}/{name}, then run `hf auth login` or set HF_TOKEN"
        raise UserError(f"{name}: is gated on the hub; {how}") from None
    except errors.HfHubHTTPError as error:
        if isinstance(error, errors.RepositoryNotFoundError) or error.response.status_code == 401:
            problem = f"no such repository on the hub {constants.ENDPOINT}, or a private one"
            how = "check the name, or run `hf auth login`"
        else:
            problem, how = f"the hub {constants.ENDPOINT} answers {error.response.status_code}", "try again"
        raise UserError(f"{name}: no such folder, and {problem}; {how}, or {remedy}") from None
    except errors.OfflineModeIsEnabled:
        problem = f"{files[0]} is not in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
        how = f"unset it, or run `hf download {name}` where there is a network, or set HF_HOME to a cache that has it"
        raise UserError(f"{name}: no such folder, and {problem}; {how}, or {remedy}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
            problem = f"the hub's cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror})"
            raise UserError(f"{name}: {problem}; set HF_HOME to another folder, or {remedy}") from None
        problem = f"{files[0]} is not in the hub's cache, and the hub {constants.ENDPOINT} cannot be reached"
        how = "check the network, or set HF_HOME to a cache that has it"
        raise UserError(f"{name}: no such folder, {problem} ({reason:.200}); {how}, or {remedy}") from None
