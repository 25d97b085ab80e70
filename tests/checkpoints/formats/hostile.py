"""Hostile files, composed by rules or mutated from valid ones, reproducible from a `Random`."""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.checkpoints.formats.pickles import call, name, number, program, storage, tensor, text, tuple_of

GOLDEN = Path(__file__).parents[2] / "golden"


# -- Composed pickles --------------------------------------------------------------------------------------------------

HARMLESS = [
    *("argparse.Namespace", "collections.OrderedDict", "collections.defaultdict", "__builtin__.set", "torch.Size"),
    *("torch.device", "torch.bfloat16", "torch.FloatStorage", "torch._utils._rebuild_parameter", "_codecs.encode"),
]
NAMES = [*HARMLESS, "os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch._utils._rebuild_qtensor"]
KINDS = ["FloatStorage", "HalfStorage", "LongStorage", "BoolStorage", "ComplexFloatStorage", "storage.UntypedStorage"]
EDGE_VALUES = [0, 1, 2, 3, 4, 6, 24, -1, 255, 2**31, 2**48, 2**63, 2**64, 2**120]
MERSENNE = 2**61 - 1  # its multiples all hash to 0


def random_size(rng: Random) -> int:
    return rng.choice(EDGE_VALUES) if rng.random() < 0.2 else rng.randrange(7)


def random_text(rng: Random) -> bytes:
    content = rng.choice(["a", "step", "\u05d0\u202e", "\U0001f44d", "\n\0", "../" * 20, "x" * rng.randrange(2000)])
    return text(content)


def random_tensor(rng: Random) -> bytes:
    """Returns opcodes of a tensor that usually fits, or nearly fits, the six floats of storage 0."""
    kind, count = (rng.choice(KINDS), random_size(rng)) if rng.random() < 0.2 else ("FloatStorage", 6)
    shape = tuple(random_size(rng) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5, 64, 65])))
    strides = tuple(random_size(rng) for _ in shape) if rng.random() < 0.9 else (1,)
    dtype = [name(rng.choice(["torch.float32", "torch.uint16", "torch.float64"]))] if rng.random() < 0.2 else []
    storage_id = storage(kind, rng.choice(["0", "0", "1", "../0"]), count)
    return tensor(storage_id, random_size(rng), shape, strides, *dtype, v=3 if dtype else 2)


PLAIN_MAKERS: list[Callable[[Random], bytes]] = [
    lambda rng: rng.choice([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"]),
    lambda rng: b"K" + rng.randbytes(1),
    lambda rng: b"J" + rng.randbytes(4),
    lambda rng: b"G" + rng.choice([rng.randbytes(8), struct.pack(">d", float("nan"))]),
    lambda rng: number(rng.choice([rng.choice(EDGE_VALUES), MERSENNE * rng.randrange(9)])),
    random_text,
    lambda rng: b"\x8c\x03" + rng.choice([b"abc", b"\xed\xa0\x80", rng.randbytes(3)]),
    lambda rng: b"C\x02" + rng.randbytes(2),
    lambda rng: b"\x96" + struct.pack("<Q", 2) + rng.randbytes(2),
    lambda rng: b"N\x94h" + bytes([rng.randrange(3)]),
]
GLOBAL_MAKERS: list[Callable[[Random], bytes]] = [
    lambda rng: name(rng.choice(NAMES)),
    lambda rng: rng.choice([b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x05torch\x8c\x05int32\x93"]),
    lambda rng: call(rng.choice(NAMES), *(random_value(rng) for _ in range(rng.randrange(3)))),
    lambda rng: call("collections.OrderedDict") + random_text(rng) + random_value(rng) + b"s",
    lambda rng: call("__builtin__.set", b"](" + random_value(rng) + random_value(rng) + b"e"),
    lambda rng: call("_codecs.encode", random_text(rng), text("latin1")),
    lambda rng: call("torch.Size", tuple_of(random_value(rng), random_value(rng))),
    lambda rng: call("torch.device", random_text(rng), random_value(rng)),
    random_tensor,
    random_tensor,
]
WRAPPERS: list[Callable[[bytes, Random], bytes]] = [  # opcodes that put values into another value
    lambda inner, rng: b"](" + inner + b"e",
    lambda inner, rng: tuple_of(inner),
    lambda inner, rng: b"}(" + random_text(rng) + inner + b"u",
    lambda inner, rng: b"}" + random_value(rng, 0) + inner + b"s",
    lambda inner, rng: b"\x8f(" + inner + b"\x90",
    lambda inner, rng: b"(" + inner + b"\x91",
    lambda inner, rng: inner + b"\x85",
    lambda inner, rng: inner + b"\x94",
    lambda inner, rng: inner + b"q" + bytes([rng.randrange(4)]),
    lambda inner, rng: inner + b"\x94h\x00h\x00\x87",
    lambda inner, rng: name("argparse.Namespace") + b")\x81}(" + text("n") + inner + b"ub",
    lambda inner, rng: call("torch._utils._rebuild_parameter", inner, b"\x88", b"N"),
]


def random_value(rng: Random, global_rate: float = 0.3) -> bytes:
    """Returns opcodes that usually push one value; `global_rate` is how often they use a global."""
    opcodes = rng.choice(GLOBAL_MAKERS if rng.random() < global_rate else PLAIN_MAKERS)(rng)
    while rng.random() < 0.4:
        wrap = rng.choice(WRAPPERS[: None if global_rate else -2])
        opcodes = wrap(opcodes if rng.random() < 0.7 else opcodes + random_value(rng, global_rate), rng)
    return opcodes


def composed_pickle(rng: Random, global_rate: float = 0.3) -> bytes:
    """Returns a pickle of a few values, sometimes with bytes of INSERTIONS put in, or a part repeated many times."""
    body = tuple_of(*(random_value(rng, global_rate) for _ in range(rng.randrange(1, 5))))
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        position = rng.randrange(len(body) + 1)
        body = body[:position] + rng.choice(INSERTIONS) + body[position:]
    if rng.random() < 0.1:
        position = rng.randrange(len(body))
        body = (
            body[:position]
            + body[position : position + rng.randrange(1, 12)] * rng.choice([20, 200, 2000])
            + body[position:]
        )
    return program(body)


# -- Mutated files -----------------------------------------------------------------------------------------------------


def archive(pickled: bytes) -> bytes:
    """Returns a torch.save file with this data.pkl and a storage of six floats."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for member, content in {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(24)}.items():
            members.writestr(zipfile.ZipInfo(f"model/{member}"), content)  # ZipInfo: without the current time
    return file.getvalue()


def _data_pkl(path: Path) -> bytes:
    with zipfile.ZipFile(path) as members:
        return next(members.read(member) for member in members.namelist() if member.endswith("/data.pkl"))


ROWS = [{"id": str(i), "title": "t", "text": "x" * i, "n": (i, 1.5, None, [True])} for i in range(5)]
FLOATS = tensor(storage("FloatStorage", "0", 6), 0, (2, 3), (3, 1))
SEEDS: dict[str, list[bytes]] = {
    "pickle": [
        *(pickle.dumps(ROWS, protocol) for protocol in (2, 4)),
        pickle.dumps([{1, 2.5}, frozenset({"a"}), b"b", bytearray(b"c"), 2**100, {None: "\ud800"}], 5),
        (GOLDEN / "index_4shards/passages.0.pt").read_bytes(),
    ],
    "torch": [
        archive(program(FLOATS)),
        archive(program(b"}(" + text("model") + FLOATS + text("opt") + name("argparse.Namespace") + b")\x81}bu")),
        (GOLDEN / "index_4shards/embeddings.0.pt").read_bytes(),
    ],
    "data.pkl": [
        program(FLOATS),
        program(b"}(" + text("step") + b"K\x07" + text("model") + FLOATS + b"u"),
        _data_pkl(GOLDEN / "checkpoint_initial/model.pth.tar"),
    ],
}
CHECKPOINT = (GOLDEN / "checkpoint_initial/model.pth.tar").read_bytes()

INSERTIONS = [  # bytes to insert: opcodes, some with wrong arguments, globals, zip signatures
    *(op.code.encode("latin1") for op in pickletools.opcodes),
    b"\xff",
    *(b"r" + struct.pack("<I", index) for index in (0, 5, 2**31, 2**32 - 1)),
    *(op + b"\xff" * 8 for op in (b"\x95", b"\x8d", b"\x8e", b"\x96", b"X", b"B", b"\x8a", b"\x8b", b"j")),
    *(name(dotted) for dotted in NAMES),
    *(b"(" * 101, b"\x85" * 101, b"]" * 1000, b"\x8f" * 1000, b"\x94h\x00\x86" * 99),
    *(number(MERSENNE * i) + b"N" for i in range(3)),
    *(b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"data.pkl", b"\x01\x00\x10\x00"),
]


DIRECTORY_FIELDS = {
    "flags": (8, 2),
    "method": (10, 2),
    "packed": (20, 4),
    "size": (24, 4),
    "widths": (28, 4),
    "at": (42, 4),
}


def archive_with_wrong_directory(rng: Random) -> bytes:
    """Returns a torch.save file whose zip directory is wrong about a member's name, size, offset or form, or itself."""
    data = archive(composed_pickle(rng))
    entries = [position for position in range(len(data)) if data[position : position + 4] == b"PK\x01\x02"]
    for _ in range(rng.randrange(1, 3)):
        entry, other = rng.choice(entries), rng.choice(entries)
        field, width = rng.choice(list(DIRECTORY_FIELDS.values()))
        wrong_values = [
            data[other + field :][:width],
            b"\xff" * width,
            bytes(width),
            rng.randbytes(1) + bytes(width - 1),
        ]
        position = entry + field if rng.random() < 0.7 else rng.choice([entry + 46 + rng.randrange(20), len(data) - 18])
        wrong_value = rng.choice(wrong_values)
        data = data[:position] + wrong_value + data[position + width :]
    return data


def mutated(rng: Random, data: bytes, donors: list[bytes]) -> bytes:
    """Flips bits, writes wrong sizes, inserts, removes, repeats or truncates parts, or copies some of another file."""
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        # the pickle is at the start of these files, a zip's directory at the end
        margin = min(len(data), 400)
        position = rng.choice(
            [rng.randrange(len(data) + 1), rng.randrange(margin + 1), len(data) - rng.randrange(margin + 1)]
        )
        width = rng.choice([1, 2, 4, 8, rng.randrange(1, 64)])
        match rng.randrange(7):
            case 0 if position < len(data):
                data = data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]
            case 1:
                wrong_value = rng.choice(
                    [0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), len(data) % 2 ** (8 * width)]
                )
                data = data[:position] + wrong_value.to_bytes(width, "little") + data[position + width :]
            case 2:
                data = data[:position] + rng.choice(INSERTIONS) + data[position:]
            case 3:
                data = data[:position] + data[position + width :]
            case 4:
                data = data[: position + width] + data[position:]
            case 5:
                donor = rng.choice(donors)
                start = rng.randrange(len(donor))
                data = data[:position] + donor[start : start + rng.choice([width, 4096])] + data[position:]
            case 6 if rng.random() < 0.2:
                data = data[:position]
    return data


def hostile_file(rng: Random, kind: str) -> bytes:
    """Returns a hostile file for the reader of `kind`, "pickle" or "torch"."""
    draw = rng.random()
    if kind == "pickle":
        if draw < 0.5:
            return composed_pickle(rng, global_rate=rng.choice([0, 0, 0, 0.1]))
        return mutated(rng, rng.choice(SEEDS[kind]), SEEDS[kind])
    if draw < 0.4:
        return archive(composed_pickle(rng))
    if draw < 0.6:
        return archive(mutated(rng, rng.choice(SEEDS["data.pkl"]), SEEDS["data.pkl"]))
    if draw < 0.8:
        return archive_with_wrong_directory(rng)
    return mutated(rng, CHECKPOINT if draw > 0.99 else rng.choice(SEEDS[kind]), SEEDS[kind])
