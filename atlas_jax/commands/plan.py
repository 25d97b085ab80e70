"""`atlas plan`: will a run fit into a machine, how long will its steps take, and what would help if not."""

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas_jax.config import Config, PlanConfig
from atlas_jax.errors import UserError
from atlas_jax.plan import topology as machines
from atlas_jax.plan.topology import Topology

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from atlas_jax.plan.programs import Plan
    from atlas_jax.plan.report import StepReport

logger = logging.getLogger(__name__)

FITS, DOES_NOT = 0, 1  # exit statuses
MODEL_AXIS = 4  # devices that share a matrix product, at most, in what is tried: more would wait for each other
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-plan" / "bin" / "python"


def plan(config: Config, asked: PlanConfig, argv: Sequence[str]) -> int:
    """Prints the plan; whether everything fits. `argv` are the flags, for an environment that has the compiler."""
    topology = machines.parse(asked.topology)
    if not machines.has_compiler(topology.device.platform):
        _elsewhere(topology, argv)
    machines.prepare(topology)
    from atlas_jax.plan.programs import make_plan, planned_mesh
    from atlas_jax.plan.report import text, text_of_resident

    devices = machines.devices(topology)
    mesh = planned_mesh(config, devices)
    made = make_plan(config, mesh, asked.passages_count)
    full = made.held > topology.device.memory
    reports = list(_examined(config, made, topology))
    failed = [report.name for report in reports if not report.fits and not report.broken]
    tried = list(_tried(config, asked, topology, devices, mesh, failed)) if failed and not full else []
    advice = ""
    if full:
        advice = _advice(config, asked, topology, devices, made)
    elif failed and not any(one.fits for one in tried):
        faiss = ", --index_mode faiss" if "index" in made.resident else ""
        advice = f"nothing that was tried fits: take more devices{faiss}, or a smaller --text_maxlength or --n_context"
    elif any(report.broken for report in reports):
        advice = (
            "where it does not compile, XLA failed, not for want of memory: please report what it says, and the flags"
        )
    if asked.json:
        steps = [report.to_dict() for report in reports]
        found = {"topology": topology.text, "mesh": dict(mesh.shape), "steps": steps}
        print(json.dumps(found | {"tried": [one._asdict() for one in tried], "advice": advice}, indent=1))
    else:
        parts = [text_of_resident(made, topology, mesh.shape) if full else text(reports, topology, mesh.shape)]
        print("\n\n".join(filter(None, [*parts, *map(str, tried), advice])))
    return FITS if all(report.fits for report in reports) else DOES_NOT


class Tried(NamedTuple):
    """Flags that were tried because a plan does not fit."""

    flags: str
    fits: bool
    totals: dict[str, str]  # of the programs by name, or why there is none

    def __str__(self) -> str:
        said = ", ".join(f"{name} {total}" for name, total in self.totals.items())
        return f"tried {self.flags}: {'fits' if self.fits else 'does not fit'} ({said})"


def _elsewhere(topology: Topology, argv: Sequence[str]) -> None:
    """Becomes the same command in the environment of `make plan-env`."""
    if not PYTHON.exists() or Path(sys.prefix) == PYTHON.parents[1]:
        kind = {"cuda": "GPUs", "tpu": "TPUs"}[topology.device.platform]
        raise UserError(f"--topology {topology.text}: no compiler for {kind} in this environment; run `make plan-env`")
    sys.stdout.flush()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(PYTHON, [str(PYTHON), "-m", "atlas_jax", "plan", *argv], os.environ | {"PYTHONPATH": paths})


def _examined(config: Config, made: "Plan", topology: Topology, only: Sequence[str] = ()) -> Iterator["StepReport"]:
    """The programs of a run, or only those of these names, compiled one after the other."""
    from atlas_jax.plan.report import examine

    steps = [step for step in made.steps if not only or step.name in only]
    for number, step in enumerate(steps, 1):
        if made.held <= topology.device.memory:
            logger.info("compiling %s for %s (%d of %d)", step.name, topology.text, number, len(steps))
        yield examine(step, made, topology, config.generation.generation_max_length - 1)


def _tried(
    config: Config, asked: PlanConfig, topology: Topology, devices: Sequence[Any], mesh: "Mesh", names: Sequence[str]
) -> Iterator[Tried]:
    """What was tried to make these programs fit, one measure on top of the other, up to the first that does."""
    from atlas_jax.plan.programs import make_plan, planned_mesh

    for flags, changed in alternatives(config, len(devices)):
        logger.info("does not fit; trying %s", flags)
        if changed.run.mesh != config.run.mesh:  # then what did fit may no longer
            mesh, names = planned_mesh(changed, devices), ()
        config = changed
        made = make_plan(config, mesh, asked.passages_count)
        reports = list(_examined(config, made, topology, names))
        fits = all(report.fits for report in reports)
        yield Tried(flags, fits, {one.name: one.refused or f"{one.total / 1e9:.2f} GB" for one in reports})
        if fits:
            return


def _advice(config: Config, asked: PlanConfig, topology: Topology, devices: Sequence[Any], made: "Plan") -> str:
    """What makes room for what stays on the devices; shapes tell, so nothing is compiled."""
    from atlas_jax.plan.programs import make_plan, planned_mesh

    stays = {"": made.resident}
    if config.run.mesh != "auto":
        auto = dataclasses.replace(config, run=dataclasses.replace(config.run, mesh="auto"))
        stays["--mesh auto"] = make_plan(auto, planned_mesh(auto, devices), asked.passages_count).resident
    return more_room(stays, len(devices), float(topology.device.memory))


def more_room(stays: Mapping[str, Mapping[str, int]], count: int, capacity: float) -> str:
    """Which flags make room: `stays` is what stays on each of so many devices with these flags, at first with none."""
    for flags, resident in stays.items():
        if sum(resident.values()) <= capacity:
            return f"take {flags}"
    for flags, resident in stays.items():
        index = resident.get("index", 0)
        room = capacity - sum(resident.values()) + index
        if index and room > 0:
            also, enough = f"{flags} and " if flags else "", math.ceil(index * count / room)
            return f"take {also}--index_mode faiss, which keeps the index on the hosts, or {enough} devices to hold it"
    return "take more devices, or a smaller --reader_model_type"


def alternatives(config: Config, count: int) -> Iterator[tuple[str, Config]]:
    """Flags that save memory, those first that cost least; each with all that came before, but of meshes the last."""
    from atlas_jax.checkpoints.pretrained import reader_config

    said: list[str] = []
    has_retriever = config.distill.train_retriever
    axes = {
        "passages": math.gcd(count, config.passages_a_query, config.retrieval.n_context),
        "model": math.gcd(count, reader_config(config.model.reader_model_type).num_heads, MODEL_AXIS),
    }
    meshes = [f"fsdp={count // size},{axis}={size}" for axis, size in axes.items() if size > 1]
    smaller = {"per_gpu_batch_size": 1}
    measures: list[tuple[str, str, dict[str, Any]]] = [
        ("--use_gradient_checkpoint_reader", "model", {"use_gradient_checkpoint_reader": True}),
        ("--precision bf16", "model", {"precision": "bf16"}),
        ("--per_gpu_batch_size 1", "run", smaller),
        *((f"--mesh {mesh}", "run", {"mesh": mesh}) for mesh in ("auto", *meshes)),
    ]
    if has_retriever:
        both = {"use_gradient_checkpoint_reader": True, "use_gradient_checkpoint_retriever": True}
        measures[0] = ("--use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever", "model", both)
    for flags, group, values in measures:
        before = getattr(config, group)
        after = dataclasses.replace(before, **values)
        if after == before:
            continue
        config = dataclasses.replace(config, **{group: after})
        said = [one for one in said if not (flags.startswith("--mesh") and one.startswith("--mesh"))] + [flags]
        yield " ".join(said), config
