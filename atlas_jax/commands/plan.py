"""`atlas plan`: predicts whether a run fits on a machine and how long a step takes, and tries flags to save memory."""

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atlas_jax.commands.flags import parse_plan
from atlas_jax.config import Config, GenerationConfig
from atlas_jax.errors import UserError
from atlas_jax.plan.plan_config import PlanConfig
from atlas_jax.plan.topology import Topology, configure_jax, has_compiler, parse_topology, topology_devices

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from atlas_jax.plan.programs import Plan
    from atlas_jax.plan.report import ProgramReport

logger = logging.getLogger(__name__)

FITS, DOES_NOT_FIT = 0, 1  # exit statuses
MAX_MODEL_AXIS = 4  # the largest size of the mesh axis `model` that is tried: more devices would wait for each other
ROOT = Path(__file__).parents[2]
PLAN_PYTHON = ROOT / ".venv-plan" / "bin" / "python"  # of the environment that `make plan-env` makes


def main(argv: Sequence[str]) -> int:
    """Prints the plan of a run and returns whether all its programs fit, as an exit status."""
    config, plan_config = parse_plan(argv)
    topology = parse_topology(plan_config.topology)
    if not has_compiler(topology.device.platform):
        _exec_in_plan_environment(topology, argv)
    configure_jax(topology)
    from atlas_jax.plan.programs import make_plan, planned_mesh
    from atlas_jax.plan.report import format_reports, format_resident

    devices = topology_devices(topology)
    mesh = planned_mesh(config, devices)
    plan = make_plan(config, mesh, plan_config.passages_count)
    resident_fits = plan.resident_bytes <= topology.device.memory
    reports = list(_compile_reports(config.generation, plan, topology))
    too_large = [report.name for report in reports if not report.fits and not report.broken]
    attempts: list[Attempt] = []
    advice = ""
    if too_large and resident_fits:
        attempts = list(_try_memory_saving(config, plan_config, topology, devices, mesh, too_large))
    if not resident_fits:
        advice = _advise_from_shapes(config, plan_config, topology, devices, plan)
    elif too_large and not any(attempt.fits for attempt in attempts):
        faiss = ", --index_mode faiss" if "index" in plan.resident else ""
        advice = f"nothing that was tried fits: take more devices{faiss}, or a smaller --text_maxlength or --n_context"
    elif any(report.broken for report in reports):
        advice = (
            "where it does not compile, XLA failed, not for want of memory: please report what it says, and the flags"
        )
    if plan_config.json:
        steps = [report.to_dict() for report in reports]
        result = {"topology": topology.text, "mesh": dict(mesh.shape), "steps": steps}
        print(json.dumps(result | {"tried": [attempt._asdict() for attempt in attempts], "advice": advice}, indent=1))
    else:
        if resident_fits:
            text = format_reports(reports, topology, mesh.shape)
        else:
            text = format_resident(plan, topology, mesh.shape)
        print("\n\n".join(filter(None, [text, *map(str, attempts), advice])))
    return FITS if all(report.fits for report in reports) else DOES_NOT_FIT


class Attempt(NamedTuple):
    """Flags that were tried because the plan does not fit; its fields are keys of `atlas plan --json`."""

    flags: str
    fits: bool
    totals: dict[str, str]  # program to its memory in GB, or why it was not compiled

    def __str__(self) -> str:
        totals = ", ".join(f"{name} {total}" for name, total in self.totals.items())
        return f"tried {self.flags}: {'fits' if self.fits else 'does not fit'} ({totals})"


def _exec_in_plan_environment(topology: Topology, argv: Sequence[str]) -> None:
    """Replaces this process by the same command in the environment of `make plan-env`; UserError if there is none."""
    if not PLAN_PYTHON.exists() or Path(sys.prefix) == PLAN_PYTHON.parents[1]:
        kind = {"cuda": "GPUs", "tpu": "TPUs"}[topology.device.platform]
        raise UserError(f"--topology {topology.text}: no compiler for {kind} in this environment; run `make plan-env`")
    sys.stdout.flush()
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        os.execve(PLAN_PYTHON, [str(PLAN_PYTHON), "-m", "atlas_jax", "plan", *argv], os.environ | {"PYTHONPATH": paths})
    except OSError as error:
        raise UserError(f"{PLAN_PYTHON}: does not start ({error.strerror}); run `make plan-env` to its end") from None


def _compile_reports(
    generation: GenerationConfig, plan: "Plan", topology: Topology, names: Sequence[str] = ()
) -> Iterator["ProgramReport"]:
    """Compiles the programs of a plan, or only those in `names`, one after the other, and yields their reports."""
    from atlas_jax.plan.report import compile_and_report

    programs = [program for program in plan.programs if not names or program.name in names]
    for number, program in enumerate(programs, 1):
        if plan.resident_bytes <= topology.device.memory:
            logger.info("compiling %s for %s (%d of %d)", program.name, topology.text, number, len(programs))
        yield compile_and_report(program, plan, topology, generation.generation_max_length - 1)


def _try_memory_saving(
    config: Config,
    plan_config: PlanConfig,
    topology: Topology,
    devices: Sequence[Any],
    mesh: "Mesh",
    names: Sequence[str],
) -> Iterator[Attempt]:
    """Compiles the programs in `names` with each of `memory_saving_configs`, up to the first with which they fit."""
    from atlas_jax.plan.programs import make_plan, planned_mesh

    for flags, changed in memory_saving_configs(config, len(devices)):
        logger.info("does not fit; trying %s", flags)
        if changed.run.mesh != config.run.mesh:  # programs that fitted before may not fit on another mesh: compile all
            mesh, names = planned_mesh(changed, devices), ()
        config = changed
        plan = make_plan(config, mesh, plan_config.passages_count)
        reports = list(_compile_reports(config.generation, plan, topology, names))
        fits = all(report.fits for report in reports)
        totals = {report.name: report.refused or f"{report.total / 1e9:.2f} GB" for report in reports}
        yield Attempt(flags, fits, totals)
        if fits:
            return


def _advise_from_shapes(
    config: Config, plan_config: PlanConfig, topology: Topology, devices: Sequence[Any], plan: "Plan"
) -> str:
    """Advises on flags with which the resident arrays fit, by their sizes alone: nothing is compiled."""
    from atlas_jax.plan.programs import make_plan, planned_mesh

    resident_by_flags = {"": plan.resident}
    if config.run.mesh != "auto":
        auto = dataclasses.replace(config, run=dataclasses.replace(config.run, mesh="auto"))
        auto_plan = make_plan(auto, planned_mesh(auto, devices), plan_config.passages_count)
        resident_by_flags["--mesh auto"] = auto_plan.resident
    return resident_advice(resident_by_flags, len(devices), float(topology.device.memory))


def resident_advice(resident_by_flags: Mapping[str, Mapping[str, int]], num_devices: int, capacity: float) -> str:
    """Names flags with which resident arrays fit into `capacity` bytes per device.

    `resident_by_flags`: for each choice of flags to add, the first being none, bytes per device by kind of array.
    """
    for flags, resident in resident_by_flags.items():
        if sum(resident.values()) <= capacity:
            return f"take {flags}"
    for flags, resident in resident_by_flags.items():
        index = resident.get("index", 0)
        room = capacity - sum(resident.values()) + index
        if index and room > 0:
            prefix, enough = f"{flags} and " if flags else "", math.ceil(index * num_devices / room)
            return (
                f"take {prefix}--index_mode faiss, which keeps the index on the hosts, or {enough} devices to hold it"
            )
    return "take more devices, or a smaller --reader_model_type"


def memory_saving_configs(config: Config, num_devices: int) -> Iterator[tuple[str, Config]]:
    """Yields flags that save memory, in order of rising cost, and the configuration with them.

    Each adds to all flags before it, except that a --mesh replaces the one before.
    """
    from atlas_jax.checkpoints.pretrained import reader_config

    added: list[str] = []
    trains_retriever = config.distill.train_retriever
    axes = {
        "passages": math.gcd(num_devices, config.passages_a_query, config.retrieval.n_context),
        "model": math.gcd(num_devices, reader_config(config.model.reader_model_type).num_heads, MAX_MODEL_AXIS),
    }
    meshes = [f"fsdp={num_devices // size},{axis}={size}" for axis, size in axes.items() if size > 1]
    smaller = {"per_gpu_batch_size": 1}
    measures: list[tuple[str, str, dict[str, Any]]] = [
        ("--use_gradient_checkpoint_reader", "model", {"use_gradient_checkpoint_reader": True}),
        ("--precision bf16", "model", {"precision": "bf16"}),
        ("--per_gpu_batch_size 1", "run", smaller),
        *((f"--mesh {mesh}", "run", {"mesh": mesh}) for mesh in ("auto", *meshes)),
    ]
    if trains_retriever:
        both = {"use_gradient_checkpoint_reader": True, "use_gradient_checkpoint_retriever": True}
        measures[0] = ("--use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever", "model", both)
    for flags, group, values in measures:
        before = getattr(config, group)
        after = dataclasses.replace(before, **values)
        if after == before:
            continue
        config = dataclasses.replace(config, **{group: after})
        added = [flag for flag in added if not (flags.startswith("--mesh") and flag.startswith("--mesh"))] + [flags]
        yield " ".join(added), config
