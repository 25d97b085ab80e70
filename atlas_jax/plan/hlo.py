"""Counts matrix-product FLOPs, memory traffic and collectives of a compiled program on one device, from its HLO text.

Instructions in the body of a loop are counted once per iteration.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
# Bits of the dtypes whose name does not end in their number of bits
DTYPE_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
NO_TRAFFIC_OPCODES = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "async-done", "async-update", "copy-done"),
    "fusion-done",
    *(f"{name}-done" for name in COLLECTIVES),
}
CALLED_COMPUTATIONS = re.compile(
    r"\b(?:calls|body|condition|to_apply|called_computations|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%[\w.-]+)"
)
FUSION_OPCODES = ("fusion", "fusion-start")
CALLING_OPCODES = ("while", "conditional", "call", *FUSION_OPCODES, "async-start", "custom-call")
# The result has the operand's elements, one to one: a slice of it needs only as large a slice of the operand
COPY_OPCODES = ("bitcast", "copy", "convert", "reshape", "transpose")
ARRAY_TYPE = re.compile(r"(\w+)\[([\d,]*)\]")
COMPUTATION_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
INSTRUCTION_START = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
OPCODE = re.compile(r" ([a-z][\w-]*)\(")


class HloShape(NamedTuple):
    """Dtype and dimensions of an array in a program."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> float:
        """Size in bytes, without padding."""
        digits = re.search(r"^[a-z]+(\d+)", self.dtype)
        bits = DTYPE_BITS.get(self.dtype) if self.dtype in DTYPE_BITS else int(digits[1]) if digits else 8
        return self.elements * (bits or 0) / 8.0


class Instruction(NamedTuple):
    """One instruction: a line of the HLO text."""

    name: str
    opcode: str
    shapes: tuple[HloShape, ...]  # of the result; of a tuple, those of its elements in order
    operands: tuple[str, ...]
    attributes: str  # the text after the operands, then `#` and the text of the operands (the value of a constant)
    is_root: bool

    @property
    def nbytes(self) -> float:
        """Size of the result in bytes."""
        return sum((shape.nbytes for shape in self.shapes), 0.0)

    @property
    def calls(self) -> list[str]:
        """Names of the computations that the instruction calls."""
        return [
            name for names in CALLED_COMPUTATIONS.findall(self.attributes) for name in re.findall(r"%([\w.-]+)", names)
        ]


class Module(NamedTuple):
    """A program: its computations by name, each a dict of instructions by name."""

    computations: Mapping[str, dict[str, Instruction]]
    entry: str  # name of the computation where execution starts


class Collective(NamedTuple):
    """A collective operation of a program."""

    kind: str
    shapes: tuple[HloShape, ...]  # of the larger side: what is gathered (the result) or reduced (the operands)
    group: tuple[int, ...]  # device ids of the first replica group
    times: int  # executions per run of the program
    op_name: str  # JAX's name of the operation, which identifies the source location

    @property
    def nbytes(self) -> float:
        """Bytes of `shapes`, of one execution."""
        return sum((shape.nbytes for shape in self.shapes), 0.0)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends in one execution, with a ring algorithm."""
        other_share = (len(self.group) - 1) / max(1, len(self.group))
        if self.kind == "collective-permute":
            return self.nbytes
        return self.nbytes * other_share * (2 if self.kind == "all-reduce" else 1)


class Counts(NamedTuple):
    """Work of one device in one run of a program."""

    flops: dict[str, float]  # of matrix products, by the dtype of their left operand
    traffic: float  # bytes read and written by instructions outside fusions: an upper bound of device memory traffic
    collectives: list[Collective]
    unknown_loops: int  # loops whose trip count is known only at run time


def parse(text: str) -> Module:
    """Parses the text form of an HLO module."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := COMPUTATION_HEAD.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := INSTRUCTION_START.match(line)):
            instruction = _parse_instruction(start[2], line[start.end() :], is_root=bool(start[1]))
            current[instruction.name] = instruction
    return Module(computations, entry)


def _parse_instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    """Parses `TYPE opcode(operands), attributes`; a tuple's TYPE is in parentheses."""
    type_end = _closing_parenthesis(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = OPCODE.match(text, type_end)
    if opcode is None:
        raise ValueError(f"no HLO: {text:.100}")
    operands_end = _closing_parenthesis(text, opcode.end() - 1)
    shapes = tuple(
        HloShape(dtype, tuple(map(int, filter(None, sizes.split(",")))))
        for dtype, sizes in ARRAY_TYPE.findall(text[:type_end])
    )
    operand_text = text[opcode.end() : operands_end]
    operands = tuple(re.findall(r"%([\w.-]+)", operand_text))
    return Instruction(name, opcode[1], shapes, operands, text[operands_end + 1 :] + f" #{operand_text}", is_root)


def _closing_parenthesis(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one at `start`."""
    depth = 0
    for parenthesis in re.finditer(r"[()]", text[start:]):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return start + parenthesis.start()
    raise ValueError(f"a parenthesis that does not close: {text:.100}")


def count(module: Module, *, assumed_trip_count: int = 1) -> Counts:
    """Counts the work of one device; a loop whose trip count the program does not state has `assumed_trip_count`."""
    flops: collections.Counter[str] = collections.Counter()
    collectives: list[Collective] = []
    traffic, unknown_loops = 0.0, 0
    seen_chains: set[str] = set()
    for computation, instruction, times, in_fusion in _walk(
        module, module.entry, 1, assumed_trip_count, in_fusion=False
    ):
        if instruction.opcode == "while" and trip_count(module, instruction) is None:
            unknown_loops += 1
        if operations := _matmul_flops(computation, instruction):
            flops[computation[instruction.operands[0]].shapes[0].dtype] += times * operations
        collective = _collective(computation, instruction, times, in_fusion=in_fusion)
        if collective and not (in_fusion and _already_counted(instruction, seen_chains)):
            collectives.append(collective)
        if not in_fusion and instruction.opcode not in NO_TRAFFIC_OPCODES:
            traffic += times * _traffic(module, computation, instruction)
    return Counts({dtype: float(n) for dtype, n in flops.items()}, traffic, collectives, unknown_loops)


Visit = tuple[dict[str, Instruction], Instruction, int, bool]


def _walk(module: Module, name: str, times: int, assumed_trip_count: int, *, in_fusion: bool) -> Iterator[Visit]:
    """Yields (computation, instruction, number of executions, whether it is in a fusion) for all that `name` runs."""
    computation = module.computations[name]
    for instruction in computation.values():
        yield computation, instruction, times, in_fusion
        if instruction.opcode not in CALLING_OPCODES:
            continue  # the computation that a reduction applies works on scalars
        called_times = times
        if instruction.opcode == "while":
            known = trip_count(module, instruction)
            called_times *= assumed_trip_count if known is None else known
        called_in_fusion = in_fusion or instruction.opcode in (*FUSION_OPCODES, "async-start")
        for called in instruction.calls:
            yield from _walk(module, called, called_times, assumed_trip_count, in_fusion=called_in_fusion)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Number of iterations of a loop, or None if the program does not state it.

    The number is the compiler's `known_trip_count`. TPU's compiler writes none; then the number is `n` if the condition
    is exactly `i < n`, as in the loop of a scan, whose `i` JAX counts from 0 by 1.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    name = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    condition = module.computations[name[1]] if name else {}
    root = next((instruction for instruction in condition.values() if instruction.is_root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, bound = (condition[operand] for operand in root.operands)
    value = re.search(r"#(\d+)$", bound.attributes)
    if counter.opcode == "get-tuple-element" and bound.opcode == "constant" and value:
        return int(value[1])
    return None


# FLOPs


def _matmul_flops(computation: Mapping[str, Instruction], instruction: Instruction) -> int:
    """FLOPs of a matrix product, two for each multiplication; 0 for other instructions."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    if (
        instruction.opcode == "custom-call"
        and "matmul" not in instruction.attributes
        and "gemm" not in instruction.attributes
    ):
        return 0
    if not instruction.operands or not instruction.shapes:
        return 0
    left, right = (computation[name].shapes[0] for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, left, right)
    match = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:][\[{]([\d",]*)[\]}]', instruction.attributes)
    last_axis = [len(left.sizes) - 1]  # the axis that oneDNN's custom calls on a CPU contract, without stating it
    contracted = [int(i) for i in re.findall(r"\d+", match[1])] if match else last_axis
    return 2 * instruction.shapes[0].elements * math.prod(left.sizes[i] for i in contracted)


def _convolution_flops(instruction: Instruction, left: HloShape, right: HloShape) -> int:
    """FLOPs of a matrix product that a TPU program writes as a convolution, without multiplications by padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0
    result, kernel, source = instruction.shapes[0].sizes, right.sizes, left.sizes
    operations = 2 * result[labels[3].index("b")] * result[labels[3].index("f")] * kernel[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\w_]+)", (re.search(r"window=\{([^}]*)\}", instruction.attributes) or " ")[0]))
    for i in range(len(labels[1]) - 2):
        label = str(i)
        sizes = source[labels[1].index(label)], kernel[labels[2].index(label)], result[labels[3].index(label)]
        operations *= _unpadded_products(*sizes, {key: value.split("x")[i] for key, value in window.items()})
    return operations


def _unpadded_products(source: int, kernel: int, result: int, window: Mapping[str, str]) -> int:
    """Number of (result, kernel) positions of one spatial axis that multiply an element of the source, not padding."""
    stride, source_dilation, kernel_dilation = (
        int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate")
    )
    pad_before = int(window.get("pad", "0_0").split("_")[0])
    position = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * kernel_dilation - pad_before
    return int(((position >= 0) & (position % source_dilation == 0) & (position // source_dilation < source)).sum())


# Collectives


def _already_counted(instruction: Instruction, seen_chains: set[str]) -> bool:
    """Returns whether the collective's chain id is in `seen_chains`, and adds it there.

    A TPU program repeats a collective, with one chain id, in every fusion whose product it overlaps with.
    """
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
    seen = chain is not None and chain[1] in seen_chains
    seen_chains |= {chain[1]} if chain else set()
    return seen


def _collective(
    computation: Mapping[str, Instruction], instruction: Instruction, times: int, *, in_fusion: bool
) -> Collective | None:
    """Returns the collective that an instruction is, or None; the `-done` half of an asynchronous pair is none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if in_fusion and kind == "all-reduce" and any(other.opcode == "dynamic-slice" for other in computation.values()):
        kind = "reduce-scatter"  # a TPU program writes it as an all-reduce and a slice in one fusion
    operands = tuple(itertools.chain.from_iterable(computation[name].shapes for name in instruction.operands))
    results = instruction.shapes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        results = results[len(operands) : 2 * len(operands)]  # the result tuple begins with the operands
    larger = max(operands, results, key=lambda shapes: sum(shape.nbytes for shape in shapes))
    op_name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return Collective(kind, larger, _first_group(instruction.attributes), times, op_name[1] if op_name else "")


def _first_group(attributes: str) -> tuple[int, ...]:
    """Device ids of the first replica group, in any of the forms that XLA writes groups in."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if explicit := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return tuple(map(int, explicit[1].split(",")))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return tuple(_device_array(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes)
    return _mesh_group(mesh[1], mesh[2], mesh[3]) if mesh else ()


def _device_array(text: str) -> np.ndarray:
    """Device ids from XLA's text: `[2,4]T(1,0)` is arange(8) of shape (2, 4), transposed by (1, 0); or a plain list."""
    sizes, _, permutation = text.partition("T")
    numbers = [int(n) for n in re.findall(r"\d+", sizes)]
    if not sizes.startswith("["):
        return np.array(numbers)
    devices = np.arange(math.prod(numbers)).reshape(numbers)
    return devices.transpose([int(n) for n in re.findall(r"\d+", permutation)]) if permutation else devices


def _mesh_group(axes: str, devices: str | None, group_axes: str) -> tuple[int, ...]:
    """Device ids of the first group over `group_axes` of a mesh.

    `'a':(2)4` is a part of an axis: split into 2 x 4 x the rest, it is the part of size 4.
    """
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", group_axes)}
    shape: list[int] = []
    index: list[int | slice] = []
    for name, axis_size in re.findall(r"'([^']+)'=(\d+)", axes):
        before, size = (int(n) if n else 0 for n in parts.get(name, ("1", "1")))
        before, size = before or 1, size or int(axis_size)
        shape += [before, size, int(axis_size) // (before * size)]
        index += [0, slice(None), 0]
    ids = _device_array(devices) if devices else np.arange(math.prod(shape))
    return tuple(int(n) for n in ids.reshape(shape)[tuple(index)].reshape(-1))


# Memory traffic


def _traffic(module: Module, computation: Mapping[str, Instruction], instruction: Instruction) -> float:
    """Bytes of the operands and of the result; of an array that is sliced, or updated in a slice, only the slice."""
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.nbytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * computation[instruction.operands[1]].nbytes
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode not in FUSION_OPCODES:
        return instruction.nbytes + sum(operand.nbytes for operand in operands)
    body = module.computations[instruction.calls[0]]
    parameters = [inner for inner in body.values() if inner.opcode == "parameter"]
    root = next(inner for inner in body.values() if inner.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(_bytes_read(body, inner) for inner in parameters) + sum(_bytes_written(body, inner) for inner in results)


def _bytes_read(body: Mapping[str, Instruction], parameter: Instruction) -> float:
    """Bytes that a fusion reads of one of its parameters."""
    consumers = list(_consumers(body, parameter.name))
    if consumers and all(consumer.opcode in ("dynamic-slice", "slice", "gather") for consumer, _ in consumers):
        share = sum(consumer.shapes[0].elements for consumer, _ in consumers) / max(1, parameter.shapes[0].elements)
        return parameter.nbytes * min(1.0, share)
    if consumers and all(
        consumer.opcode == "dynamic-update-slice" and consumer.operands[0] == name for consumer, name in consumers
    ):
        return 0.0
    return parameter.nbytes


def _consumers(body: Mapping[str, Instruction], name: str) -> Iterator[tuple[Instruction, str]]:
    """Yields each consumer of `name` and the operand it has, looking through COPY_OPCODES."""
    for consumer in body.values():
        if name in consumer.operands:
            if consumer.opcode in COPY_OPCODES and not consumer.is_root:
                yield from _consumers(body, consumer.name)
            else:
                yield consumer, name


def _bytes_written(body: Mapping[str, Instruction], result: Instruction) -> float:
    """Bytes of a fusion's result; of a result that is an operand updated in place, only the updated slice."""
    source = result
    while source.opcode in COPY_OPCODES and source.operands[0] in body:
        source = body[source.operands[0]]
    if source.opcode == "dynamic-update-slice":
        return body[source.operands[1]].nbytes
    return result.nbytes


def materialized_arrays(module: Module) -> Iterator[tuple[HloShape, Instruction]]:
    """Yields every array that a program writes to memory, outside fusions, with the instruction that produces it."""
    for _, instruction, _, in_fusion in _walk(module, module.entry, 1, 1, in_fusion=False):
        if not in_fusion and instruction.opcode not in NO_TRAFFIC_OPCODES:
            for shape in instruction.shapes:
                yield shape, instruction
