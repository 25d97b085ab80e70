"""Reads pickles of plain data without `pickle`: returns data and never runs anything in the file.

A pickle is a program for a small stack machine. `unpickle` executes the opcodes of plain data only; which globals
(classes and functions) a pickle may use besides is up to an `AllowedGlobals`: none here, PyTorch's in `torch_reader`.

Memory and time are bounded by a constant times the file size: an opcode adds at most one object, memo indices must be
sequential, a length past the end of the file yields only the bytes that exist, dict keys are cheap to compare, and the
result must be small even when a value that occurs in many places is counted at each of them.
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

StrPath = str | os.PathLike[str]

MAX_PLAIN_PICKLE = 64 << 30  # bytes of one passages file
MAX_DEPTH = 100  # levels of nested containers
MAX_KEY = 1000  # characters of a dict key: each time an equal key is stored, the two are compared to the end
MAX_NUMBER_KEYS = 10_000  # numbers used as keys in one file; an optimizer's state has one per parameter
MAX_OCCURRENCES = 1_000_000  # of values in containers; 10 per byte of the pickle if that is more

LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the pickled number that starts a file of PyTorch < 1.6
ZIP_MAGIC = b"PK\x03\x04"  # starts a file of PyTorch >= 1.6

COPY_AGAIN = "copy or download it again"
SAVE_PLAIN = "save it again with only tensors and plain values in it"

# Exceptions that a damaged file raises below: one `except` clause replaces a check before every access.
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, EOFError, struct.error)


class Refused(Exception):
    """Says why a file is refused, and the remedy; `user_errors` prepends the path."""


def load_pickle(path: StrPath) -> Any:
    """Returns the plain data that `pickle.dump` wrote with protocol 2 to 5.

    UserError if the file cannot be read or holds anything else; a class or function in it is named.
    """
    with user_errors(path):
        file = map_file(path)
        if file[:4] == ZIP_MAGIC or file[2:15] == LEGACY_MAGIC:
            raise Refused("was written by torch.save, not by pickle.dump; give the file that holds the passages")
        if len(file) > MAX_PLAIN_PICKLE:
            raise Refused(f"has {len(file)} bytes, more than {MAX_PLAIN_PICKLE}; split it")
        return unpickle(file, AllowedGlobals())


@contextlib.contextmanager
def user_errors(path: StrPath) -> Iterator[None]:
    """Converts `Refused` and OSError into a one-line UserError that starts with the path."""
    try:
        yield
    except Refused as refused:
        raise UserError(f"{os.fspath(path)}: {refused}") from None
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}; give a file that can be read") from None


def map_file(path: StrPath) -> MappedFile:
    """Memory-maps a file; `Refused` if it is empty."""
    if not os.stat(path).st_size:
        raise Refused(f"is empty; {COPY_AGAIN}")
    return MappedFile(path)


def shorten(value: str | tuple[int, ...]) -> str:
    """Formats a value from a file for a message: its `repr`, without unprintable characters, cut after 200 of them."""
    quoted = repr(value[:100])
    return quoted if len(value) <= 100 and len(quoted) <= 200 else f"{quoted[:200]}..."


PROTO, FRAME, STOP, MARK = 0x80, 0x95, ord("."), ord("(")
MEMOIZE, BINPUT, LONG_BINPUT, BINGET, LONG_BINGET = 0x94, ord("q"), ord("r"), ord("h"), ord("j")
APPEND, APPENDS, SETITEM, SETITEMS, ADDITEMS, FROZENSET = ord("a"), ord("e"), ord("s"), ord("u"), 0x90, 0x91
TUPLE, TUPLE1, TUPLE2, TUPLE3 = ord("t"), 0x85, 0x86, 0x87
GLOBAL, STACK_GLOBAL, REDUCE, NEWOBJ, BUILD, BINPERSID = ord("c"), 0x93, ord("R"), 0x81, ord("b"), ord("Q")
SHORT_BINUNICODE = 0x8C

CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
EMPTY_CONTAINERS: dict[int, Callable[[], Any]] = {ord("]"): list, ord("}"): dict, 0x8F: set}
NUMBERS = {ord(op): struct.Struct(form) for op, form in {"J": "<i", "K": "<B", "M": "<H", "G": ">d"}.items()}


def _decode(utf8: bytes) -> str:
    return str(utf8, "utf-8", "surrogatepass")


LENGTH_PREFIXED: dict[int, tuple[int, Callable[[bytes], Any]]] = {  # opcode: bytes of the length, decoder of the rest
    **{ord("X"): (4, _decode), 0x8D: (8, _decode)},
    **{ord("C"): (1, bytes), ord("B"): (4, bytes), 0x8E: (8, bytes), 0x96: (8, bytearray)},
    0x8A: (1, lambda digits: int.from_bytes(digits, "little", signed=True)),
}

# No tuple: a nested one is slow to hash.
KEY_TYPES: frozenset[type[Any]] = frozenset({str, int, float, bool, bytes, type(None)})
STR_ONLY = {str}
CONTAINER_TYPES: frozenset[type[Any]] = frozenset({list, tuple, dict, set, frozenset})
PLAIN_TYPES = KEY_TYPES | CONTAINER_TYPES | {bytearray}


@dataclasses.dataclass(frozen=True)
class AllowedCallable:
    """A class or function that a pickle may call, and the function that is called in its place."""

    name: str
    function: Callable[..., Any]


class AllowedGlobals:
    """Decides which globals and persistent ids a pickle may use, and which states it may set; here none."""

    extra_types: frozenset[type[Any]] = frozenset()  # non-plain types of values that allowed globals give

    def __init__(self) -> None:
        self.allowed: dict[str, Any] = {}
        self.number_keys = 0

    def check_keys(self, values: list[Any]) -> list[Any]:
        """Returns `values`; `Refused` unless all of them are fit to be dict keys or set members.

        Numbers with equal hashes are easy to construct, and storing n of them takes n * n steps; so the file may have
        at most MAX_NUMBER_KEYS of them.
        """
        types = set(map(type, values))
        if types == STR_ONLY and max(map(len, values)) <= MAX_KEY:
            return values
        if not types <= KEY_TYPES:
            bad = next(type_.__name__ for type_ in map(type, values) if type_ not in KEY_TYPES)
            raise Refused(f"has a {bad} as the key of a dict or in a set; save it again with strings or numbers there")
        if any(type(value) in (str, bytes) and len(value) > MAX_KEY for value in values):
            raise Refused(f"has a key of more than {MAX_KEY} characters in a dict or set; save it again as a value")
        if types & {int, float}:
            self.number_keys += sum(type(value) in (int, float) for value in values)
            if self.number_keys > MAX_NUMBER_KEYS:
                raise Refused(f"has more than {MAX_NUMBER_KEYS} numbers as keys; save it again with strings there")
        return values

    def find_global(self, module: Any, attribute: Any) -> Any:
        """Returns the value that replaces a global; `Refused` if the global is not allowed."""
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a name is made of two strings")
        name = f"{module}.{attribute}".replace("__builtin__.", "builtins.", 1)
        if name not in self.allowed:
            raise Refused(f"asks for {shorten(name)}, which is not among the names allowed in it; {SAVE_PLAIN}")
        return self.allowed[name]

    def persistent_load(self, persistent_id: Any) -> Any:
        """Returns the object that a persistent id refers to; here always `Refused`."""
        raise Refused(f"refers to something outside its pickle; {SAVE_PLAIN}")

    def set_state(self, target: Any, state: Any) -> None:
        """Sets attributes of an object (opcode BUILD); here always `Refused`."""
        raise Refused(f"sets the attributes of a {type(target).__name__}; {SAVE_PLAIN}")


def unpickle(data: mmap.mmap | bytes, allowed: AllowedGlobals) -> Any:
    """Executes the pickle and returns its value; `Refused` if it is damaged or holds anything but plain data.

    The most frequent opcodes are tested first. Reading past the end raises IndexError at the next opcode.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    pos = 2
    try:
        if data[0] != PROTO or not 2 <= data[1] <= 5:
            raise Refused(f"is not a pickle of protocol 2 to 5; {COPY_AGAIN}")
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
            elif op in LENGTH_PREFIXED:
                width, decode = LENGTH_PREFIXED[op]
                end = pos + width + int.from_bytes(data[pos : pos + width], "little")
                stack.append(decode(data[pos + width : end]))
                pos = end
            elif op == MARK:
                marks.append(len(stack))
            elif op == SETITEMS:
                start = marks.pop()
                dict.update(
                    stack[start - 1], zip(allowed.check_keys(stack[start::2]), stack[start + 1 :: 2], strict=True)
                )
                del stack[start:]
            elif op in EMPTY_CONTAINERS:
                stack.append(EMPTY_CONTAINERS[op]())
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
                dict.__setitem__(stack[-1], allowed.check_keys([key])[0], value)
            elif op == ADDITEMS:
                start = marks.pop()
                set.update(stack[start - 1], allowed.check_keys(stack[start:]))
                del stack[start:]
            elif op == FROZENSET:
                start = marks.pop()
                stack[start:] = [frozenset(allowed.check_keys(stack[start:]))]
            elif op == FRAME:
                pos += 8  # the frame's length, a hint for prefetching
            elif op == GLOBAL:
                middle = data.find(b"\n", pos)
                end = data.find(b"\n", middle + 1)
                if middle < 0 or end < 0:
                    raise IndexError("a name without an end")
                stack.append(allowed.find_global(_decode(data[pos:middle]), _decode(data[middle + 1 : end])))
                pos = end + 1
            elif op == STACK_GLOBAL:
                attribute, module = stack.pop(), stack.pop()
                stack.append(allowed.find_global(module, attribute))
            elif op in (REDUCE, NEWOBJ):
                args, called = stack.pop(), stack.pop()
                if type(called) is not AllowedCallable or type(args) is not tuple:
                    raise TypeError(f"a {type(called).__name__} is called")
                stack.append(called.function(*args))
            elif op == BUILD:
                state = stack.pop()
                allowed.set_state(stack[-1], state)
            elif op == BINPERSID:
                stack.append(allowed.persistent_load(stack.pop()))
            elif op == STOP:
                break
            else:
                raise Refused(f"uses opcode {_opcode_name(op)} at byte {pos - 1} of its pickle; {SAVE_PLAIN}")
        if len(stack) != 1 or marks or pos != len(data):
            raise Refused(f"ends too early, at byte {pos} of its pickle; {COPY_AGAIN}")
    except MALFORMED as error:
        problem = "is cut short" if pos >= len(data) else f"is damaged ({shorten(str(error))})"
        raise Refused(f"{problem} at byte {min(pos, len(data))} of its pickle; {COPY_AGAIN}") from None
    _check_plain(stack[0], PLAIN_TYPES | allowed.extra_types, max(MAX_OCCURRENCES, 10 * len(data)))
    return stack[0]


def _check_plain(root: Any, allowed_types: frozenset[type[Any]], budget: int) -> None:
    """Raises `Refused` if `root` holds a value that is not plain data, is nested too deeply or contains itself.

    A value is visited and counted in every place where it occurs, as it is by code that prints, compares or copies the
    data later; so a value that contains itself is nested without end.
    """
    level = [root]
    for _ in range(MAX_DEPTH + 1):
        next_level: list[Any] = []
        for value in level:
            type_ = type(value)
            if type_ not in allowed_types:
                name = value.name if type_ is AllowedCallable else type_.__name__
                raise Refused(f"holds {shorten(name)} itself as a value; {SAVE_PLAIN}")
            if type_ in CONTAINER_TYPES:
                budget -= len(value)
                if budget < 0:
                    raise Refused(f"repeats the same values in too many places; {SAVE_PLAIN}, each once")
                next_level += [
                    child for child in (value.values() if type_ is dict else value) if type(child) not in KEY_TYPES
                ]
        if not next_level:
            return
        level = next_level
    raise _too_deep()


def _too_deep() -> Refused:
    return Refused(f"nests values more than {MAX_DEPTH} deep; {SAVE_PLAIN}, less deep")


def _opcode_name(op: int) -> str:
    opcode = pickletools.code2op.get(chr(op))  # type: ignore[attr-defined]  # not in typeshed
    return opcode.name if opcode else f"{op:#04x}"
