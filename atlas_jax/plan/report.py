"""What a plan says of each program: its memory, its work, how long that takes at best, and what holds it up."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from atlas_jax.plan import hlo
from atlas_jax.plan.hlo import Collective, Counts
from atlas_jax.plan.programs import Plan, Step
from atlas_jax.plan.topology import Topology

logger = logging.getLogger(__name__)

DEFAULT_SHARE = 0.75  # of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
GB = 1e9


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A program on one device; bytes, operations and seconds are those of one call."""

    name: str
    memory: dict[str, float]  # bytes, what stays there all the time included
    capacity: float  # bytes
    tokens: int  # that all devices read together
    compile_seconds: float
    refused: str = ""  # why there is no program
    broken: bool = False  # so the compiler failed, and not for want of memory
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    traffic: float = 0.0
    collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    largest: str = ""  # array that the program makes
    arguments: float = 0.0  # bytes, as the compiler counts them

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        return not self.refused and self.total <= self.capacity

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda what: self.seconds[what]) if self.seconds else ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {"total": self.total, "fits": self.fits, "bound": self.bound}
        return dataclasses.asdict(self) | found | {"seconds_at_least": max(self.seconds.values(), default=0.0)}


def examine(step: Step, plan: Plan, topology: Topology, turns: int) -> StepReport:
    """Compiles a program and looks at it; `turns` are those of a loop that ends when an answer does.

    Where already what stays on the device does not fit, nothing is compiled. What the compiler refuses is told too.
    """
    capacity, start = float(topology.device.memory), time.perf_counter()
    memory = {what: float(nbytes) for what, nbytes in (plan.resident | {"batch": step.batch}).items()}
    if plan.held > capacity:
        reason = f"what stays on the device takes {plan.held / GB:.2f} of {capacity / GB:.1f} GB"
        return StepReport(step.name, memory, capacity, step.tokens, 0.0, reason)
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        seconds, broken = time.perf_counter() - start, "RESOURCE_EXHAUSTED" not in str(error)
        reason = f"the compiler says {' '.join(str(error).split())[:200]}"
        return StepReport(step.name, memory, capacity, step.tokens, seconds, reason, broken)
    seconds = time.perf_counter() - start
    analysis: Any = compiled.memory_analysis()
    results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    memory["activations and temporaries"] = float(analysis.temp_size_in_bytes + results)
    module = hlo.parse(compiled.as_text() or "")
    counts = hlo.count(module, turns=turns)
    return StepReport(
        step.name,
        memory,
        capacity,
        step.tokens,
        seconds,
        flops=counts.flops,
        traffic=counts.traffic,
        collectives=by_kind(counts.collectives),
        seconds=roofline(counts, topology),
        unknown_loops=counts.unknown_loops,
        largest=_largest(module),
        arguments=float(analysis.argument_size_in_bytes),
    )


def by_kind(collectives: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """How many there are of each, the bytes of their arrays, and those that a device sends for them."""
    found: dict[str, dict[str, float]] = {}
    for one in collectives:
        if len(one.group) > 1:
            total = found.setdefault(one.kind, {"count": 0.0, "bytes": 0.0, "sent": 0.0})
            total["count"] += one.times
            total["bytes"] += one.times * one.nbytes
            total["sent"] += one.times * one.sent
    return found


def roofline(counts: Counts, topology: Topology) -> dict[str, float]:
    """Seconds that arithmetic, memory and interconnect need, each by itself and at its peak."""
    device = topology.device
    rates = {"bf16": device.bf16, "f16": device.bf16}
    return {
        "compute": sum((n / rates.get(dtype, device.f32) for dtype, n in counts.flops.items()), 0.0),
        "memory": counts.traffic / device.bandwidth,
        "interconnect": sum((one.times * _seconds(one, topology) for one in counts.collectives), 0.0),
    }


def _seconds(one: Collective, topology: Topology) -> float:
    """Of a collective: inside a node at the speed of its links, between nodes by all devices' ports at once."""
    members = len(one.group)
    nodes = len({device // topology.per_node for device in one.group})
    if members < 2:
        return 0.0
    inside = one.sent / topology.device.link
    if nodes == 1:
        return inside
    # Of what a device sends, what another node wants leaves the node once, by the ports of all members in it
    crossing = one.sent * members / (members - 1) * (nodes - 1) / nodes / (members / nodes)
    return max(inside, crossing / topology.device.network)


def _largest(module: hlo.Module) -> str:
    shape, maker = max(hlo.arrays(module), key=lambda found: found[0].nbytes)
    sizes = ",".join(map(str, shape.sizes))
    return f"{shape.dtype}[{sizes}], {shape.nbytes / GB:.2f} GB, by {maker.opcode}"


def text(reports: Iterable[StepReport], topology: Topology, mesh: Mapping[str, int]) -> str:
    """The plan as a person reads it."""
    found = [f"{_machine(topology, mesh)} and one call"]
    for report in reports:
        found += ["", *_lines(report, topology)]
    return "\n".join(found)


def text_of_resident(plan: Plan, topology: Topology, mesh: Mapping[str, int]) -> str:
    """The same of a plan that ends with what stays on a device."""
    memory = {what: float(nbytes) for what, nbytes in plan.resident.items()}
    total = _sum("what stays on the device", sum(memory.values()), float(topology.device.memory))
    return "\n".join([_machine(topology, mesh), "", total, *_amounts(memory)])


def _machine(topology: Topology, mesh: Mapping[str, int]) -> str:
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    return f"{topology.text}, mesh {axes}; each figure is of one device"


def _sum(name: str, total: float, capacity: float) -> str:
    fits = "fits" if total <= capacity else "DOES NOT FIT"
    return f"{name}: {fits}, {total / GB:.2f} of {capacity / GB:.1f} GB ({total / capacity:.0%})"


def _amounts(memory: Mapping[str, float]) -> list[str]:
    return [f"  {what:<28} {nbytes / GB:10.3f} GB" for what, nbytes in memory.items()]


def _lines(report: StepReport, topology: Topology) -> list[str]:
    if report.refused:
        return [f"{report.name}: DOES NOT {'COMPILE' if report.broken else 'FIT'}: {report.refused}"]
    share = report.total / report.capacity
    found = [_sum(report.name, report.total, report.capacity), *_amounts(report.memory)]
    if report.fits and share > DEFAULT_SHARE and topology.device.platform == "cuda":
        found.append(f"  set XLA_PYTHON_CLIENT_MEM_FRACTION over {share:.2f}: JAX takes {DEFAULT_SHARE} otherwise")
    flops = " + ".join(f"{n / 1e12:.3g} in {dtype}" for dtype, n in report.flops.items()) or "0"
    found.append(f"  {'TFLOP':<28} {flops}")
    found.append(f"  {'memory traffic, at most':<28} {report.traffic / GB:10.3f} GB")
    for kind, total in report.collectives.items():
        figures = f"{total['bytes'] / GB:10.3f} GB in {total['count']:.0f}, {total['sent'] / GB:.3f} GB sent"
        found.append(f"  {kind:<28} {figures}")
    times = ", ".join(f"{what} {seconds:.3g}" for what, seconds in report.seconds.items())
    least, most = max(report.seconds.values()), sum(report.seconds.values())
    found.append(f"  {'seconds at peak rates':<28} {least:.3g} to {most:.3g}, bound by {report.bound} ({times})")
    if report.unknown_loops:
        found.append(f"  {report.unknown_loops} loop(s) end with the answer: counted as if it had its full length")
    found.append(f"  {'largest array':<28} {report.largest}")
    found.append(f"  {'compiled in':<28} {report.compile_seconds:.1f} s")
    return found
