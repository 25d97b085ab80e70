"""Rows in, scores out: what a task asks the reader and how it judges the answer."""

from atlas_jax.config import Config
from atlas_jax.errors import UserError
from atlas_jax.tasks.base import Base, Example, Record, Task
from atlas_jax.tasks.multiple_choice import MultipleChoice
from atlas_jax.tasks.qa import QA

__all__ = ["Example", "Record", "Task", "make_task"]


def make_task(config: Config, *, train: bool = False) -> Task:
    """The task that `--task` names, as it is evaluated or as it is trained on."""
    options = config.task
    permutations = options.multiple_choice_train_permutations if train else options.multiple_choice_eval_permutations
    match options.task:
        case "multiple_choice":
            return MultipleChoice(num_options=options.multiple_choice_num_options, permutations=permutations)
        case "qa":
            return QA(prompt=options.qa_prompt_format)
        case "base":
            return Base()
    raise UserError(f"--task {options.task}: not built yet; multiple_choice, qa and base are")
