"""The `site` fixture: an environment in which the launch scripts call the programs in `fakes/`."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAKES = Path(__file__).parent / "fakes"


class Site:
    """A folder with the published layout (two MMLU domains, empty weights) and an environment with the fakes in PATH.

    `fakes/host/` are programs of the host, `fakes/container/` those that a container image has as well. The folder and
    the copy of the repository in it, from which commands start, have spaces and quotes in their names.
    """

    def __init__(self, home: Path):
        self.home, self.repository = home, home / 'the "repository" of atlas'
        shutil.copytree(REPOSITORY / "launch", self.repository / "launch")
        for name in ("eval", "atlas_jax"):
            (self.repository / name).symlink_to(REPOSITORY / name)
        container_path = f"{FAKES / 'container'}:{Path(sys.executable).parent}:/usr/bin:/bin"
        removed = ("SLURM", "CUDA", "JAX_PLATFORMS")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
        self.environment |= {"LOG": str(home), "DATA_DIR": str(home), "SIZE": "base", "HOME": str(home)}
        self.environment |= {"CONTAINER_PATH": container_path, "PATH": f"{FAKES / 'host'}:{container_path}"}
        self.environment |= {"PYTHONPATH": str(REPOSITORY)}

    def start(self, *command: object, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        """Starts a command in a session of its own, as a terminal does."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        return subprocess.Popen(command, env=self.environment | environment, cwd=cwd or self.repository, **options)

    def run(self, *command: object, **environment: str) -> str:
        """Runs a command, asserts exit status 0 and returns its output."""
        process = self.start(*command, **environment)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
        return output

    def read_log(self, name: str) -> list[str]:
        """Returns the lines that a fake has logged, and deletes its log."""
        file = self.home / name
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    def calls(self) -> list[dict]:
        """Returns what the fake `atlas` has logged, in the order of the process index, and deletes its log."""
        rows = [json.loads(line) for line in self.read_log("calls")]
        return sorted(rows, key=lambda row: row["cluster"]["index"] if "cluster" in row else -1)

    def wait_for_lines(self, name: str, count: int) -> None:
        """Waits until a fake has logged `count` lines."""
        file, end = self.home / name, time.monotonic() + 30
        while not file.exists() or len(file.read_text().splitlines()) < count:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def site(tmp_path) -> Site:
    """A site with the published files of two domains, one question each."""
    home = tmp_path / "it's a site"
    rows = {
        domain: {"question": f"{domain}?", "options": dict(zip("ABCD", "wxyz", strict=True)), "answer": "A"}
        | {"dataset": f"{domain}_test"}
        for domain in ("anatomy", "virology")
    }
    mmlu = home / "data/mmlu_data"
    for domain, row in rows.items():
        for name in ("train/{}.5-shot-train", "valid/{}.val", "test/{}.test"):
            write_jsonl(mmlu / f"5-shot/individual_{name.format(domain)}.jsonl", [row])
    for setting in ("5-shot", "5-shot-multitask", "full"):
        for name in ("train", "combined_valid", "combined_test"):
            write_jsonl(mmlu / setting / f"{name}.jsonl", list(rows.values()))
    for folder in ("models/atlas/base", "indices/atlas/wiki/base"):
        (home / folder).mkdir(parents=True)
    return Site(home)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
