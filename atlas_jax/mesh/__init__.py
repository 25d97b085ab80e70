"""The device mesh: how devices share the work of a run.

Axes: `data` shards the batch; `fsdp` the batch too, and parameters with their AdamW moments; `passages` shards the
passages of each query, and parameters like `fsdp`; `model` shards heads, MLP and vocabulary of the reader.

`param_specs` is the table of parameter shardings, `layout` makes the mesh of --mesh, `placement` puts arrays on it and
reads them back, `constraints` is used by model code inside jitted functions.
"""

from atlas_jax.mesh.constraints import (
    constrain,
    gather_params,
    params_are_sharded,
    params_gathered,
    save_all_but_gathered,
)
from atlas_jax.mesh.layout import auto_sizes, check_mesh, is_single_cpu, make_mesh
from atlas_jax.mesh.param_specs import (
    AXES,
    BATCH_AXES,
    MODEL_AXIS,
    PARAM_AXES,
    PARAM_SPECS,
    ROW_AXES,
    param_spec,
    sharded_sizes,
    uses_compute_dtype,
)
from atlas_jax.mesh.placement import (
    ArrayOrShape,
    global_batch_size,
    in_host_memory,
    local_row_indices,
    local_rows,
    put_batch,
    put_parameter,
    put_passages,
    put_rows,
    replicate,
    row_owners,
    to_host,
)

__all__ = [
    "AXES",
    "BATCH_AXES",
    "MODEL_AXIS",
    "PARAM_AXES",
    "PARAM_SPECS",
    "ROW_AXES",
    "ArrayOrShape",
    "auto_sizes",
    "check_mesh",
    "constrain",
    "gather_params",
    "global_batch_size",
    "in_host_memory",
    "is_single_cpu",
    "local_row_indices",
    "local_rows",
    "make_mesh",
    "param_spec",
    "params_are_sharded",
    "params_gathered",
    "put_batch",
    "put_parameter",
    "put_passages",
    "put_rows",
    "replicate",
    "row_owners",
    "save_all_but_gathered",
    "sharded_sizes",
    "to_host",
    "uses_compute_dtype",
]
