"""The flags that only `atlas plan` has. The comment beside a field is its `--help`, as in `atlas_jax/config/`."""

from dataclasses import dataclass

from atlas_jax.config import require


@dataclass(frozen=True)
class PlanConfig:
    """Plan (the machine, and what else decides whether a run fits into it)"""

    topology: str = ""  # the machine: a100-40gb, a100-80gb or h100-80gb and NODESxGPUS, such as a100-80gb:8x8; v4, v5e,
    # v5p or v6e and the shape of its slice, such as v5e:8x8 or v5p:4x4x4; or cpu:8 (required)
    passages_count: int = 0  # passages of the index, searched exactly on the devices; 0: no index there, as with
    # --index_mode faiss
    json: bool = False  # print the plan as JSON

    def __post_init__(self) -> None:
        require(bool(self.topology), self, "topology", "is missing: name a machine, such as a100-80gb:8x8 or v5e:8x8")
        require(self.passages_count >= 0, self, "passages_count", "must be at least 0")
