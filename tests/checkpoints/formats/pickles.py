"""Composes torch.save and pickle files opcode by opcode: torch is not installed, and it writes no invalid files."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.errors import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # the number that starts a file of PyTorch < 1.6


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


def tensor(
    storage_id: bytes,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *extra_arguments: bytes,
    v: int = 2,
) -> bytes:
    sizes = (number(offset), tuple_of(*map(number, shape)), tuple_of(*map(number, strides)))
    return call(
        f"torch._utils._rebuild_tensor_v{v}",
        storage_id,
        *sizes,
        b"\x89",
        call("collections.OrderedDict"),
        *extra_arguments,
    )


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write(path: Path, body: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """Writes a torch.save file: `body` are its opcodes, `_0=...` is storage 0, other keywords are members by name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("model/data.pkl", program(body))
        archive.writestr("model/version", b"3\n")
        for member, content in members.items():
            archive.writestr("model/" + (f"data{member}".replace("_", "/") if member[0] == "_" else member), content)
    return path


def refusal(load, path: Path) -> str:
    """Returns the one-line message with which `load` refuses a file, after checking that it has a path and a remedy."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "; " in message
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def save(path: Path, tree: dict[str, np.ndarray | int | dict[str, np.ndarray]] | np.ndarray) -> Path:
    """Writes what `torch.save` writes for a tensor, or for a dict of tensors, integers and such dicts."""
    members: dict[str, bytes] = {}

    def encode(value: np.ndarray | int | dict) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(text(key) + encode(item) for key, item in value.items()) + b"u"
        if isinstance(value, int):
            return number(value)
        kind, key = {"f": "Half" if value.itemsize == 2 else "Float", "i": "Long"}[value.dtype.kind], str(len(members))
        array = np.ascontiguousarray(value)
        members[f"_{key}"] = array.tobytes()
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return tensor(storage(f"{kind}Storage", key, array.size), 0, array.shape, strides)

    body = encode(tree)
    return write(path, body, **members)
