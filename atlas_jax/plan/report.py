"""Reports of compiled programs: memory per device, FLOPs, collectives, the least possible time and what bounds it."""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from atlas_jax.plan import hlo
from atlas_jax.plan.hlo import Collective, Counts
from atlas_jax.plan.programs import Plan, PlannedProgram
from atlas_jax.plan.topology import Topology

DEFAULT_MEMORY_FRACTION = 0.75  # share of GPU memory that JAX allocates unless XLA_PYTHON_CLIENT_MEM_FRACTION is set
GB = 1e9


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """Figures of a program on one device, per call; its fields are keys of `atlas plan --json`."""

    name: str
    memory: dict[str, float]  # bytes by kind of array, those that stay on the device throughout the run included
    capacity: float  # bytes of memory that the device has
    tokens: int  # tokens that all devices together read in one call
    compile_seconds: float
    refused: str = ""  # why there is no compiled program
    broken: bool = False  # `refused` is a failure of the compiler, not a lack of memory
    flops: dict[str, float] = dataclasses.field(default_factory=dict)  # of matrix products, by dtype
    traffic: float = 0.0  # bytes read from and written to device memory, an upper bound
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # see `totals_by_kind`
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # see `roofline`
    unknown_loops: int = 0  # loops whose trip count is known only at run time
    largest: str = ""  # description of the largest array that the program writes to memory
    arguments: float = 0.0  # bytes of the program's arguments, as the compiler counts them

    @property
    def total(self) -> float:
        """Total bytes of memory."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the program compiles and the device has enough memory."""
        return not self.refused and self.total <= self.capacity

    @property
    def bound(self) -> str:
        """The resource of `seconds` that takes longest."""
        return max(self.seconds, key=lambda resource: self.seconds[resource]) if self.seconds else ""

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived figures, for JSON."""
        derived = {"total": self.total, "fits": self.fits, "bound": self.bound}
        return dataclasses.asdict(self) | derived | {"seconds_at_least": max(self.seconds.values(), default=0.0)}


def compile_and_report(
    program: PlannedProgram, plan: Plan, topology: Topology, assumed_trip_count: int
) -> ProgramReport:
    """Compiles a program and reports on it.

    A loop of unknown trip count, such as generation, counts as `assumed_trip_count` iterations. If the plan's resident
    arrays alone exceed the memory, nothing is compiled. A failure of the compiler is reported as `refused`, not raised.
    """
    capacity, start = float(topology.device.memory), time.perf_counter()
    memory = {kind: float(nbytes) for kind, nbytes in (plan.resident | {"batch": program.batch_bytes}).items()}
    if plan.resident_bytes > capacity:
        reason = f"what stays on the device takes {plan.resident_bytes / GB:.2f} of {capacity / GB:.1f} GB"
        return ProgramReport(program.name, memory, capacity, program.tokens, 0.0, reason)
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        seconds, broken = time.perf_counter() - start, "RESOURCE_EXHAUSTED" not in str(error)
        reason = f"the compiler says {' '.join(str(error).split())[:200]}"
        return ProgramReport(program.name, memory, capacity, program.tokens, seconds, reason, broken)
    seconds = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()
    results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    memory["activations and temporaries"] = float(analysis.temp_size_in_bytes + results)
    module = hlo.parse(compiled.as_text() or "")
    counts = hlo.count(module, assumed_trip_count=assumed_trip_count)
    return ProgramReport(
        program.name,
        memory,
        capacity,
        program.tokens,
        seconds,
        flops=counts.flops,
        traffic=counts.traffic,
        collectives=totals_by_kind(counts.collectives),
        seconds=roofline(counts, topology),
        unknown_loops=counts.unknown_loops,
        largest=_largest_array(module),
        arguments=float(analysis.argument_size_in_bytes),
    )


def totals_by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """Totals of each kind of collective: `count`, `bytes` of the arrays, and bytes `sent` by one device."""
    totals: dict[str, dict[str, float]] = {}
    for collective in collectives:
        if len(collective.group) > 1:
            total = totals.setdefault(collective.kind, {"count": 0.0, "bytes": 0.0, "sent": 0.0})
            total["count"] += collective.times
            total["bytes"] += collective.times * collective.nbytes
            total["sent"] += collective.times * collective.sent_bytes
    return totals


def roofline(counts: Counts, topology: Topology) -> dict[str, float]:
    """Seconds that compute, memory and interconnect each need at their peak rate."""
    device = topology.device
    rates = {"bf16": device.bf16_flops, "f16": device.bf16_flops}
    return {
        "compute": sum((n / rates.get(dtype, device.f32_flops) for dtype, n in counts.flops.items()), 0.0),
        "memory": counts.traffic / device.memory_bandwidth,
        "interconnect": sum(
            (collective.times * _collective_seconds(collective, topology) for collective in counts.collectives), 0.0
        ),
    }


def _collective_seconds(collective: Collective, topology: Topology) -> float:
    """Least seconds of one execution: within a node by its links, between nodes by the network ports of all devices."""
    members = len(collective.group)
    nodes = len({device // topology.devices_per_node for device in collective.group})
    if members < 2:
        return 0.0
    link_seconds = collective.sent_bytes / topology.device.link_bandwidth
    if nodes == 1:
        return link_seconds
    # The bytes of a node that other nodes need leave it once, divided among the network ports of its members
    port_bytes = collective.sent_bytes * members / (members - 1) * (nodes - 1) / nodes / (members / nodes)
    return max(link_seconds, port_bytes / topology.device.network_bandwidth)


def _largest_array(module: hlo.Module) -> str:
    """Describes the largest array that a program writes to memory."""
    shape, producer = max(hlo.materialized_arrays(module), key=lambda array: array[0].nbytes)
    sizes = ",".join(map(str, shape.sizes))
    return f"{shape.dtype}[{sizes}], {shape.nbytes / GB:.2f} GB, by {producer.opcode}"


def format_reports(reports: Iterable[ProgramReport], topology: Topology, mesh: Mapping[str, int]) -> str:
    """Formats the reports of a plan's programs as text."""
    lines = [f"{_machine_line(topology, mesh)} and one call"]
    for report in reports:
        lines += ["", *_report_lines(report, topology)]
    return "\n".join(lines)


def format_resident(plan: Plan, topology: Topology, mesh: Mapping[str, int]) -> str:
    """Formats only the plan's resident arrays as text, for a plan where these alone do not fit."""
    memory = {kind: float(nbytes) for kind, nbytes in plan.resident.items()}
    total = _total_line("what stays on the device", sum(memory.values()), float(topology.device.memory))
    return "\n".join([_machine_line(topology, mesh), "", total, *_memory_lines(memory)])


def _machine_line(topology: Topology, mesh: Mapping[str, int]) -> str:
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{topology.text}, mesh {axes}; each figure is of one device"


def _total_line(name: str, total: float, capacity: float) -> str:
    fits = "fits" if total <= capacity else "DOES NOT FIT"
    return f"{name}: {fits}, {total / GB:.2f} of {capacity / GB:.1f} GB ({total / capacity:.0%})"


def _memory_lines(memory: Mapping[str, float]) -> list[str]:
    return [f"  {kind:<28} {nbytes / GB:10.3f} GB" for kind, nbytes in memory.items()]


def _report_lines(report: ProgramReport, topology: Topology) -> list[str]:
    if report.refused:
        return [f"{report.name}: DOES NOT {'COMPILE' if report.broken else 'FIT'}: {report.refused}"]
    fraction = report.total / report.capacity
    lines = [_total_line(report.name, report.total, report.capacity), *_memory_lines(report.memory)]
    if report.fits and fraction > DEFAULT_MEMORY_FRACTION and topology.device.platform == "cuda":
        lines.append(
            f"  set XLA_PYTHON_CLIENT_MEM_FRACTION over {fraction:.2f}: JAX takes {DEFAULT_MEMORY_FRACTION} otherwise"
        )
    flops = " + ".join(f"{n / 1e12:.3g} in {dtype}" for dtype, n in report.flops.items()) or "0"
    lines.append(f"  {'TFLOP':<28} {flops}")
    lines.append(f"  {'memory traffic, at most':<28} {report.traffic / GB:10.3f} GB")
    for kind, total in report.collectives.items():
        figures = f"{total['bytes'] / GB:10.3f} GB in {total['count']:.0f}, {total['sent'] / GB:.3f} GB sent"
        lines.append(f"  {kind:<28} {figures}")
    times = ", ".join(f"{resource} {seconds:.3g}" for resource, seconds in report.seconds.items())
    least, most = max(report.seconds.values()), sum(report.seconds.values())
    lines.append(f"  {'seconds at peak rates':<28} {least:.3g} to {most:.3g}, bound by {report.bound} ({times})")
    if report.unknown_loops:
        lines.append(f"  {report.unknown_loops} loop(s) end with the answer: counted as if it had its full length")
    lines.append(f"  {'largest array':<28} {report.largest}")
    lines.append(f"  {'compiled in':<28} {report.compile_seconds:.1f} s")
    return lines
