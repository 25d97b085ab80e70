"""What a compiled program does on one device, read out of its text: arithmetic, memory traffic, collectives.

Everything inside a loop counts as often as the loop turns.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # of types whose name does not end in their number of bits
MOVES_NOTHING = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "async-done", "async-update", "copy-done"),
    "fusion-done",
    *(f"{name}-done" for name in COLLECTIVES),
}
CALLS = re.compile(
    r"\b(?:calls|body|condition|to_apply|called_computations|branch_computations|(?:true|false)_computation)="
    r"(\{[^}]*\}|%[\w.-]+)"
)
FUSIONS = ("fusion", "fusion-start")
CALLING = ("while", "conditional", "call", *FUSIONS, "async-start", "custom-call")
SAME_NUMBERS = ("bitcast", "copy", "convert", "reshape", "transpose")  # for a slice, only of the slice
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
OPCODE = re.compile(r" ([a-z][\w-]*)\(")


class Shape(NamedTuple):
    """An array of a program."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.sizes)

    @property
    def nbytes(self) -> float:
        """Bytes, without padding."""
        digits = re.search(r"^[a-z]+(\d+)", self.dtype)
        bits = BITS.get(self.dtype) if self.dtype in BITS else int(digits[1]) if digits else 8
        return self.elements * (bits or 0) / 8.0


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of its result, a tuple's one after the other
    operands: tuple[str, ...]
    rest: str  # attributes
    is_root: bool

    @property
    def nbytes(self) -> float:
        """Of its result."""
        return sum((shape.nbytes for shape in self.shapes), 0.0)

    @property
    def calls(self) -> list[str]:
        """The computations that it runs, but for those of a single number."""
        return [name for names in CALLS.findall(self.rest) for name in re.findall(r"%([\w.-]+)", names)]


class Module(NamedTuple):
    """A program: its computations by name."""

    computations: Mapping[str, dict[str, Instruction]]
    entry: str


class Collective(NamedTuple):
    """Data that devices exchange."""

    kind: str
    shapes: tuple[Shape, ...]  # of the larger side: what is gathered, or is to be reduced
    group: tuple[int, ...]  # the devices of the first group
    times: int
    op_name: str  # where in our code

    @property
    def nbytes(self) -> float:
        """Of the arrays exchanged, each time."""
        return sum((shape.nbytes for shape in self.shapes), 0.0)

    @property
    def sent(self) -> float:
        """Bytes that each device sends, each time, in a ring."""
        others = (len(self.group) - 1) / max(1, len(self.group))
        if self.kind == "collective-permute":
            return self.nbytes
        return self.nbytes * others * (2 if self.kind == "all-reduce" else 1)


class Counts(NamedTuple):
    """What a device does in one run of a program."""

    flops: dict[str, float]  # of matrix products, by the type of what is multiplied
    traffic: float  # bytes read and written by top-level instructions: an upper bound of what reaches the memory
    collectives: list[Collective]
    unknown_loops: int  # loops of which only the program knows when they end


def parse(text: str) -> Module:
    """A program in XLA's text form."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := LINE.match(line)):
            instruction = _instruction(start[2], line[start.end() :], is_root=bool(start[1]))
            current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    """`TYPE opcode(operands), attributes`; a type may have parentheses of its own."""
    after = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = OPCODE.match(text, after)
    if opcode is None:
        raise ValueError(f"no HLO: {text:.100}")
    end = _closing(text, opcode.end() - 1)
    shapes = tuple(
        Shape(kind, tuple(map(int, filter(None, sizes.split(","))))) for kind, sizes in ARRAY.findall(text[:after])
    )
    inner = text[opcode.end() : end]
    operands = tuple(re.findall(r"%([\w.-]+)", inner))
    return Instruction(name, opcode[1], shapes, operands, text[end + 1 :] + f" #{inner}", is_root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"a parenthesis that does not close: {text:.100}")


def count(module: Module, *, turns: int = 1) -> Counts:
    """What a device does; `turns` are those of a loop whose number of turns is not known beforehand."""
    flops: collections.Counter[str] = collections.Counter()
    collectives: list[Collective] = []
    traffic, unknown = 0.0, 0
    chains: set[str] = set()
    for computation, instruction, times, inside in _runs(module, module.entry, 1, turns, inside=False):
        if instruction.opcode == "while" and trips(module, instruction) is None:
            unknown += 1
        if operations := _operations(computation, instruction):
            flops[computation[instruction.operands[0]].shapes[0].dtype] += times * operations
        found = _collective(computation, instruction, times, inside=inside)
        if found and not (inside and _counted(instruction, chains)):
            collectives.append(found)
        if not inside and instruction.opcode not in MOVES_NOTHING:
            traffic += times * _traffic(module, computation, instruction)
    return Counts({dtype: float(n) for dtype, n in flops.items()}, traffic, collectives, unknown)


Run = tuple[dict[str, Instruction], Instruction, int, bool]


def _runs(module: Module, name: str, times: int, turns: int, *, inside: bool) -> Iterator[Run]:
    """Each instruction, how often it runs, and whether it is inside a fusion."""
    computation = module.computations[name]
    for instruction in computation.values():
        yield computation, instruction, times, inside
        if instruction.opcode not in CALLING:
            continue  # what a reduction applies is of single numbers
        more = times
        if instruction.opcode == "while":
            known = trips(module, instruction)
            more *= turns if known is None else known
        within = inside or instruction.opcode in (*FUSIONS, "async-start")
        for called in instruction.calls:
            yield from _runs(module, called, more, turns, inside=within)


def trips(module: Module, loop: Instruction) -> int | None:
    """How often a loop turns, if the compiler says so, or else its condition, as that of a scan, is `i < n` alone.

    TPU's compiler does not say; JAX counts from 0, by 1.
    """
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(found[1])
    name = re.search(r"condition=%?([\w.-]+)", loop.rest)
    condition = module.computations[name[1]] if name else {}
    root = next((one for one in condition.values() if one.is_root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    counter, bound = (condition[operand] for operand in root.operands)
    value = re.search(r"#(\d+)$", bound.rest)
    if counter.opcode == "get-tuple-element" and bound.opcode == "constant" and value:
        return int(value[1])
    return None


# Arithmetic


def _operations(computation: Mapping[str, Instruction], instruction: Instruction) -> int:
    """Floating-point operations of a matrix product, two for each multiplication; 0 of all else."""
    if instruction.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    if instruction.opcode == "custom-call" and "matmul" not in instruction.rest and "gemm" not in instruction.rest:
        return 0
    if not instruction.operands or not instruction.shapes:
        return 0
    left, right = (computation[name].shapes[0] for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _convolved(instruction, left, right)
    dims = re.search(r'lhs_contracting_dim(?:s|ensions)"?[=:][\[{]([\d",]*)[\]}]', instruction.rest)
    last = [len(left.sizes) - 1]  # of oneDNN's on a CPU, which says nothing
    contracted = [int(i) for i in re.findall(r"\d+", dims[1])] if dims else last
    return 2 * instruction.shapes[0].elements * math.prod(left.sizes[i] for i in contracted)


def _convolved(instruction: Instruction, left: Shape, right: Shape) -> int:
    """A matrix product as the TPU has it: what it multiplies with padding does not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        return 0
    result, kernel, source = instruction.shapes[0].sizes, right.sizes, left.sizes
    operations = 2 * result[labels[3].index("b")] * result[labels[3].index("f")] * kernel[labels[2].index("i")]
    window = dict(re.findall(r"(\w+)=([\w_]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or " ")[0]))
    for i in range(len(labels[1]) - 2):
        at = str(i)
        sizes = source[labels[1].index(at)], kernel[labels[2].index(at)], result[labels[3].index(at)]
        operations *= _meetings(*sizes, {key: value.split("x")[i] for key, value in window.items()})
    return operations


def _meetings(source: int, kernel: int, result: int, window: Mapping[str, str]) -> int:
    """Pairs of a place in the kernel and one in the source, over all places of the result."""
    stride, dilated, spread = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(result)[:, None] * stride + np.arange(kernel)[None] * spread - before
    return int(((place >= 0) & (place % dilated == 0) & (place // dilated < source)).sum())


# Collectives


def _counted(instruction: Instruction, chains: set[str]) -> bool:
    """Whether it is one of `chains`: a TPU's fusions name a collective in each product that it goes on beside."""
    found = re.search(r'chain_id="(\d+)"', instruction.rest)
    known = found is not None and found[1] in chains
    chains |= {found[1]} if found else set()
    return known


def _collective(
    computation: Mapping[str, Instruction], instruction: Instruction, times: int, *, inside: bool
) -> Collective | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    if inside and kind == "all-reduce" and any(one.opcode == "dynamic-slice" for one in computation.values()):
        kind = "reduce-scatter"  # as a TPU writes it
    sources = tuple(itertools.chain.from_iterable(computation[name].shapes for name in instruction.operands))
    results = instruction.shapes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        results = results[len(sources) : 2 * len(sources)]  # after the operands
    larger = max(sources, results, key=lambda shapes: sum(shape.nbytes for shape in shapes))
    named = re.search(r'op_name="([^"]*)"', instruction.rest)
    return Collective(kind, larger, _group(instruction.rest), times, named[1] if named else "")


def _group(text: str) -> tuple[int, ...]:
    """The devices of the first group, in any of the forms that XLA writes groups in."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return tuple(_devices(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text)
    return _group_of_mesh(mesh[1], mesh[2], mesh[3]) if mesh else ()


def _devices(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 on in this shape, with its axes in another order; or a plain list."""
    sizes, _, order = text.partition("T")
    numbers = [int(n) for n in re.findall(r"\d+", sizes)]
    if not sizes.startswith("["):
        return np.array(numbers)
    devices = np.arange(math.prod(numbers)).reshape(numbers)
    return devices.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else devices


def _group_of_mesh(axes: str, devices: str | None, split: str) -> tuple[int, ...]:
    """Groups over some axes of a mesh; `'a':(2)4` is a part of an axis, which has 2 x 4 x others."""
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", split)}
    shape: list[int] = []
    taken: list[int | slice] = []
    for name, found in re.findall(r"'([^']+)'=(\d+)", axes):
        pre, size = (int(n) if n else 0 for n in parts.get(name, ("1", "1")))
        pre, size = pre or 1, size or int(found)
        shape += [pre, size, int(found) // (pre * size)]
        taken += [0, slice(None), 0]
    numbers = _devices(devices) if devices else np.arange(math.prod(shape))
    return tuple(int(n) for n in numbers.reshape(shape)[tuple(taken)].reshape(-1))


# Memory


def _traffic(module: Module, computation: Mapping[str, Instruction], instruction: Instruction) -> float:
    """Bytes of the operands and of the result; of what a slice is taken, or put into, the slice."""
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * instruction.nbytes
    if instruction.opcode == "dynamic-update-slice":
        return 2 * computation[instruction.operands[1]].nbytes
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode not in FUSIONS:
        return instruction.nbytes + sum(operand.nbytes for operand in operands)
    body = module.computations[instruction.calls[0]]
    parameters = [one for one in body.values() if one.opcode == "parameter"]
    root = next(one for one in body.values() if one.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return sum(_read(body, one) for one in parameters) + sum(_written(body, one) for one in results)


def _read(body: Mapping[str, Instruction], parameter: Instruction) -> float:
    """Bytes of a fusion's parameter that it looks at."""
    users = list(_users(body, parameter.name))
    if users and all(one.opcode in ("dynamic-slice", "slice", "gather") for one, _ in users):
        share = sum(one.shapes[0].elements for one, _ in users) / max(1, parameter.shapes[0].elements)
        return parameter.nbytes * min(1.0, share)
    if users and all(one.opcode == "dynamic-update-slice" and one.operands[0] == name for one, name in users):
        return 0.0
    return parameter.nbytes


def _users(body: Mapping[str, Instruction], name: str) -> Iterator[tuple[Instruction, str]]:
    """What makes something else of it, and what it is called there."""
    for one in body.values():
        if name in one.operands:
            if one.opcode in SAME_NUMBERS and not one.is_root:
                yield from _users(body, one.name)
            else:
                yield one, name


def _written(body: Mapping[str, Instruction], result: Instruction) -> float:
    """Bytes of a fusion's result; of one that changes a slice in place, the slice."""
    made = result
    while made.opcode in SAME_NUMBERS and made.operands[0] in body:
        made = body[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        return body[made.operands[1]].nbytes
    return result.nbytes


def arrays(module: Module) -> Iterator[tuple[Shape, Instruction]]:
    """Every array that a program makes outside of fusions, and what makes it."""
    for _, instruction, _, inside in _runs(module, module.entry, 1, 1, inside=False):
        if not inside and instruction.opcode not in MOVES_NOTHING:
            for shape in instruction.shapes:
                yield shape, instruction
