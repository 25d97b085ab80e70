"""Files of PyTorch and pickle composed by hand, opcode by opcode: torch is not here, and honest tools write no lies."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # what a torch file older than 1.6 starts with


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def name(dotted: str) -> bytes:
    return b"c" + "\n".join(dotted.rsplit(".", 1)).encode() + b"\n"


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + tuple_of(*args) + b"R"


def storage(kind: str, key: str, count: int) -> bytes:
    return tuple_of(text("storage"), name(f"torch.{kind}"), text(key), text("cpu"), number(count)) + b"Q"


def tensor(of: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *more: bytes, v: int = 2) -> bytes:
    sizes = (number(offset), tuple_of(*map(number, shape)), tuple_of(*map(number, strides)))
    return call(f"torch._utils._rebuild_tensor_v{v}", of, *sizes, b"\x89", call("collections.OrderedDict"), *more)


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write(path: Path, body: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """A torch.save file: `body` computes its value, `_0=...` is storage 0, other keywords are members by name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", program(body))
        archive.writestr("model/version", b"3\n")
        for member, content in members.items():
            archive.writestr("model/" + (f"data{member}".replace("_", "/") if member[0] == "_" else member), content)
    return path


def refusal(load, path: Path) -> str:
    """The one line that refuses a file: it starts with the path and ends with a remedy."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "; " in message
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def save(path: Path, tree: dict[str, np.ndarray | int | dict[str, np.ndarray]] | np.ndarray) -> Path:
    """What `torch.save` writes of a tensor, or of a dict of tensors, of numbers and of such dicts."""
    members: dict[str, bytes] = {}

    def compose(value: np.ndarray | int | dict) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(text(key) + compose(inner) for key, inner in value.items()) + b"u"
        if isinstance(value, int):
            return number(value)
        kind, key = {"f": "Half" if value.itemsize == 2 else "Float", "i": "Long"}[value.dtype.kind], str(len(members))
        array = np.ascontiguousarray(value)
        members[f"_{key}"] = array.tobytes()
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return tensor(storage(f"{kind}Storage", key, array.size), 0, array.shape, strides)

    body = compose(tree)
    return write(path, body, **members)
