"""The commands in README.md, CONTRIBUTING.md and docs/ run, in the order of the pages, in one folder like a clone.

A block whose first line is `# not run by the tests: REASON` is left out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_RUN = "# not run by the tests: "
GUIDES = ("training", "resuming", "devices", "multi-host", "indexes", "checkpoints", "data", "differences")
REFERENCE = ("plan", "flags", "architecture")
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in (*GUIDES, *REFERENCE)))  # in reading order
SHELLS = re.compile(r"^```(?:bash|sh|shell|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[str]:
    """The shell blocks of a page."""
    return SHELLS.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder with links to the repository's files, and the commands `atlas`, `python` and `make` of a clone."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, line in {
        "atlas": f'exec "{sys.executable}" -m atlas_jax "$@"',
        "python": f'exec "{sys.executable}" "$@"',
        "make": 'exec /usr/bin/make --old-file=setup "$@"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    (commands / "activate").touch()
    return folder


def run(clone: Path, block: str) -> None:
    """Runs a block in a shell that stops at the first command that fails."""
    environment = os.environ | {
        "PATH": f"{clone / '.venv/bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_commands_of_all_pages_run(clone):
    """Every block that is not marked ends with status 0; there are some, and one that fails is noticed."""
    assert {path.name for path in (ROOT / "docs").glob("*.md")} == {Path(page).name for page in PAGES[2:]}
    run_count = 0
    for page in PAGES:
        for block in blocks(page):
            if not block.startswith(NOT_RUN):
                run(clone, block)
                run_count += 1
    assert run_count >= 5
    with pytest.raises(AssertionError, match="no such command"):
        run(clone, "atlas fly\ntrue\n")


def test_a_mark_gives_a_reason():
    """Every block marked as not run states the reason."""
    marks = [block.splitlines()[0] for page in PAGES for block in blocks(page) if "not run by" in block]
    assert len(marks) >= 5
    for mark in marks:
        assert mark.startswith(NOT_RUN)
        assert len(mark) > len(NOT_RUN) + 5


def test_links_between_pages_resolve():
    """Each relative link names a file of the repository; there are many."""
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    ]
    assert len(links) > 30
    assert [(page, link) for page, link in links if not ((ROOT / page).parent / link).exists()] == []
