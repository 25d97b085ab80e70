"""Published PyTorch files, read without torch and without `pickle`: data comes out, nothing in the file runs.

A `torch.save` file is an uncompressed zip. `NAME/data.pkl` pickles the structure; each storage, the flat memory behind
one or more tensors, is a member `NAME/data/KEY`. Our tensors are views of the mapped file: to open 40 GB costs nothing.

`unpickle` runs the pickle; all that it may name beyond plain data stands in `_TorchNames`. Memory stays within a
constant times the pickle and the zip's directory, both small, because whatever copies must `pay`.
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
    AGAIN,
    LEGACY_MAGIC,
    MALFORMED,
    SAVE_PLAIN,
    ZIP_MAGIC,
    Maker,
    Names,
    Path,
    Refused,
    map_file,
    refusals,
    shortened,
    unpickle,
)

MAX_DIRECTORY = 16 << 20  # bytes of what lists the members, 70 a tensor
MAX_TORCH_PICKLE = 4 << 20  # bytes of data.pkl: it holds no tensor, and 1 MB does for XXL with its optimizers
MAX_TENSORS = 100_000
MAX_ELEMENTS = 1 << 48  # along a dimension
MAX_DIMENSIONS = 64  # numpy's

SAVE_ZIP = "with PyTorch 1.13 or newer, `torch.save(torch.load(p, weights_only=True), p)` writes the form read here"
ZIP_AGAIN = "unzip it and zip it again with `zip -0`"

BAD_ZIP = (*MALFORMED, zipfile.BadZipFile, NotImplementedError, OSError)

LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, length of the name, length of torch's padding behind it
UTF8 = 0x800  # the flag that says how the name is written

DTYPES = {
    **{"Double": np.dtype("float64"), "Float": np.dtype("float32"), "Half": np.dtype("float16")},
    **{"BFloat16": np.dtype(ml_dtypes.bfloat16), "Bool": np.dtype("bool"), "Byte": np.dtype("uint8")},
    **{"Long": np.dtype("int64"), "Int": np.dtype("int32"), "Short": np.dtype("int16"), "Char": np.dtype("int8")},
}
NEWER_DTYPES = [np.dtype("uint16"), np.dtype("uint32"), np.dtype("uint64")]  # torch has no storage type for them
TORCH_DTYPES = {f"torch.{dtype.name}": dtype for dtype in [*DTYPES.values(), *NEWER_DTYPES]}

Members = dict[str, tuple[int, int]]  # name inside the archive's folder: start and size in the file


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote: plain Python, with tensors as read-only arrays that are views of the mapped file.

    Tensors that shared a storage share memory. A `Namespace` or any kind of dict is a dict, a dtype or device a string.
    """
    with refusals(path):
        file = map_file(path)
        if file[2:15] == LEGACY_MAGIC:
            raise Refused(f"was saved in the form before PyTorch 1.6; {SAVE_ZIP}")
        members = _open_archive(path, file)
        start, size = members["data.pkl"]
        if size > MAX_TORCH_PICKLE:
            raise Refused(f"its data.pkl has {size} bytes, more than {MAX_TORCH_PICKLE}; {SAVE_PLAIN}")
        names = _TorchNames(file, members, budget=size)
        try:
            return unpickle(file[start : start + size], names)
        finally:
            names.known.clear()  # they refer to `names`, and together they would keep the file mapped


class _Storage(NamedTuple):
    start: int
    size: int  # bytes
    dtype: np.dtype[Any]


def _open_archive(path: Path, file: mmap.mmap) -> Members:
    """Where each member's bytes are: stored as they are, each name once, each byte in one member at most."""
    infos, directory = _listed(path, file)
    folders = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
    if len(folders) != 1:
        raise Refused(f"is a zip file with {len(folders)} data.pkl, not one as torch.save writes; {SAVE_ZIP}")
    if any(info.filename.startswith((f"{folders[0]}constants.pkl", f"{folders[0]}code/")) for info in infos):
        raise Refused("is a TorchScript program; save the model's state_dict with torch.save instead")
    members: Members = {}
    spans = [(directory, directory, "")]
    file.madvise(mmap.MADV_RANDOM)  # of the headers a page each, not the megabytes behind it too
    starts = [_data_start(file, info) for info in infos]
    file.madvise(mmap.MADV_NORMAL)
    for info, start in zip(infos, starts, strict=True):
        name, size = info.filename.removeprefix(folders[0]), info.file_size
        if not info.filename.startswith(folders[0]):
            raise Refused(f"member {shortened(name)} is outside of {shortened(folders[0])}; {ZIP_AGAIN} without it")
        if name in members:
            raise Refused(f"has two members {shortened(name)}; {AGAIN}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != size or info.flag_bits & 1:
            raise Refused(f"member {shortened(name)} is compressed or encrypted; {ZIP_AGAIN}")
        members[name] = start, size
        spans.append((info.header_offset, start + size, name))
    for (_, end, name), (following, _, _) in itertools.pairwise(sorted(spans)):
        if end > following:
            raise Refused(f"member {shortened(name)} reaches into what follows it; {AGAIN}")
    start, size = members.get("byteorder", (0, 0))
    if size and file[start : start + min(size, 10)] != b"little":
        raise Refused("was not saved on a little-endian machine; save it again on one")
    return members


class _Directory(io.FileIO):
    """The file as `zipfile` reads it: no more of it at once than a list of members takes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY:
            raise Refused(f"lists its members in {size} bytes, more than {MAX_DIRECTORY}; {SAVE_ZIP}")
        return super().read(size)


def _listed(path: Path, file: mmap.mmap) -> tuple[list[zipfile.ZipInfo], int]:
    """The members as the directory lists them, and where it starts."""
    try:
        with _Directory(path) as directory, zipfile.ZipFile(directory) as archive:
            return archive.infolist(), archive.start_dir
    except BAD_ZIP as error:
        if file[:4] != ZIP_MAGIC:
            raise Refused(f"is not a file that torch.save wrote as a zip; {SAVE_ZIP}") from None
        raise Refused(f"is a zip file cut short or damaged ({shortened(str(error))}); {AGAIN}") from None


def _data_start(file: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """A member's bytes begin behind its local header, which gives its name again and says how long it is itself."""
    header = info.header_offset
    if 0 <= header <= len(file) - LOCAL_HEADER.size:
        magic, width, padding = LOCAL_HEADER.unpack_from(file, header)
        start = header + LOCAL_HEADER.size + int(width)
        name = file[start - width : start].decode("utf-8" if info.flag_bits & UTF8 else "cp437", "replace")
        if (magic, name) == (ZIP_MAGIC, info.orig_filename):
            return start + int(padding)
    raise Refused(f"member {shortened(info.filename)} is not where the zip directory says; {AGAIN}")


class _TorchNames(Names):
    """All that the pickle of a torch.save file may name, and what each becomes."""

    kinds = frozenset({np.ndarray})

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
            "builtins.set": lambda items: set(self.keys(self.pay(items, list))),
            "builtins.frozenset": lambda items: frozenset(self.keys(self.pay(items, list))),
            "builtins.bytes": lambda: b"",
            "_codecs.encode": self.encode,
            "torch.Size": lambda sizes: self.pay(sizes, tuple),
            "torch.device": self.device,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor,
            "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
        }
        self.known = {name: Maker(name, make) for name, make in makers.items()}
        self.known |= {f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()}
        self.known |= {"torch.storage.UntypedStorage": np.dtype("uint8")}
        self.known |= {name: name for name in [*TORCH_DTYPES, "builtins.dict", "builtins.list", "builtins.int"]}

    def pay(self, values: Any, kind: type[Any]) -> Any:
        """What an honest pickle has us copy is spelled out in it once: all copies together are shorter than it is."""
        if type(values) is not kind:
            raise TypeError(f"a {type(values).__name__} comes where a {kind.__name__} should")
        self.budget -= len(values)
        if self.budget < 0:
            raise Refused(f"makes copy after copy of the same values; {SAVE_PLAIN}")
        return values

    def namespace(self) -> dict[str, Any]:
        value: dict[str, Any] = {}
        self.namespaces[id(value)] = value
        return value

    def set_state(self, target: Any, state: Any) -> None:
        if id(target) in self.namespaces:
            self.keys(list(self.pay(state, dict)))
            target.update(state)
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
        if not 0 <= count <= MAX_ELEMENTS:
            raise ValueError("a storage of impossible size")
        if count != size // dtype.itemsize:
            found = f"{size} bytes" if size >= 0 else "no bytes"
            raise Refused(f"has {found} for storage {shortened(key)} of {count} {dtype} values; {AGAIN}")
        return _Storage(start, size, dtype)

    def tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: Any = None
    ) -> np.ndarray:
        """`torch.as_strided` on the mapped file: the last element that it can reach must be in its storage."""
        self.tensors += 1
        if self.tensors > MAX_TENSORS:
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
        elif type(dtype) is dict:  # what else may be told of a tensor: that its values are to be negated
            raise Refused("has a tensor with a mark on it; save it as `.resolve_neg()`")
        else:
            raise TypeError("a tensor of unknown dtype")
        if not all(shape):
            return np.ndarray(shape, dtype, self.file)
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if (last + 1) * dtype.itemsize > storage.size:
            found = f"its storage of {storage.size} bytes"
            raise Refused(f"has a tensor of shape {shortened(shape)}, too large for {found}; {AGAIN}")
        if math.prod(shape) * dtype.itemsize > len(self.file):
            remedy = "save it as `.contiguous()`"
            raise Refused(f"has a tensor of shape {shortened(shape)} that repeats a few values; {remedy}")
        start = storage.start + offset * dtype.itemsize
        return np.ndarray(shape, dtype, self.file, start, tuple(stride * dtype.itemsize for stride in strides))
