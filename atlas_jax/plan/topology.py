"""Machines that a run can be planned for: the figures of their devices, and their XLA topology descriptions."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from atlas_jax.errors import UserError

Platform = Literal["cpu", "cuda", "tpu"]
GPU_DESCRIPTIONS = Path(__file__).parent / "gpu"  # a GpuTargetConfigProto of each
COMPILER_MODULES = {"cuda": "jax_cuda12_plugin", "tpu": "libtpu"}  # the installed module that has the XLA compiler


class Device(NamedTuple):
    """Figures of one device (a GPU, a TPU chip, a CPU core); rates are per second, of links in one direction."""

    platform: Platform
    memory: float  # bytes
    memory_bandwidth: float  # bytes
    bf16_flops: float  # of bfloat16 matrix products
    f32_flops: float  # of float32 matrix products
    link_bandwidth: float  # bytes, between the devices of a node or of a TPU slice
    network_bandwidth: float  # bytes, between nodes, the share of each device
    tpu_name: str = ""  # libtpu's name of the TPU
    tpu_options: Mapping[str, Any] = {}  # further arguments of the TPU's topology description


TERA, GIGA = 1e12, 1e9
# A100: NVIDIA's data sheet (312 and, with TF32, 156 TFLOP/s; 1555 and 2039 GB/s; NVLink 600 GB/s, 300 each way).
# H100 SXM: NVIDIA's data sheet (989 and 494 without sparsity; 3.35 TB/s; NVLink 900 GB/s, 450 each way).
# Networks: DGX A100 and DGX H100 have a port of 200 and 400 Gbit/s for each GPU. Memory of GPUs: from XLA's public
# device descriptions. TPUs: Google Cloud's page of each (bf16, HBM, ICI in Gbit/s of all links: 2400, 1600, 4800 and
# 3584, taken here as the sum of both directions); JAX by default computes a float32 product in one bf16 pass, so at the
# bf16 rate. Networks between TPU slices are not modelled.
# cpu: a rough core, for tests of the command; its figures are of no use for planning.
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
SHAPE_PATTERNS = {"cpu": r"\d+", "cuda": r"\d+x\d+", "tpu": r"\d+(x\d+){1,2}"}
SHAPE_EXAMPLES = {"cpu": "cpu:8", "cuda": "a100-80gb:8x8 (nodes x GPUs)", "tpu": "v5e:8x8 or v5p:4x4x4"}


class Topology(NamedTuple):
    """A machine: a kind of device, how many there are, and how they are connected."""

    text: str  # the value of --topology
    device: Device
    shape: tuple[int, ...]  # CPU: (cores,); GPU: (nodes, GPUs of a node); TPU: the shape of the slice, in chips

    @property
    def devices_per_node(self) -> int:
        """Number of devices connected at `link_bandwidth`: those of a node; of a TPU slice all, given as 2**31."""
        if self.device.platform == "cuda":
            return self.shape[1]
        return 2**31

    @property
    def target_config(self) -> str:
        """The text of the GPU's GpuTargetConfigProto, which XLA's compiler reads."""
        return (GPU_DESCRIPTIONS / f"{self.text.split(':')[0]}.txtpb").read_text(encoding="utf-8")


def parse_topology(text: str) -> Topology:
    """Parses the value of --topology; UserError if the device is unknown or the shape is not of its kind."""
    name, _, shape = text.partition(":")
    if name not in DEVICES:
        raise UserError(f"--topology {text}: no such device; choose from {', '.join(DEVICES)}")
    device = DEVICES[name]
    if not re.fullmatch(SHAPE_PATTERNS[device.platform], shape) or "0" in shape.split("x"):
        raise UserError(f"--topology {text}: expected its shape as in {SHAPE_EXAMPLES[device.platform]}")
    return Topology(text, device, tuple(map(int, shape.split("x"))))


def has_compiler(platform: Platform) -> bool:
    """Returns whether XLA's compiler for the platform is installed in this environment, and JAX with it.

    A package whose installation was interrupted may have a folder without a module.
    """
    if platform == "cpu":
        return True
    specs = (importlib.util.find_spec(module) for module in ("jax", "jaxlib", COMPILER_MODULES[platform]))
    return all(spec and spec.origin for spec in specs)


def configure_jax(topology: Topology) -> None:
    """Sets JAX to the CPU, with the number of devices of a `cpu` topology; call it before JAX initialises devices."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would query the metadata server of a TPU VM
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    count_is_set = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if topology.device.platform == "cpu" and not count_is_set:
        with contextlib.suppress(RuntimeError):  # already initialised: `topology_devices` checks their number
            jax.config.update("jax_num_cpu_devices", topology.shape[0])


def topology_devices(topology: Topology) -> list[Any]:
    """Devices to compile for, which need not exist on this machine; UserError if XLA refuses the topology."""
    import jax
    from jax.experimental import topologies

    device, shape = topology.device, "x".join(map(str, topology.shape))
    if device.platform == "cpu":
        cpus = jax.devices("cpu")[: topology.shape[0]]
        if len(cpus) < topology.shape[0]:
            raise UserError(
                f"--topology {topology.text}: JAX has {len(cpus)} CPU devices here; unset XLA_FLAGS and try again"
            )
        return list(cpus)
    try:
        if device.platform == "cuda":
            description = topologies.get_topology_desc(
                platform="cuda", topology_name="gpu", target_config=topology.target_config, topology=f"1x{shape}"
            )
        else:
            description = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{device.tpu_name}:{shape}", **device.tpu_options
            )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology {topology.text}: XLA refuses it ({reason:.200}); try another shape") from None
    return list(description.devices)
