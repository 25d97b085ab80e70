"""Pickles of plain data, read without `pickle`: data comes out, nothing in the file runs.

A pickle is a small program. `unpickle` runs it and knows plain data only; what else a program may name stands in a
`Names`, which knows nothing here and PyTorch's names in `torch_file`. Memory and time stay within a constant times the
file: an opcode adds at most one object, memo numbers come in order, a count past the end yields what is there, keys are
quick to compare, and what comes out is small even where a value in many places counts as many.
"""

import contextlib
import dataclasses
import mmap
import os
import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.storage.mapped_file import MappedFile

Path = str | os.PathLike[str]

MAX_PLAIN_PICKLE = 64 << 30  # bytes of one passages file
MAX_DEPTH = 100  # containers inside containers
MAX_KEY = 1000  # characters: an equal key is compared to its end, each time that it comes
MAX_NUMBER_KEYS = 10_000  # in one file; an optimizer has one a parameter
MAX_PLACES = 1_000_000  # of values in containers, or ten a byte of the pickle if that is more

LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the number pickled at the start of a torch file before 1.6
ZIP_MAGIC = b"PK\x03\x04"  # at the start of a newer one

AGAIN = "copy or download it again"
SAVE_PLAIN = "save it again with only tensors and plain values in it"

# What a damaged file raises in the code below: one `except` instead of a test before every access.
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, EOFError, struct.error)


class Refused(Exception):
    """What is wrong, and the remedy; `refusals` adds the file."""


def load_pickle(path: Path) -> Any:
    """What `pickle.dump` wrote with protocol 2 to 5: plain Python; a class or function in it is refused by name."""
    with refusals(path):
        file = map_file(path)
        if file[:4] == ZIP_MAGIC or file[2:15] == LEGACY_MAGIC:
            raise Refused("was written by torch.save, not by pickle.dump; give the file that holds the passages")
        if len(file) > MAX_PLAIN_PICKLE:
            raise Refused(f"has {len(file)} bytes, more than {MAX_PLAIN_PICKLE}; split it")
        return unpickle(file, Names())


@contextlib.contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Turn a refusal into the one line a person reads."""
    try:
        yield
    except Refused as refused:
        raise UserError(f"{os.fspath(path)}: {refused}") from None
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}; give a file that can be read") from None


def map_file(path: Path) -> MappedFile:
    """The bytes of a file, read where they are needed."""
    if not os.stat(path).st_size:
        raise Refused(f"is empty; {AGAIN}")
    return MappedFile(path)


def shortened(value: str | tuple[int, ...]) -> str:
    """What stands in a file, in a message: strings quoted, and nothing in it unprintable."""
    whole = repr(value[:100])
    return whole if len(value) <= 100 and len(whole) <= 200 else f"{whole[:200]}..."


PROTO, FRAME, STOP, MARK = 0x80, 0x95, ord("."), ord("(")
MEMOIZE, BINPUT, LONG_BINPUT, BINGET, LONG_BINGET = 0x94, ord("q"), ord("r"), ord("h"), ord("j")
APPEND, APPENDS, SETITEM, SETITEMS, ADDITEMS, FROZENSET = ord("a"), ord("e"), ord("s"), ord("u"), 0x90, 0x91
TUPLE, TUPLE1, TUPLE2, TUPLE3 = ord("t"), 0x85, 0x86, 0x87
GLOBAL, STACK_GLOBAL, REDUCE, NEWOBJ, BUILD, BINPERSID = ord("c"), 0x93, ord("R"), 0x81, ord("b"), ord("Q")
SHORT_BINUNICODE = 0x8C

CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
EMPTY: dict[int, Callable[[], Any]] = {ord("]"): list, ord("}"): dict, 0x8F: set}
NUMBERS = {ord(op): struct.Struct(form) for op, form in {"J": "<i", "K": "<B", "M": "<H", "G": ">d"}.items()}


def _text(utf8: bytes) -> str:
    return str(utf8, "utf-8", "surrogatepass")


COUNTED: dict[int, tuple[int, Callable[[bytes], Any]]] = {  # opcode: width of the count, what the bytes become
    **{ord("X"): (4, _text), 0x8D: (8, _text)},
    **{ord("C"): (1, bytes), ord("B"): (4, bytes), 0x8E: (8, bytes), 0x96: (8, bytearray)},
    0x8A: (1, lambda digits: int.from_bytes(digits, "little", signed=True)),
}

KEYS: frozenset[type[Any]] = frozenset({str, int, float, bool, bytes, type(None)})  # a nested tuple is slow to hash
TEXT = {str}
NESTED: frozenset[type[Any]] = frozenset({list, tuple, dict, set, frozenset})
PLAIN = KEYS | NESTED | {bytearray}


@dataclasses.dataclass(frozen=True)
class Maker:
    """A class or function that a pickle may call, and what is done in its place."""

    name: str
    make: Callable[..., Any]


class Names:
    """What a plain pickle may name beyond plain data: nothing."""

    kinds: frozenset[type[Any]] = frozenset()  # of the values that names make

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.number_keys = 0

    def keys(self, values: list[Any]) -> list[Any]:
        """The same values, which may be the keys of a dict or the members of a set.

        Numbers with equal hashes are easily found, and n of them take n * n steps to store; so numbers are few.
        """
        kinds = set(map(type, values))
        if kinds == TEXT and max(map(len, values)) <= MAX_KEY:
            return values
        if not kinds <= KEYS:
            bad = next(kind.__name__ for kind in map(type, values) if kind not in KEYS)
            raise Refused(f"has a {bad} as the key of a dict or in a set; save it again with strings or numbers there")
        if any(type(value) in (str, bytes) and len(value) > MAX_KEY for value in values):
            raise Refused(f"has a key of more than {MAX_KEY} characters in a dict or set; save it again as a value")
        if kinds & {int, float}:
            self.number_keys += sum(type(value) in (int, float) for value in values)
            if self.number_keys > MAX_NUMBER_KEYS:
                raise Refused(f"has more than {MAX_NUMBER_KEYS} numbers as keys; save it again with strings there")
        return values

    def find(self, module: Any, attribute: Any) -> Any:
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a name is made of two strings")
        name = f"{module}.{attribute}".replace("__builtin__.", "builtins.", 1)
        if name not in self.known:
            raise Refused(f"asks for {shortened(name)}, which is not among the names allowed in it; {SAVE_PLAIN}")
        return self.known[name]

    def load(self, reference: Any) -> Any:
        raise Refused(f"refers to something outside its pickle; {SAVE_PLAIN}")

    def set_state(self, target: Any, state: Any) -> None:
        raise Refused(f"sets the attributes of a {type(target).__name__}; {SAVE_PLAIN}")


def unpickle(data: mmap.mmap | bytes, names: Names) -> Any:
    """Run the program. The commonest opcodes stand first; a read past the end is an IndexError at the next opcode."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    pos = 2
    try:
        if data[0] != PROTO or not 2 <= data[1] <= 5:
            raise Refused(f"is not a pickle of protocol 2 to 5; {AGAIN}")
        while True:
            op = data[pos]
            pos += 1
            if op == SHORT_BINUNICODE:
                end = pos + 1 + data[pos]
                stack.append(str(data[pos + 1 : end], "utf-8", "surrogatepass"))
                pos = end
            elif op == MEMOIZE:
                memo.append(stack[-1])
            elif op == BINGET:
                stack.append(memo[data[pos]])
                pos += 1
            elif op == LONG_BINGET:
                stack.append(memo[int.from_bytes(data[pos : pos + 4], "little")])
                pos += 4
            elif op in COUNTED:
                width, make = COUNTED[op]
                end = pos + width + int.from_bytes(data[pos : pos + width], "little")
                stack.append(make(data[pos + width : end]))
                pos = end
            elif op == MARK:
                marks.append(len(stack))
            elif op == SETITEMS:
                start = marks.pop()
                dict.update(stack[start - 1], zip(names.keys(stack[start::2]), stack[start + 1 :: 2], strict=True))
                del stack[start:]
            elif op in EMPTY:
                stack.append(EMPTY[op]())
            elif op in (BINPUT, LONG_BINPUT):
                width = 1 if op == BINPUT else 4
                index = int.from_bytes(data[pos : pos + width], "little")
                if index > len(memo):
                    raise ValueError(f"memo number {index} comes where {len(memo)} should")
                memo[index : index + 1] = [stack[-1]]
                pos += width
            elif op in NUMBERS:
                stack.append(NUMBERS[op].unpack_from(data, pos)[0])
                pos += NUMBERS[op].size
            elif op in CONSTANTS:
                stack.append(CONSTANTS[op])
            elif TUPLE1 <= op <= TUPLE3 or op == TUPLE:
                start = marks.pop() if op == TUPLE else len(stack) - (op - TUPLE1 + 1)
                if start < 0:
                    raise IndexError("too few values for a tuple")
                stack[start:] = [tuple(stack[start:])]
            elif op == APPEND:
                value = stack.pop()
                list.append(stack[-1], value)
            elif op == APPENDS:
                start = marks.pop()
                list.extend(stack[start - 1], stack[start:])
                del stack[start:]
            elif op == SETITEM:
                value, key = stack.pop(), stack.pop()
                dict.__setitem__(stack[-1], names.keys([key])[0], value)
            elif op == ADDITEMS:
                start = marks.pop()
                set.update(stack[start - 1], names.keys(stack[start:]))
                del stack[start:]
            elif op == FROZENSET:
                start = marks.pop()
                stack[start:] = [frozenset(names.keys(stack[start:]))]
            elif op == FRAME:
                pos += 8  # a hint for reading ahead
            elif op == GLOBAL:
                middle = data.find(b"\n", pos)
                end = data.find(b"\n", middle + 1)
                if middle < 0 or end < 0:
                    raise IndexError("a name without an end")
                stack.append(names.find(_text(data[pos:middle]), _text(data[middle + 1 : end])))
                pos = end + 1
            elif op == STACK_GLOBAL:
                attribute, module = stack.pop(), stack.pop()
                stack.append(names.find(module, attribute))
            elif op in (REDUCE, NEWOBJ):
                args, maker = stack.pop(), stack.pop()
                if type(maker) is not Maker or type(args) is not tuple:
                    raise TypeError(f"a {type(maker).__name__} is called")
                stack.append(maker.make(*args))
            elif op == BUILD:
                state = stack.pop()
                names.set_state(stack[-1], state)
            elif op == BINPERSID:
                stack.append(names.load(stack.pop()))
            elif op == STOP:
                break
            else:
                raise Refused(f"uses opcode {_opcode(op)} at byte {pos - 1} of its pickle; {SAVE_PLAIN}")
        if len(stack) != 1 or marks or pos != len(data):
            raise Refused(f"ends too early, at byte {pos} of its pickle; {AGAIN}")
    except MALFORMED as error:
        problem = "is cut short" if pos >= len(data) else f"is damaged ({shortened(str(error))})"
        raise Refused(f"{problem} at byte {min(pos, len(data))} of its pickle; {AGAIN}") from None
    _check_plain(stack[0], PLAIN | names.kinds, max(MAX_PLACES, 10 * len(data)))
    return stack[0]


def _check_plain(root: Any, plain: frozenset[type[Any]], most: int) -> None:
    """Refuse what is not plain data, nested too deeply or, which is nesting without end, part of itself.

    A value is met, and counted, wherever it stands: so it is for whoever prints, compares or copies the data later.
    """
    level = [root]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            kind = type(value)
            if kind not in plain:
                name = value.name if kind is Maker else kind.__name__
                raise Refused(f"holds {shortened(name)} itself as a value; {SAVE_PLAIN}")
            if kind in NESTED:
                most -= len(value)
                if most < 0:
                    raise Refused(f"repeats the same values in too many places; {SAVE_PLAIN}, each once")
                below += [child for child in (value.values() if kind is dict else value) if type(child) not in KEYS]
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> Refused:
    return Refused(f"nests values more than {MAX_DEPTH} deep; {SAVE_PLAIN}, less deep")


def _opcode(op: int) -> str:
    known = pickletools.code2op.get(chr(op))  # type: ignore[attr-defined]  # not in typeshed
    return known.name if known else f"{op:#04x}"
