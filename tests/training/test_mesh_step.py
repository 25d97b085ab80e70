"""The training step on meshes of eight devices computes the reference's numbers on each."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from atlas_jax.mesh import PARAM_AXES, make_mesh, param_spec, put_batch, put_parameter, put_passages, replicate
from atlas_jax.models.atlas import build_model
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.training.step import Averaging, Batch, StepConfig, joint_loss
from tests.training.test_step import batch, config, norm

TOGETHER = Averaging(loss_group=8, separate_clip=False)  # the eight questions of `put_doubled_batch`
MESHES = ("fsdp=8", "model=4", "data=2,fsdp=2,model=2", "passages=5")

__all__ = ["batch"]  # the fixture
pytestmark = pytest.mark.usefixtures("quick_compiler")


def put_doubled_batch(mesh, batch: Batch) -> Batch:
    """The batch on the mesh with each question twice, one for each of eight devices: no mean changes."""

    def put(x, *, passages=False):
        return (put_passages if passages else put_batch)(mesh, np.concatenate([x, x]))

    read, retriever = batch.reader, batch.retriever
    return Batch(
        type(read)(*(put(x, passages=True) for x in read[:2]), *map(put, read[2:])),
        put(batch.query_lengths),
        type(retriever)(*map(put, retriever[:2]), *(put(x, passages=True) for x in retriever[2:])),
    )


def losses(params, batch, cfg):
    def loss_fn(params):
        return joint_loss(build_model(params, cfg.model), batch, None, cfg)

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


@functools.cache
def program(spec: str, cfg: StepConfig) -> CompiledFunction:
    """Losses and gradients on a mesh, compiled once for this file and `test_mesh_traffic`."""
    return CompiledFunction("losses", functools.partial(losses, cfg=cfg), make_mesh(spec))


@pytest.mark.parametrize("spec", MESHES)
def test_losses_and_gradients_equal_the_reference_on_every_mesh(golden, tiny_weights, batch, spec):
    """Both losses and the norms of both gradients; remat in one case, since it gathers parameters once more."""
    expected = np.load(golden / "loss_ppmean.npz")
    mesh = make_mesh(spec)
    remat = spec.startswith("data=2")
    cfg = config(tiny_weights, averaging=TOGETHER, remat_reader=remat, remat_retriever=remat)
    params = {path: put_parameter(mesh, path, array) for path, array in tiny_weights.params.items()}
    questions = put_doubled_batch(mesh, batch)
    (_, metrics), gradients = program(spec, cfg)(params, questions)
    np.testing.assert_allclose(metrics["loss/reader_loss"], expected["reader_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/retriever_loss"], expected["retriever_loss"], rtol=1e-4)
    np.testing.assert_allclose(norm(gradients, "reader"), expected["grad_norm_reader"], rtol=1e-4)
    np.testing.assert_allclose(norm(gradients, "retriever"), expected["grad_norm_retriever"], rtol=1e-4)
    if spec == "fsdp=8":
        assert_no_whole_layers(program(spec, cfg).compile_for(params, questions).as_text(), tiny_weights.params)


def assert_no_whole_layers(text: str, params) -> None:
    """Asserts that the program holds shards of stacked layers and no whole stack: layers are gathered one at a time."""
    for path, array in params.items():
        if "/layers/" in path and path.endswith("kernel"):
            shape, shard = list(array.shape), list(array.shape)
            shard[param_spec(path, array.ndim).index(PARAM_AXES)] //= 8
            assert f"f32[{','.join(map(str, shard))}]" in text, path
            assert f"f32[{','.join(map(str, shape))}]" not in text, path


def test_dropout_does_not_depend_on_the_mesh(tiny_weights, batch):
    """Equal losses with dropout on one device and on eight; the counter-case is another key."""
    cfg = config(tiny_weights, averaging=TOGETHER, dropout=True, model=tiny_weights.cfg.with_computation(dropout=0.1))

    def losses_with_dropout(params, batch, key):
        return joint_loss(build_model(params, cfg.model), batch, nnx.Rngs(dropout=key), cfg)[1]

    found = []
    for spec in ("data=1", "data=2,fsdp=2,model=2"):
        mesh = make_mesh(spec)
        compiled, questions = CompiledFunction("losses", losses_with_dropout, mesh), put_doubled_batch(mesh, batch)
        params = {path: put_parameter(mesh, path, array) for path, array in tiny_weights.params.items()}
        for seed in (0, 1):
            metrics = compiled(params, questions, replicate(mesh, jax.random.key(seed)))
            found.append(np.asarray([metrics["loss/reader_loss"], metrics["loss/retriever_loss"]]))
    one_device, other_key, eight_devices, _ = found
    np.testing.assert_allclose(eight_devices, one_device, rtol=1e-5)
    assert (abs(other_key / one_device - 1) > 1e-3).all()
