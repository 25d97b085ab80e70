"""Tasks: rows in, scores out. A task makes the reader's queries and targets, and scores its answers."""

from atlas_jax.config import TaskConfig
from atlas_jax.errors import UserError
from atlas_jax.tasks.base import Base, Example, Record, Task
from atlas_jax.tasks.multiple_choice import MultipleChoice
from atlas_jax.tasks.qa import QA

__all__ = ["Example", "Record", "Task", "make_task"]


def make_task(options: TaskConfig, seed: int = 0, *, train: bool = False) -> Task:
    """Returns the task that `--task` names, with the flags of training or of evaluation.

    In training every row needs a target. `seed` decides which of several answers is the target.
    """
    permutations = options.multiple_choice_train_permutations if train else options.multiple_choice_eval_permutations
    match options.task:
        case "multiple_choice":
            most = None if train else options.max_orders
            return MultipleChoice(options.multiple_choice_num_options, permutations, train, most)
        case "qa":
            return QA(options.qa_prompt_format, seed, needs_target=train)
        case "base":
            return Base(needs_target=train)
    raise UserError(f"--task {options.task}: not built yet; multiple_choice, qa and base are")
