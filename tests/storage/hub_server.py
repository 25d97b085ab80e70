"""A local server that speaks the protocol of Hugging Face's hub, with the faults of a test."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.preprocessing.download_server import Handler, Server, run_server

COMMIT = "c0ffee" * 6 + "beef"


class HubHandler(Handler):
    """Serves `files["{repository}/resolve/main/{file}"]` at main and at COMMIT, and has the hub's headers."""

    def respond(self):
        self.path = self.path.replace(f"/resolve/{COMMIT}/", "/resolve/main/")
        super().respond()

    def reply(self, status: int, headers: Mapping[str, str | None]):
        path = self.path.lstrip("/")
        added: dict[str, str | None] = {"X-Repo-Commit": COMMIT, "Connection": "close"}
        if path in self.server.files:
            added["ETag"] = f'"{hashlib.sha256(self.server.files[path]).hexdigest()}"'
        elif status == 404:
            repository = path.split("/resolve/")[0]
            exists = any(file.startswith(f"{repository}/resolve/") for file in self.server.files)
            added["X-Error-Code"] = "EntryNotFound" if exists else "RepoNotFound"
        super().reply(status, headers | added | {name: headers[name] for name in headers if name.startswith("X-")})


@contextlib.contextmanager
def run_hub() -> Iterator[Server]:
    """Runs a hub without repositories in a thread."""
    with run_server() as server:
        server.RequestHandlerClass = HubHandler
        yield server


def publish(server: Server, name: str, folder: Path) -> None:
    """Makes the files of a folder a repository of the hub."""
    for file in filter(Path.is_file, folder.rglob("*")):
        server.files[path_of(name, file.relative_to(folder).as_posix())] = file.read_bytes()


def path_of(name: str, file: str) -> str:
    return f"{name}/resolve/main/{file}"


def use_hub(monkeypatch, server: Server, cache: Path) -> None:
    """Directs the library in this process, which has read its environment, to a server and a cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )


def environment(server: Server, home: Path, **changes: str) -> dict[str, str]:
    """The environment of a process that uses a server and a cache of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return inherited | {"HF_ENDPOINT": server.url, "HF_HOME": str(home)} | changes


def stop(server: Server) -> None:
    """Lets every later connection be refused."""
    server.stop_listening()


def copy_without_weights(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "*.npz")))
