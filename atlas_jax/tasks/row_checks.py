"""Checks every row of a JSON-lines file against the task before a run does any long work."""

from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.tasks.base import Task


def checked_rows(path: str, task: Task) -> JsonlRows:
    """Returns the rows of a file after each process has checked its share; UserError for the first bad row."""
    rows = JsonlRows(path)

    def first_error() -> tuple[int, str] | None:
        for number in range(process_group().index, len(rows), process_group().count):
            try:
                task.check(rows[number])
            except UserError as error:
                return number, str(error)
            except ValueError as error:
                return number, str(rows.error(number, str(error)))
        return None

    if errors := [error for error in process_group().run_on_all(first_error) if error]:
        raise UserError(min(errors)[1])
    return rows
