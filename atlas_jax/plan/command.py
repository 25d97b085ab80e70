"""`atlas plan`: will a run fit into a machine, how long will its steps take, and what would help if not."""

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_jax.config import Config, PlanConfig
from atlas_jax.errors import UserError
from atlas_jax.plan import topology as machines
from atlas_jax.plan.topology import Topology

if TYPE_CHECKING:
    from atlas_jax.plan.report import StepReport

logger = logging.getLogger(__name__)

FITS, DOES_NOT = 0, 1  # exit statuses
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-plan" / "bin" / "python"


def plan(config: Config, asked: PlanConfig, argv: Sequence[str]) -> int:
    """Prints the plan; whether everything fits. `argv` are the flags, for an environment that has the compiler."""
    topology = machines.parse(asked.topology)
    if not machines.has_compiler(topology.device.platform):
        _elsewhere(topology, argv)
    machines.prepare(topology)
    from atlas_jax.plan.programs import planned_mesh
    from atlas_jax.plan.report import text

    devices = machines.devices(topology)
    mesh = planned_mesh(config, devices)
    reports = list(_examined(config, asked, topology, devices))
    failed = [report.name for report in reports if not report.fits]
    tried = list(_tried(config, asked, topology, devices, failed)) if failed else []
    if asked.json:
        axes = dict(mesh.shape)
        print(json.dumps({"topology": topology.text, "mesh": axes, "steps": [one.to_dict() for one in reports],
                          "tried": [{"flags": flags, "fits": fits, "totals": totals} for flags, fits, totals in tried],
                          }, indent=1))  # fmt: skip
    else:
        print(text(reports, topology, mesh.shape))
        for flags, fits, totals in tried:
            said = ", ".join(f"{name} {total}" for name, total in totals.items())
            print(f"\ntried {flags}: {'fits' if fits else 'does not fit'} ({said})")
        if failed and not any(fits for _, fits, _ in tried):
            print("\nnothing that was tried fits: take more devices, or a smaller --text_maxlength or --n_context")
    return DOES_NOT if failed else FITS


def _elsewhere(topology: Topology, argv: Sequence[str]) -> None:
    """Becomes the same command in the environment of `make plan-env`."""
    if not PYTHON.exists() or Path(sys.prefix) == PYTHON.parents[1]:
        kind = {"cuda": "GPUs", "tpu": "TPUs"}[topology.device.platform]
        raise UserError(f"--topology {topology.text}: no compiler for {kind} in this environment; run `make plan-env`")
    sys.stdout.flush()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(PYTHON, [str(PYTHON), "-m", "atlas_jax.cli", "plan", *argv], os.environ | {"PYTHONPATH": paths})


def _examined(
    config: Config, asked: PlanConfig, topology: Topology, devices: Sequence[Any], only: Sequence[str] = ()
) -> Iterator["StepReport"]:
    """The programs of a run, or only those of these names, compiled one after the other."""
    from atlas_jax.plan.programs import make_plan, planned_mesh
    from atlas_jax.plan.report import examine

    made = make_plan(config, planned_mesh(config, devices), asked.passages_count)
    steps = [step for step in made.steps if not only or step.name in only]
    for number, step in enumerate(steps, 1):
        logger.info("compiling %s for %s (%d of %d)", step.name, topology.text, number, len(steps))
        yield examine(step, made, topology, config.generation.generation_max_length - 1)


def _tried(
    config: Config, asked: PlanConfig, topology: Topology, devices: Sequence[Any], names: Sequence[str]
) -> Iterator[tuple[str, bool, dict[str, str]]]:
    """What was tried to make these programs fit, one measure on top of the other, up to the first that does."""
    for flags, changed in alternatives(config, len(devices)):
        logger.info("does not fit; trying %s", flags)
        reports = list(_examined(changed, asked, topology, devices, names))
        fits = all(report.fits for report in reports)
        yield flags, fits, {one.name: one.refused or f"{one.total / 1e9:.2f} GB" for one in reports}
        if fits:
            return


def alternatives(config: Config, count: int) -> Iterator[tuple[str, Config]]:
    """Flags that save memory, those first that cost least; each with all that came before."""
    said: list[str] = []
    has_retriever = config.distill.train_retriever
    passages = math.gcd(count, config.passages_a_query, config.retrieval.n_context)
    smaller = {"per_gpu_batch_size": 1}
    measures: list[tuple[str, str, dict[str, Any]]] = [
        ("--use_gradient_checkpoint_reader", "model", {"use_gradient_checkpoint_reader": True}),
        ("--precision bf16", "model", {"precision": "bf16"}),
        ("--per_gpu_batch_size 1", "run", smaller),
        ("--mesh auto", "run", {"mesh": "auto"}),
        (f"--mesh fsdp={count // passages},passages={passages}", "run",
         {"mesh": f"fsdp={count // passages},passages={passages}"}),
    ]  # fmt: skip
    if has_retriever:
        both = {"use_gradient_checkpoint_reader": True, "use_gradient_checkpoint_retriever": True}
        measures[0] = ("--use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever", "model", both)
    for flags, group, values in measures:
        before = getattr(config, group)
        after = dataclasses.replace(before, **values)
        if after == before or ("passages" in flags and passages == 1):
            continue
        config = dataclasses.replace(config, **{group: after})
        said = [one for one in said if not (flags.startswith("--mesh") and one.startswith("--mesh"))] + [flags]
        yield " ".join(said), config
