"""Published PyTorch files, read without torch and without `pickle`: data comes out, nothing in the file runs.

A `torch.save` file is an uncompressed zip. `NAME/data.pkl` pickles the structure; each storage, the flat memory behind
one or more tensors, is a member `NAME/data/KEY`. Our tensors are views of the mapped file: to open 40 GB costs nothing.

A pickle is a small program. `_unpickle` runs it and knows plain data only; what else a program may name stands in
`_TorchNames`. Memory stays within a constant times the file: an opcode adds at most one object, memo numbers come in
order, a count past the end yields what is there, and whatever copies must `pay`.
"""

import contextlib
import dataclasses
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from atlas_jax.errors import UserError

Path = str | os.PathLike[str]

MAX_TORCH_PICKLE = 16 << 20  # bytes of data.pkl: it holds no tensor, and 1 MB does for XXL with its optimizers
MAX_PLAIN_PICKLE = 64 << 30  # bytes of one passages file
MAX_DEPTH = 100  # containers inside containers
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 48  # along a dimension
MAX_DIMENSIONS = 64  # numpy's

AGAIN = "copy or download it again"
SAVE_ZIP = "with PyTorch 1.6 or newer, `torch.save(torch.load(p), p)` writes the form read here"
SAVE_PLAIN = "save it again with only tensors and plain values in it"

# What a damaged file raises in the code below: one `except` instead of a test before every access.
MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, EOFError, struct.error)
BAD_ZIP = (*MALFORMED, zipfile.BadZipFile, NotImplementedError)


class _Refused(Exception):
    """What is wrong, and the remedy; `_named` adds the file."""


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote: plain Python, with tensors as read-only arrays that are views of the mapped file.

    Tensors that shared a storage share memory. A `Namespace` or any kind of dict is a dict, a dtype or device a string.
    """
    with _named(path):
        file = _map(path)
        if file[2:15] == LEGACY_MAGIC:
            raise _Refused(f"was saved in the form before PyTorch 1.6; {SAVE_ZIP}")
        members = _open_archive(path, file)
        start, size = members["data.pkl"]
        if size > MAX_TORCH_PICKLE:
            raise _Refused(f"its data.pkl has {size} bytes, more than {MAX_TORCH_PICKLE}; {SAVE_PLAIN}")
        return _unpickle(file[start : start + size], _TorchNames(file, members, budget=size))


def load_pickle(path: Path) -> Any:
    """What `pickle.dump` wrote with protocol 2 to 5: plain Python; a class or function in it is refused by name."""
    with _named(path):
        file = _map(path)
        if file[:4] == ZIP_MAGIC or file[2:15] == LEGACY_MAGIC:
            raise _Refused("was written by torch.save, not by pickle.dump; give the file that holds the passages")
        if len(file) > MAX_PLAIN_PICKLE:
            raise _Refused(f"has {len(file)} bytes, more than {MAX_PLAIN_PICKLE}; split it")
        return _unpickle(file, _Names())


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn a refusal into the one line a person reads."""
    try:
        yield
    except _Refused as refused:
        raise UserError(f"{os.fspath(path)}: {refused}") from None
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: {error.strerror or error}; give a file that can be read") from None


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise _Refused(f"is empty; {AGAIN}")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "...")


# -- The pickle program ------------------------------------------------------------------------------------------------

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

KEYS = frozenset({str, int, float, bool, bytes, type(None)})  # a nested tuple could take forever to hash
NESTED = frozenset({list, tuple, dict, set, frozenset})
PLAIN = KEYS | NESTED | {bytearray, np.ndarray}


@dataclasses.dataclass(frozen=True)
class _Maker:
    """A class or function that a pickle may call, and what is done in its place."""

    name: str
    make: Callable[..., Any]


class _Names:
    """What a plain pickle may name beyond plain data: nothing."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def find(self, module: Any, attribute: Any) -> Any:
        if type(module) is not str or type(attribute) is not str:
            raise TypeError("a name is made of two strings")
        name = f"{module}.{attribute}".replace("__builtin__.", "builtins.", 1)
        if name not in self.known:
            raise _Refused(f"asks for {_short(name)}, which is not among the names allowed in it; {SAVE_PLAIN}")
        return self.known[name]

    def load(self, reference: Any) -> Any:
        raise _Refused(f"refers to something outside its pickle; {SAVE_PLAIN}")

    def set_state(self, target: Any, state: Any) -> None:
        raise _Refused(f"sets the attributes of a {type(target).__name__}; {SAVE_PLAIN}")


def _unpickle(data: mmap.mmap | bytes, names: _Names) -> Any:
    """Run the program. The commonest opcodes stand first; a read past the end is an IndexError at the next opcode."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    pos = 2
    try:
        if data[0] != PROTO or not 2 <= data[1] <= 5:
            raise _Refused(f"is not a pickle of protocol 2 to 5; {AGAIN}")
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
                if len(marks) > MAX_DEPTH:
                    raise _too_deep()
            elif op == SETITEMS:
                start = marks.pop()
                dict.update(stack[start - 1], zip(_keys(stack[start::2]), stack[start + 1 :: 2], strict=True))
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
                dict.__setitem__(stack[-1], _keys([key])[0], value)
            elif op == ADDITEMS:
                start = marks.pop()
                set.update(stack[start - 1], _keys(stack[start:]))
                del stack[start:]
            elif op == FROZENSET:
                start = marks.pop()
                stack[start:] = [frozenset(_keys(stack[start:]))]
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
                if type(maker) is not _Maker or type(args) is not tuple:
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
                raise _Refused(f"uses opcode {_opcode(op)} at byte {pos - 1} of its pickle; {SAVE_PLAIN}")
        if len(stack) != 1 or marks or pos != len(data):
            raise _Refused(f"ends too early, at byte {pos} of its pickle; {AGAIN}")
    except MALFORMED as error:
        problem = "is cut short" if pos >= len(data) else f"is damaged ({_short(str(error))})"
        raise _Refused(f"{problem} at byte {min(pos, len(data))} of its pickle; {AGAIN}") from None
    _check_plain(stack[0])
    return stack[0]


def _keys(values: list[Any]) -> list[Any]:
    """The same values, which may be the keys of a dict or the members of a set."""
    if KEYS.issuperset(map(type, values)):
        return values
    bad = next(type(value).__name__ for value in values if type(value) not in KEYS)
    raise _Refused(f"has a {bad} as the key of a dict or in a set; save it again with strings or numbers there")


def _check_plain(root: Any) -> None:
    """Refuse what is not plain data, nested too deeply or, which is nesting without end, part of itself."""
    level = {id(root): root}
    for _ in range(MAX_DEPTH + 1):
        below: dict[int, Any] = {}
        for value in level.values():
            kind = type(value)
            if kind not in PLAIN:
                name = value.name if kind is _Maker else kind.__name__
                raise _Refused(f"holds {_short(name)} itself as a value; {SAVE_PLAIN}")
            if kind in NESTED:
                children = value.values() if kind is dict else value
                below.update((id(child), child) for child in children if type(child) not in KEYS)
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> _Refused:
    return _Refused(f"nests values more than {MAX_DEPTH} deep; {SAVE_PLAIN}, less deep")


def _opcode(op: int) -> str:
    known = pickletools.code2op.get(chr(op))  # type: ignore[attr-defined]  # not in typeshed
    return known.name if known else f"{op:#04x}"


# -- The torch archive -------------------------------------------------------------------------------------------------

LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # the number pickled at the start of a file before 1.6
ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, length of the name, length of torch's padding behind it

DTYPES = {
    **{"Double": np.dtype("float64"), "Float": np.dtype("float32"), "Half": np.dtype("float16")},
    **{"BFloat16": np.dtype(ml_dtypes.bfloat16), "Bool": np.dtype("bool"), "Byte": np.dtype("uint8")},
    **{"Long": np.dtype("int64"), "Int": np.dtype("int32"), "Short": np.dtype("int16"), "Char": np.dtype("int8")},
}
NEWER_DTYPES = [np.dtype("uint16"), np.dtype("uint32"), np.dtype("uint64")]  # torch has no storage type for them
TORCH_DTYPES = {f"torch.{dtype.name}": dtype for dtype in [*DTYPES.values(), *NEWER_DTYPES]}

Members = dict[str, tuple[int, int]]  # name inside the archive's folder: start and size in the file


class _Storage(NamedTuple):
    start: int
    size: int  # bytes
    dtype: np.dtype[Any]


def _open_archive(path: Path, file: mmap.mmap) -> Members:
    """Where each member's bytes are: stored as they are, inside the file, each name once."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except BAD_ZIP as error:
        if file[:4] != ZIP_MAGIC:
            raise _Refused(f"is not a file that torch.save wrote as a zip; {SAVE_ZIP}") from None
        raise _Refused(f"is a zip file cut short or damaged ({_short(str(error))}); {AGAIN}") from None
    folders = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
    if len(folders) != 1:
        raise _Refused(f"is a zip file with {len(folders)} data.pkl, not one as torch.save writes; {SAVE_ZIP}")
    if any(info.filename.startswith((f"{folders[0]}constants.pkl", f"{folders[0]}code/")) for info in infos):
        raise _Refused("is a TorchScript program; save the model's state_dict with torch.save instead")
    members: Members = {}
    for info in infos:
        name = info.filename.removeprefix(folders[0])
        start, size = _data_start(file, info), info.file_size
        if name in members:
            raise _Refused(f"has two members {_short(name)}; {AGAIN}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != size or info.flag_bits & 1:
            raise _Refused(f"member {_short(name)} is compressed or encrypted; unzip it and zip it again with `zip -0`")
        if start + size > len(file):
            raise _Refused(f"member {_short(name)} reaches past the end of the file; {AGAIN}")
        members[name] = start, size
    start, size = members.get("byteorder", (0, 0))
    if size and file[start : start + size] != b"little":
        raise _Refused("was not saved on a little-endian machine; save it again on one")
    return members


def _data_start(file: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """A member's bytes begin behind its local header, which says how long it is itself."""
    header = info.header_offset
    if 0 <= header <= len(file) - LOCAL_HEADER.size:
        magic, name, padding = LOCAL_HEADER.unpack_from(file, header)
        if magic == ZIP_MAGIC:
            return header + LOCAL_HEADER.size + int(name) + int(padding)
    raise _Refused(f"member {_short(info.filename)} is not where the zip directory says; {AGAIN}")


class _TorchNames(_Names):
    """All that the pickle of a torch.save file may name, and what each becomes."""

    def __init__(self, file: mmap.mmap, members: Members, budget: int):
        super().__init__()
        self.file, self.members = file, members
        self.budget = budget  # values that may still be copied
        self.tensors = 0
        self.namespaces: dict[int, dict[str, Any]] = {}  # by id: the dicts that stand for a Namespace
        makers: dict[str, Callable[..., Any]] = {
            "argparse.Namespace": self.namespace,
            "collections.OrderedDict": lambda: {},
            "collections.defaultdict": lambda factory=None: {},
            "builtins.set": lambda items: set(_keys(self.pay(items, list))),
            "builtins.frozenset": lambda items: frozenset(_keys(self.pay(items, list))),
            "builtins.bytes": lambda: b"",
            "_codecs.encode": self.encode,
            "torch.Size": lambda sizes: self.pay(sizes, tuple),
            "torch.device": self.device,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
        }
        self.known = {name: _Maker(name, make) for name, make in makers.items()}
        self.known |= {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
        self.known |= {"torch.storage.UntypedStorage": np.dtype("uint8")}
        self.known |= {name: name for name in [*TORCH_DTYPES, "builtins.dict", "builtins.list", "builtins.int"]}

    def pay(self, values: Any, kind: type[Any]) -> Any:
        """What an honest pickle has us copy is spelled out in it once: all copies together are shorter than it is."""
        if type(values) is not kind:
            raise TypeError(f"a {type(values).__name__} comes where a {kind.__name__} should")
        self.budget -= len(values)
        if self.budget < 0:
            raise _Refused(f"makes copy after copy of the same values; {SAVE_PLAIN}")
        return values

    def namespace(self) -> dict[str, Any]:
        value: dict[str, Any] = {}
        self.namespaces[id(value)] = value
        return value

    def set_state(self, target: Any, state: Any) -> None:
        if id(target) in self.namespaces:
            target.update(self.pay(state, dict))
        elif type(target) is not dict:  # an OrderedDict's attributes (`_metadata`) say nothing about the weights
            super().set_state(target, state)

    def encode(self, text: Any, encoding: Any) -> Any:
        """How protocol 2 writes bytes."""
        if encoding != "latin1":
            raise ValueError("bytes not written as latin1")
        return self.pay(text, str).encode("latin1")

    def device(self, kind: Any, index: Any = None) -> str:
        return f"{self.pay(kind, str)}" if index is None else f"{self.pay(kind, str)}:{index:d}"

    def load(self, reference: Any) -> _Storage:
        """The storage for ("storage", type, key, device, number of elements)."""
        match reference:
            case (str(kind), np.dtype() as dtype, str(key), str(), int(count)) if kind == "storage":
                start, size = self.members.get(f"data/{key}", (0, -1))
            case _:
                raise TypeError("a reference that is not to a storage")
        if count != size // dtype.itemsize:
            found = f"{size} bytes" if size >= 0 else "no bytes"
            raise _Refused(f"has {found} for storage {_short(key)} of {count} {dtype} values; {AGAIN}")
        return _Storage(start, size, dtype)

    def tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any = None
    ) -> np.ndarray:
        """`torch.as_strided` on the mapped file: the last element that it can reach must be in its storage."""
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
            raise _Refused(f"has more than {MAX_TENSORS} tensors; split it")
        if [type(storage), type(shape), type(strides)] != [_Storage, tuple, tuple]:
            raise TypeError("a tensor without storage, shape and strides")
        if not len(shape) == len(strides) <= MAX_DIMENSIONS:
            raise ValueError("a tensor with more dimensions than strides, or too many")
        if any(type(n) is not int or not 0 <= n <= MAX_ELEMENTS for n in (offset, *shape, *strides)):
            raise ValueError("a tensor with an impossible offset, shape or stride")
        if type(dtype) is str:
            dtype = TORCH_DTYPES[dtype]
        elif dtype is None:
            dtype = storage.dtype
        else:
            raise TypeError("a tensor of unknown dtype")
        if not all(shape):
            return np.ndarray(shape, dtype, self.file)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.size:
            raise _Refused(f"has a tensor of shape {shape}, too large for its storage of {storage.size} bytes; {AGAIN}")
        if math.prod(shape) * dtype.itemsize > len(self.file):
            raise _Refused(f"has a tensor of shape {shape} that repeats a few values; save it as `.contiguous()`")
        start = storage.start + offset * dtype.itemsize
        return np.ndarray(shape, dtype, self.file, start, tuple(stride * dtype.itemsize for stride in strides))
