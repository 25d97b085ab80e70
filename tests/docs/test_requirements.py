"""requirements.txt and pyproject.toml name the same packages with the same bounds."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FAISS = {
    "faiss-cpu",
    "faiss-gpu",
}  # both provide the module faiss: pyproject.toml requires faiss-cpu, requirements.txt one of both by platform


def requirements(lines: list[str]) -> dict[str, str]:
    """Maps each package to its version bounds."""
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def test_requirements_are_those_of_the_package():
    """`pip install -r requirements.txt` installs all that a run needs."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = requirements([line for line in lines if line and not line.startswith("#")])
    package = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = requirements(package["dependencies"])
    assert {name: bound for name, bound in listed.items() if name not in FAISS} == {
        name: bound for name, bound in required.items() if name not in FAISS
    }
    assert {listed[name] for name in FAISS} == {required["faiss-cpu"]}
