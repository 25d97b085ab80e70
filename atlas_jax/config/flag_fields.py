"""Fields for the groups of flags: whether a flag may change on resume, and checks of its value."""

import string
from dataclasses import field
from typing import Annotated, Any, Literal

from atlas_jax.errors import UserError

ResumeRule = Literal["same", "changeable", "warned"]
PathText = Annotated[str, "path"]  # a flag that may name a file or a folder: the command line expands its `~`


def changeable(default: Any) -> Any:
    """A flag that may have another value when a run is resumed."""
    return field(default=default, metadata={"resume": "changeable"})


def warned(default: Any) -> Any:
    """A flag that may have another value when a run is resumed, which is logged as a warning."""
    return field(default=default, metadata={"resume": "warned"})


def require(ok: bool, group: object, flag: str, remedy: str) -> None:
    """Raises UserError with the flag, its value and the remedy, unless `ok`."""
    if not ok:
        raise UserError(f"--{flag} {getattr(group, flag)}: {remedy}")


def at_least(low: int, group: object, *flags: str) -> None:
    """UserError unless each of the flags is None or at least `low`."""
    for flag in flags:
        value = getattr(group, flag)
        require(value is None or value >= low, group, flag, f"must be at least {low}")


def above_zero(group: object, *flags: str) -> None:
    """UserError unless each of the flags is above 0."""
    for flag in flags:
        require(getattr(group, flag) > 0, group, flag, "must be above 0")


def valid_format(group: object, flag: str, only: str | None = None) -> None:
    """UserError unless `str.format` can fill in the flag: with fields of a passage, or with the field `only`."""
    text = getattr(group, flag) or ""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}; a literal brace is written twice") from None
    for name in names:
        require(name.isidentifier(), group, flag, f"{{{name}}} is not a field; a field is a name, such as {{title}}")
        require(only in (None, name), group, flag, f"{{{name}}} is not known here, only {{{only}}} is")
