"""`make_task` maps --task to a class."""

import pytest

from atlas_jax.config import TaskConfig
from atlas_jax.errors import UserError
from atlas_jax.tasks import make_task
from atlas_jax.tasks.base import Base
from atlas_jax.tasks.multiple_choice import MultipleChoice
from atlas_jax.tasks.qa import QA


def test_make_task_returns_the_named_task():
    """`make_task` passes the flags that belong to the task; a task that is not implemented is a UserError."""

    def task(name, **flags):
        return make_task(TaskConfig(name, **flags))

    assert task("base") == Base()
    assert task("qa", qa_prompt_format="{question}?") == QA("{question}?")
    flags = {"multiple_choice_num_options": 5, "multiple_choice_eval_permutations": "cyclic"}
    assert task("multiple_choice", **flags) == MultipleChoice(5, "cyclic")
    with pytest.raises(UserError, match="--task kilt: not built yet"):
        task("kilt")
