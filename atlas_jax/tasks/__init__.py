"""Tasks: rows in, scores out. A task makes the reader's queries and targets, and scores its answers."""

from atlas_jax.config import TaskConfig
from atlas_jax.errors import UserError
from atlas_jax.tasks.base import Base, Example, Record, Task
from atlas_jax.tasks.multiple_choice import MultipleChoice
from atlas_jax.tasks.qa import QA

__all__ = ["Example", "Record", "Task", "make_task"]


def make_task(options: TaskConfig, *, train: bool = False) -> Task:
    """Returns the task that `--task` names, with the flags of training or of evaluation."""
    permutations = options.multiple_choice_train_permutations if train else options.multiple_choice_eval_permutations
    match options.task:
        case "multiple_choice":
            return MultipleChoice(num_options=options.multiple_choice_num_options, permutations=permutations)
        case "qa":
            return QA(prompt=options.qa_prompt_format)
        case "base":
            return Base()
    raise UserError(f"--task {options.task}: not built yet; multiple_choice, qa and base are")
