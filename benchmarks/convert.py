"""Memory and speed of `atlas convert` on a synthetic checkpoint in the reference's format, against `cp` of the file.

    python benchmarks/convert.py --layers 12 --limit 2

A conversion runs in a subprocess, whose anonymous memory is limited (RLIMIT_DATA). The time of a conversion and of `cp`
starts with the file dropped from the page cache and ends after `sync`.
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
from atlas_jax.checkpoints.weights import ExportedArray, weight_entries
from atlas_jax.commands.main import main as atlas
from atlas_jax.models.atlas import AtlasConfig, param_shapes
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS
from atlas_jax.storage.lazy_array import LazyArray, Slices, StackedViews

BLOCK = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32)


class RandomArray(LazyArray):
    """An array of random numbers, read from BLOCK at its own offset; takes no memory until it is read."""

    def __init__(self, shape: tuple[int, ...], offset: int):
        self.shape, self.dtype, self.offset = shape, np.dtype(np.float32), offset

    def read(self, index: Slices = ()) -> np.ndarray:
        return np.resize(np.roll(BLOCK, self.offset), self.shape)[index]


def make_checkpoint(folder: Path, name: str, layers: int) -> list[str]:
    """Writes a checkpoint with the widths of the reader `name` and `layers` layers; returns the flags that name it."""
    reader = dataclasses.replace(T5_CONFIGS[name], num_layers=layers, num_decoder_layers=layers)
    retriever = ContrieverConfig()
    cfg = AtlasConfig(reader, retriever)
    arrays, by_parameter = {}, {}
    shapes = {
        path: StackedViews([np.broadcast_to(np.float32(0), struct.shape)], struct.dtype, stacked=False)
        for path, struct in param_shapes(cfg).items()
    }
    for entry in weight_entries(cfg):
        key = entry.path, entry.layer
        by_parameter.setdefault(key, RandomArray(ExportedArray(shapes[entry.path], entry).shape, len(by_parameter)))
        arrays[entry.name] = by_parameter[key]
    folder.mkdir(parents=True)
    write_torch(folder / "model.pth.tar", arrays, {"step": 1, "opt": None}, lambda count: None)
    os.sync()
    models = {
        "reader_model_type": t5_folder(reader, folder / "reader"),
        "retriever_model_path": contriever_folder(retriever, folder / "retriever"),
    }
    return [f"--{flag}={path}" for flag, path in {"model_path": folder, **models}.items()]


def drop_page_cache(*paths: Path) -> None:
    """Drops files, and the files below folders, from the page cache."""
    os.sync()
    for path in paths:
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_gigabytes() -> dict[str, float]:
    """Returns anonymous memory now and peak resident memory of this process in GB, from /proc/self/status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) / 1e6 for line in lines if line[0] in ("RssAnon:", "VmHWM:")}


def convert_with_limit(limit: float, argv: list[str]) -> int:
    """Runs `atlas convert` with `limit` GB of anonymous memory and prints its peak; returns the exit status."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    anonymous, finished = [0.0], threading.Event()

    def sample_memory() -> None:
        while not finished.wait(0.02):
            anonymous.append(memory_gigabytes()["RssAnon"])

    thread = threading.Thread(target=sample_memory)
    thread.start()
    status = atlas(["convert", *argv])
    finished.set()
    thread.join()
    print(f"peak {memory_gigabytes()['VmHWM']:.2f} GB, of which never more than {max(anonymous):.2f} GB anonymous")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: where temporary files go)")
    parser.add_argument("--reader", default="google/t5-xl-lm-adapt", choices=T5_CONFIGS, help="whose widths to take")
    parser.add_argument("--layers", type=int, default=12, help="of encoder and decoder; 12 of xl are 6.4 GB")
    parser.add_argument("--limit", type=float, default=2.0, help="GB of anonymous memory")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return convert_with_limit(args.limit, args.child)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        flags = make_checkpoint(folder / "source", args.reader, args.layers)
        source, copy, checkpoint = (folder / name for name in ("source/model.pth.tar", "copy", "ours"))
        print(f"{source.stat().st_size / 1e9:.2f} GB")
        runs = [("cp", ["cp", str(source), str(copy)])]
        atlas_convert = [sys.executable, __file__, "--limit", str(args.limit), "--child"]
        runs += [("reference to ours", [*atlas_convert, *flags, f"--output={checkpoint}"])]
        for target_format in ("reference", "huggingface"):
            target = folder / target_format
            runs += [
                (
                    f"ours to {target_format}",
                    [*atlas_convert, f"--model_path={checkpoint}", "--to", target_format, f"--output={target}"],
                )
            ]
        for name, command in [*runs, ("cp again", ["cp", str(source), str(copy)])]:
            drop_page_cache(folder)
            start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True)
            os.sync()
            wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            user, kernel = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
            print(f"{name}: {wall:.1f} s, of processors {user:.1f} s and {kernel:.1f} s in the kernel", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
