"""`--profile_steps` writes traces of these steps, and of no others."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from atlas_jax.config.run import RunConfig
from atlas_jax.errors import UserError
from atlas_jax.runtime.profiler import StepProfiler


def traced_steps(run: Path) -> set[int]:
    """The numbers of the steps in all traces of a run."""
    found = set()
    for file in run.glob("profile/plugins/profile/*/perfetto_trace.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        found |= {int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {})}
    return found


@pytest.mark.parametrize(("steps", "traced"), [("2-3", {2, 3}), ("4-9", {4}), ("8-9", set()), (None, set())])
def test_the_steps_are_traced(tmp_path, steps, traced):
    """Steps 1 to 4 of a run; a trace that is to be longer than the run ends with it."""
    profiler = StepProfiler(RunConfig(profile_steps=steps).profiled_steps, tmp_path)
    for step in range(1, 5):
        with profiler.step(step):
            jax.block_until_ready(jnp.arange(3) + step)
    profiler.close()
    assert traced_steps(tmp_path) == traced
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == bool(traced)


@pytest.mark.parametrize("steps", ["3", "5-4", "0-2", "a-b", "1-2-3", "-2"])
def test_other_values_are_refused(steps):
    """One line names the flag and shows the form."""
    with pytest.raises(UserError, match=rf"--profile_steps {steps}: must be two numbers of steps, such as 10-12"):
        RunConfig(profile_steps=steps)
