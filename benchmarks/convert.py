"""Memory and speed of `atlas convert` on a made-up checkpoint of the reference's, against `cp` of the same file.

    python benchmarks/convert.py --layers 12 --limit 2

A conversion runs in a process of its own, whose anonymous memory (RLIMIT_DATA) the kernel limits. Both it and `cp`
begin with the file out of the page cache and end with the data on the disk.
"""

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from shapes import contriever_folder, t5_folder

from atlas_jax.checkpoints.formats.torch_writer import write_torch
from atlas_jax.checkpoints.weights import ExportedArray, StackedViews, weight_entries
from atlas_jax.commands.main import main as atlas
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage.lazy_array import LazyArray, Slices

BLOCK = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32)


class Random(LazyArray):
    """Numbers out of a block, each array from another place in it."""

    def __init__(self, shape: tuple[int, ...], at: int):
        self.shape, self.dtype, self.at = shape, np.dtype(np.float32), at

    def read(self, index: Slices = ()) -> np.ndarray:
        return np.resize(np.roll(BLOCK, self.at), self.shape)[index]


def make(folder: Path, name: str, layers: int) -> list[str]:
    """A checkpoint with the widths of a published reader, and the flags that name it."""
    reader = dataclasses.replace(T5_CONFIGS[name], num_layers=layers, num_decoder_layers=layers)
    retriever = ContrieverConfig()
    cfg = AtlasConfig(reader, retriever)
    found, firsts = {}, {}
    shapes = {
        path: StackedViews([np.broadcast_to(np.float32(0), s.shape)], s.dtype, stacked=False)
        for path, s in param_shapes(cfg).items()
    }
    for e in weight_entries(cfg):
        key = e.path, e.layer
        firsts.setdefault(key, Random(ExportedArray(shapes[e.path], e).shape, len(firsts)))
        found[e.name] = firsts[key]
    folder.mkdir(parents=True)
    write_torch(folder / "model.pth.tar", found, {"step": 1, "opt": None}, lambda count: None)
    os.sync()
    parts = {
        "reader_model_type": t5_folder(reader, folder / "reader"),
        "retriever_model_path": contriever_folder(retriever, folder / "retriever"),
    }
    return [f"--{flag}={path}" for flag, path in {"model_path": folder, **parts}.items()]


def forget(*paths: Path) -> None:
    """Takes files out of the page cache."""
    os.sync()
    for path in paths:
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, float]:
    """GB of this process, as the kernel counts them."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) / 1e6 for line in lines if line[0] in ("RssAnon:", "VmHWM:")}


def child(limit: float, argv: list[str]) -> int:
    """Converts under the limit, and says what it needed."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    anonymous, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            anonymous.append(memory()["RssAnon"])

    thread = threading.Thread(target=watch)
    thread.start()
    status = atlas(["convert", *argv])
    done.set()
    thread.join()
    print(f"peak {memory()['VmHWM']:.2f} GB, of which never more than {max(anonymous):.2f} GB anonymous")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: where temporary files go)")
    parser.add_argument("--reader", default="google/t5-xl-lm-adapt", choices=T5_CONFIGS, help="whose widths to take")
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder; 12 of xl are 6.4 GB")
    parser.add_argument("--limit", type=float, default=2.0, help="GB of anonymous memory")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.limit, given.child)
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(temporary)
        flags = make(folder / "source", given.reader, given.layers)
        source, copy, ours = (folder / name for name in ("source/model.pth.tar", "copy", "ours"))
        print(f"{source.stat().st_size / 1e9:.2f} GB")
        runs = [("cp", ["cp", str(source), str(copy)])]
        converter = [sys.executable, __file__, "--limit", str(given.limit), "--child"]
        runs += [("reference to ours", [*converter, *flags, f"--output={ours}"])]
        for form in ("reference", "huggingface"):
            target = folder / form
            runs += [(f"ours to {form}", [*converter, f"--model_path={ours}", "--to", form, f"--output={target}"])]
        for name, command in [*runs, ("cp again", ["cp", str(source), str(copy)])]:
            forget(folder)
            start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True)
            os.sync()
            wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            user, kernel = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
            print(f"{name}: {wall:.1f} s, of processors {user:.1f} s and {kernel:.1f} s in the kernel", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
