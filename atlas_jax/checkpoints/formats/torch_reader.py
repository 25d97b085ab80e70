"""Reads `torch.save` files without torch and without `pickle`: returns data and never runs anything in the file.

A `torch.save` file is an uncompressed zip. `NAME/data.pkl` pickles the structure; each storage, the flat buffer behind
one or more tensors, is a member `NAME/data/KEY`. Tensors are views of the mapped file, so opening 40 GB costs nothing.

`unpickle` executes the pickle; `_TorchGlobals` has all that it may use besides plain data. Memory is bounded by a
constant times the pickle and the zip's directory, both small, because `charge_copy` charges every copy to a budget.
"""

import io
import itertools
import math
import mmap
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from atlas_jax.checkpoints.formats.safe_pickle import (
    COPY_AGAIN,
    LEGACY_MAGIC,
    MALFORMED,
    SAVE_PLAIN,
    ZIP_MAGIC,
    AllowedCallable,
    AllowedGlobals,
    Refused,
    StrPath,
    map_file,
    shorten,
    unpickle,
    user_errors,
)

MAX_DIRECTORY = 16 << 20  # bytes of the zip's directory, which has about 70 per tensor
MAX_TORCH_PICKLE = 4 << 20  # bytes of data.pkl: it holds no tensor values, and XXL with its optimizers needs 1 MB
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 48  # of a dimension, stride, offset or storage
MAX_DIMENSIONS = 64  # NumPy's limit

SAVE_ZIP = "with PyTorch 1.13 or newer, `torch.save(torch.load(p, weights_only=True), p)` writes the form read here"
ZIP_AGAIN = "unzip it and zip it again with `zip -0`"

BAD_ZIP = (*MALFORMED, zipfile.BadZipFile, NotImplementedError, OSError)

LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, length of the name, length of torch's padding after the name
UTF8_NAME = 0x800  # flag: the name is encoded as UTF-8, not CP437

DTYPES = {
    **{"Double": np.dtype("float64"), "Float": np.dtype("float32"), "Half": np.dtype("float16")},
    **{"BFloat16": np.dtype(ml_dtypes.bfloat16), "Bool": np.dtype("bool"), "Byte": np.dtype("uint8")},
    **{"Long": np.dtype("int64"), "Int": np.dtype("int32"), "Short": np.dtype("int16"), "Char": np.dtype("int8")},
}
NEWER_DTYPES = [np.dtype("uint16"), np.dtype("uint32"), np.dtype("uint64")]  # torch has no storage type for them
TORCH_DTYPES = {f"torch.{dtype.name}": dtype for dtype in [*DTYPES.values(), *NEWER_DTYPES]}

Members = dict[str, tuple[int, int]]  # name inside the archive's folder -> (start, size) in bytes of the file


def load_torch(path: StrPath) -> Any:
    """Returns what `torch.save` wrote as plain Python, with tensors as read-only arrays that view the mapped file.

    Tensors that shared a storage share memory. A `Namespace` or any kind of dict is a dict, a dtype or device a string.
    UserError if the file cannot be read, is damaged or holds anything else.
    """
    with user_errors(path):
        file = map_file(path)
        if file[2:15] == LEGACY_MAGIC:
            raise Refused(f"was saved in the form before PyTorch 1.6; {SAVE_ZIP}")
        members = _open_archive(path, file)
        start, size = members["data.pkl"]
        if size > MAX_TORCH_PICKLE:
            raise Refused(f"its data.pkl has {size} bytes, more than {MAX_TORCH_PICKLE}; {SAVE_PLAIN}")
        torch_globals = _TorchGlobals(file, members, budget=size)
        try:
            return unpickle(file[start : start + size], torch_globals)
        finally:
            torch_globals.allowed.clear()  # breaks a reference cycle, which would keep the file mapped


class _Storage(NamedTuple):
    """Where the bytes of a storage are in the file, and the dtype of its elements."""

    start: int
    size: int  # bytes
    dtype: np.dtype[Any]


def _open_archive(path: StrPath, file: mmap.mmap) -> Members:
    """Returns where each member's bytes are; `Refused` if members are compressed, share a name or overlap."""
    infos, directory = _list_members(path, file)
    folders = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
    if len(folders) != 1:
        raise Refused(f"is a zip file with {len(folders)} data.pkl, not one as torch.save writes; {SAVE_ZIP}")
    if any(info.filename.startswith((f"{folders[0]}constants.pkl", f"{folders[0]}code/")) for info in infos):
        raise Refused("is a TorchScript program; save the model's state_dict with torch.save instead")
    members: Members = {}
    spans = [(directory, directory, "")]
    file.madvise(mmap.MADV_RANDOM)  # read one page for each header, without prefetching the megabytes after it
    starts = [_data_start(file, info) for info in infos]
    file.madvise(mmap.MADV_NORMAL)
    for info, start in zip(infos, starts, strict=True):
        name, size = info.filename.removeprefix(folders[0]), info.file_size
        if not info.filename.startswith(folders[0]):
            raise Refused(f"member {shorten(name)} is outside of {shorten(folders[0])}; {ZIP_AGAIN} without it")
        if name in members:
            raise Refused(f"has two members {shorten(name)}; {COPY_AGAIN}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != size or info.flag_bits & 1:
            raise Refused(f"member {shorten(name)} is compressed or encrypted; {ZIP_AGAIN}")
        members[name] = start, size
        spans.append((info.header_offset, start + size, name))
    for (_, end, name), (next_start, _, _) in itertools.pairwise(sorted(spans)):
        if end > next_start:
            raise Refused(f"member {shorten(name)} reaches into what follows it; {COPY_AGAIN}")
    start, size = members.get("byteorder", (0, 0))
    if size and file[start : start + min(size, 10)] != b"little":
        raise Refused("was not saved on a little-endian machine; save it again on one")
    return members


class _DirectoryReader(io.FileIO):
    """The file as `zipfile` reads it; `Refused` at a read of more than MAX_DIRECTORY bytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise Refused(f"lists its members in {size} bytes, more than {MAX_DIRECTORY}; {SAVE_ZIP}")
        return super().read(size)


def _list_members(path: StrPath, file: mmap.mmap) -> tuple[list[zipfile.ZipInfo], int]:
    """Returns the members that the zip's directory lists, and the offset at which the directory starts."""
    try:
        with _DirectoryReader(path) as directory, zipfile.ZipFile(directory) as archive:
            return archive.infolist(), archive.start_dir
    except BAD_ZIP as error:
        if file[:4] != ZIP_MAGIC:
            raise Refused(f"is not a file that torch.save wrote as a zip; {SAVE_ZIP}") from None
        raise Refused(f"is a zip file cut short or damaged ({shorten(str(error))}); {COPY_AGAIN}") from None


def _data_start(file: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Returns the offset of a member's bytes, after its local header; `Refused` if that header has another name."""
    header = info.header_offset
    if 0 <= header <= len(file) - LOCAL_HEADER.size:
        magic, name_size, padding = LOCAL_HEADER.unpack_from(file, header)
        start = header + LOCAL_HEADER.size + int(name_size)
        name = file[start - name_size : start].decode("utf-8" if info.flag_bits & UTF8_NAME else "cp437", "replace")
        if (magic, name) == (ZIP_MAGIC, info.orig_filename):
            return start + int(padding)
    raise Refused(f"member {shorten(info.filename)} is not where the zip directory says; {COPY_AGAIN}")


class _TorchGlobals(AllowedGlobals):
    """All globals that the pickle of a torch.save file may use, and the function or value that replaces each."""

    extra_types = frozenset({np.ndarray})

    def __init__(self, file: mmap.mmap, members: Members, budget: int):
        super().__init__()
        self.file, self.members = file, members
        self.budget = budget  # number of values that may still be copied
        self.tensor_count = 0
        self.namespaces: dict[int, dict[str, Any]] = {}  # by id: the dicts that replace `argparse.Namespace` objects
        functions: dict[str, Callable[..., Any]] = {
            "argparse.Namespace": self.namespace,
            "collections.OrderedDict": lambda: {},
            "collections.defaultdict": lambda factory=None: {},
            "builtins.set": lambda items: set(self.check_keys(self.charge_copy(items, list))),
            "builtins.frozenset": lambda items: frozenset(self.check_keys(self.charge_copy(items, list))),
            "builtins.bytes": lambda: b"",
            "_codecs.encode": self.encode,
            "torch.Size": lambda sizes: self.charge_copy(sizes, tuple),
            "torch.device": self.device,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
        }
        self.allowed = {name: AllowedCallable(name, function) for name, function in functions.items()}
        self.allowed |= {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
        self.allowed |= {"torch.storage.UntypedStorage": np.dtype("uint8")}
        self.allowed |= {name: name for name in [*TORCH_DTYPES, "builtins.dict", "builtins.list", "builtins.int"]}

    def charge_copy(self, values: Any, type_: type[Any]) -> Any:
        """Returns `values`, after charging their number to the budget; `Refused` if that is spent.

        The budget is the size of the pickle: a valid pickle spells out each value that it copies, so its copies
        together have fewer values than it has bytes.
        """
        if type(values) is not type_:
            raise TypeError(f"a {type(values).__name__} comes where a {type_.__name__} should")
        self.budget -= len(values)
        if self.budget < 0:
            raise Refused(f"makes copy after copy of the same values; {SAVE_PLAIN}")
        return values

    def namespace(self) -> dict[str, Any]:
        """Returns a new dict in place of an `argparse.Namespace`; only such dicts take a state."""
        value: dict[str, Any] = {}
        self.namespaces[id(value)] = value
        return value

    def set_state(self, target: Any, state: Any) -> None:
        if id(target) in self.namespaces:
            self.check_keys(list(self.charge_copy(state, dict)))
            target.update(state)
        elif (
            type(target) is not dict
        ):  # ignores an OrderedDict's attributes (`_metadata`), which say nothing of weights
            super().set_state(target, state)

    def encode(self, text: Any, encoding: Any) -> Any:
        """Replaces `_codecs.encode`, with which protocol 2 writes bytes."""
        if encoding != "latin1":
            raise ValueError("bytes not written as latin1")
        return self.charge_copy(text, str).encode("latin1")

    def device(self, type_: Any, index: Any = None) -> str:
        return f"{self.charge_copy(type_, str)}" if index is None else f"{self.charge_copy(type_, str)}:{index:d}"

    def persistent_load(self, persistent_id: Any) -> _Storage:
        """Returns the storage for the persistent id ("storage", type, key, device, number of elements)."""
        match persistent_id:
            case (str(tag), np.dtype() as dtype, str(key), str(), int(count)) if tag == "storage":
                start, size = self.members.get(f"data/{key}", (0, -1))
            case _:
                raise TypeError("a reference that is not to a storage")
        if not 0 <= count <= MAX_ELEMENTS:
            raise ValueError("a storage of impossible size")
        if count != size // dtype.itemsize:
            available = f"{size} bytes" if size >= 0 else "no bytes"
            raise Refused(f"has {available} for storage {shorten(key)} of {count} {dtype} values; {COPY_AGAIN}")
        return _Storage(start, size, dtype)

    def tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any = None
    ) -> np.ndarray:
        """Returns `torch.as_strided` of the mapped file; `Refused` if the last element is outside of the storage."""
        self.tensor_count += 1
        if self.tensor_count > MAX_TENSORS:
            raise Refused(f"has more than {MAX_TENSORS} tensors; split it")
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
        elif type(dtype) is dict:  # metadata of v2: flags, such as that the values are to be negated
            raise Refused("has a tensor with a mark on it; save it as `.resolve_neg()`")
        else:
            raise TypeError("a tensor of unknown dtype")
        if not all(shape):
            return np.ndarray(shape, dtype, self.file)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.size:
            available = f"its storage of {storage.size} bytes"
            raise Refused(f"has a tensor of shape {shorten(shape)}, too large for {available}; {COPY_AGAIN}")
        if math.prod(shape) * dtype.itemsize > len(self.file):
            remedy = "save it as `.contiguous()`"
            raise Refused(f"has a tensor of shape {shorten(shape)} that repeats a few values; {remedy}")
        start = storage.start + offset * dtype.itemsize
        return np.ndarray(shape, dtype, self.file, start, tuple(stride * dtype.itemsize for stride in strides))
