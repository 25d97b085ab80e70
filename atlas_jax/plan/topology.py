"""The machines that a plan is made for: what their devices can do, and how XLA is told of them."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from atlas_jax.errors import UserError

Platform = Literal["cpu", "cuda", "tpu"]
TARGETS = Path(__file__).parent / "gpu"
COMPILERS = {"cuda": "jax_cuda12_plugin", "tpu": "libtpu"}  # the module that brings each compiler


class Device(NamedTuple):
    """One device: a GPU, a TPU chip, a core; rates in units a second, each way."""

    platform: Platform
    memory: float  # bytes
    bandwidth: float  # bytes, of the device's memory
    bf16: float  # floating-point operations, of matrix products
    f32: float  # the same of float32
    link: float  # bytes, between the devices of a node, or of a slice
    network: float  # bytes, between nodes, each device's share
    name: str = ""  # XLA's, of a TPU
    options: Mapping[str, Any] = {}  # XLA's, of a TPU


TERA, GIGA = 1e12, 1e9
# A100: NVIDIA's data sheet (312 and, with TF32, 156 TFLOP/s; 1555 and 2039 GB/s; NVLink 600 GB/s, 300 each way).
# H100 SXM: its data sheet (989 and 494 without sparsity; 3.35 TB/s; NVLink 900 GB/s, 450 each way).
# Networks: DGX A100 and DGX H100 give each GPU a port of 200 and 400 Gbit/s. Memory in bytes: as XLA's public device
# descriptions have it. TPUs: Google Cloud's pages of each (bf16, HBM, ICI in Gbit/s of all links: 2400, 1600, 4800
# and 3584, taken here as both ways together); JAX by default makes a float32 product in one pass of bf16, at its rate.
# Between slices there is nothing here.
# cpu: a rough core, for tests of the command; a figure of no use for planning.
DEVICES = {
    "a100-40gb": Device("cuda", 42331013120, 1555.2 * GIGA, 312 * TERA, 156 * TERA, 300 * GIGA, 25 * GIGA),
    "a100-80gb": Device("cuda", 85100068864, 2039 * GIGA, 312 * TERA, 156 * TERA, 300 * GIGA, 25 * GIGA),
    "h100-80gb": Device("cuda", 84942979072, 3352 * GIGA, 989 * TERA, 494 * TERA, 450 * GIGA, 50 * GIGA),
    "v4": Device(
        *("tpu", 32 * 2**30, 1228 * GIGA, 275 * TERA, 275 * TERA, 150 * GIGA, 150 * GIGA),
        *("v4", {"chip_config_name": "megacore"}),
    ),
    "v5e": Device("tpu", 16 * 2**30, 819 * GIGA, 197 * TERA, 197 * TERA, 100 * GIGA, 100 * GIGA, "v5e"),
    "v5p": Device("tpu", 95 * 2**30, 2765 * GIGA, 459 * TERA, 459 * TERA, 300 * GIGA, 300 * GIGA, "v5p"),
    "v6e": Device("tpu", 32 * 2**30, 1640 * GIGA, 918 * TERA, 918 * TERA, 224 * GIGA, 224 * GIGA, "v6e"),
    "cpu": Device("cpu", 4 * 2**30, 10 * GIGA, 0.1 * TERA, 0.1 * TERA, 5 * GIGA, 5 * GIGA),
}
SHAPES = {"cpu": r"\d+", "cuda": r"\d+x\d+", "tpu": r"\d+(x\d+){1,2}"}
EXAMPLES = {"cpu": "cpu:8", "cuda": "a100-80gb:8x8 (nodes x GPUs)", "tpu": "v5e:8x8 or v5p:4x4x4"}


class Topology(NamedTuple):
    """So many of a device, and how they are connected."""

    text: str  # as the flag has it
    device: Device
    sizes: tuple[int, ...]

    @property
    def per_node(self) -> int:
        """Devices that reach each other by `link`: of a node, or all of a TPU slice."""
        if self.device.platform == "cuda":
            return self.sizes[1]
        return 2**31

    @property
    def target(self) -> str:
        """What the GPU compiler is told."""
        return (TARGETS / f"{self.text.split(':')[0]}.txtpb").read_text(encoding="utf-8")


def parse(text: str) -> Topology:
    """The machine of --topology; UserError if there is none."""
    name, _, shape = text.partition(":")
    if name not in DEVICES:
        raise UserError(f"--topology {text}: no such device; choose from {', '.join(DEVICES)}")
    device = DEVICES[name]
    if not re.fullmatch(SHAPES[device.platform], shape) or "0" in shape.split("x"):
        raise UserError(f"--topology {text}: expected its shape as in {EXAMPLES[device.platform]}")
    return Topology(text, device, tuple(map(int, shape.split("x"))))


def has_compiler(platform: Platform) -> bool:
    """Whether this environment can compile for it."""
    return platform == "cpu" or importlib.util.find_spec(COMPILERS[platform]) is not None


def prepare(topology: Topology) -> None:
    """Sets what must be set before JAX's devices start."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU to ask
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if topology.device.platform == "cpu" and not chosen:
        with contextlib.suppress(RuntimeError):  # they have started: `devices` counts them
            jax.config.update("jax_num_cpu_devices", topology.sizes[0])


def devices(topology: Topology) -> list[Any]:
    """The devices to compile for."""
    import jax
    from jax.experimental import topologies

    device, shape = topology.device, "x".join(map(str, topology.sizes))
    if device.platform == "cpu":
        found = jax.devices("cpu")[: topology.sizes[0]]
        if len(found) < topology.sizes[0]:
            raise UserError(
                f"--topology {topology.text}: JAX has {len(found)} CPU devices here; unset XLA_FLAGS and try again"
            )
        return list(found)
    try:
        if device.platform == "cuda":
            described = topologies.get_topology_desc(
                platform="cuda", topology_name="gpu", target_config=topology.target, topology=f"1x{shape}"
            )
        else:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{device.name}:{shape}", **device.options
            )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology {topology.text}: XLA refuses it ({reason:.200}); try another shape") from None
    return list(described.devices)
