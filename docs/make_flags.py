#!/usr/bin/env python
"""Writes docs/flags.md from atlas_jax/config/: `make docs`."""

from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from atlas_jax.commands.flags import GROUPS, field_comments
from atlas_jax.plan.plan_config import PlanConfig

PAGE = Path(__file__).with_name("flags.md")
INTRODUCTION = """# Flags

Every flag of `atlas train` and `atlas evaluate`, which take the same ones. Names, defaults and meaning are those of the
reference, but for flags that JAX needs. `atlas plan` takes them too, with those at the end; `atlas index` and
`atlas convert` list theirs with `--help`. Made from `atlas_jax/config/` by `make docs`.

The column *resume* says what happens if a run is started again with another value: nothing (`may change`), a warning
(`warns`), or, if it is empty, the run is refused, because it would learn something else.
"""
RESUME = {"same": "", "changeable": "may change", "warned": "warns"}


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def page() -> str:
    """The text of docs/flags.md."""
    groups = {**GROUPS, "plan": PlanConfig}
    return "\n".join([INTRODUCTION, *(section(group) for group in groups.values())])


def section(group: type[Any]) -> str:
    """A heading and a table for a group of flags."""
    helps = field_comments(group)
    rows = []
    for flag in fields(group):
        meaning = helps[flag.name].replace("<", "&lt;").replace("|", "\\|")
        resume = "" if group is PlanConfig else RESUME[flag.metadata.get("resume", "same")]
        rows.append(f"| `--{flag.name}` | {values(flag)} | {resume} | {meaning} |")
    head = [f"## {group.__doc__}", "", "| flag | default | resume | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def values(flag: Field[Any]) -> str:
    """The default of a flag, or that it is required; and its choices, if it has any."""
    kind = get_args(flag.type)[0] if NoneType in get_args(flag.type) else flag.type
    choices = f" of {', '.join(f'`{choice}`' for choice in get_args(kind))}" if get_origin(kind) is Literal else ""
    if flag.default is MISSING:
        return f"required, one{choices}"
    if flag.default in (None, ()):
        return "none"
    if kind is bool:
        return "off"
    return (f"`{flag.default}`" if flag.default != "" else "empty") + choices


if __name__ == "__main__":
    main()
