"""Checks every row of a jsonl file against the task before anything long runs."""

from atlas_jax.data.jsonl import JsonlRows
from atlas_jax.errors import UserError
from atlas_jax.runtime.process_group import process_group
from atlas_jax.tasks.base import Task


def checked_rows(path: str, task: Task) -> JsonlRows:
    """The rows of a file, once every one of them is known to fit the task; each process looks at some of them."""
    rows = JsonlRows(path)

    def first_wrong() -> tuple[int, str] | None:
        for number in range(process_group().index, len(rows), process_group().count):
            try:
                task.check(rows[number])
            except UserError as error:
                return number, str(error)
            except ValueError as error:
                return number, str(rows.error(number, str(error)))
        return None

    if wrong := [found for found in process_group().run_on_all(first_wrong) if found]:
        raise UserError(min(wrong)[1])
    return rows
