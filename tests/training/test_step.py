"""The training step against the reference: losses and gradients of the first four questions, float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax.checkpoints.weights import export_weights
from atlas_jax.config import OptimConfig
from atlas_jax.models.atlas import build_model
from atlas_jax.models.fid import ReaderBatch
from atlas_jax.training.optimizer import init_optimizer
from atlas_jax.training.step import Averaging, Batch, RetrieverBatch, StepConfig, TrainState, joint_loss, train_step

pytestmark = pytest.mark.usefixtures("quick_compiler")
MODES = ("ppmean", "evalnormsum", "loop", "emdr")


@pytest.fixture(scope="module")
def batch(golden) -> Batch:
    file = np.load(golden / "batch.npz")
    labels = file["labels"]
    ids = {name: jnp.asarray(file[name], jnp.int32) for name in ("reader_ids", "query_ids", "retriever_ids")}
    masks = {name: jnp.asarray(file[name], bool) for name in ("reader_mask", "query_mask", "retriever_mask")}
    reader = ids["reader_ids"], masks["reader_mask"], jnp.maximum(labels, 0).astype(jnp.int32), jnp.asarray(labels >= 0)
    retriever = ids["query_ids"], masks["query_mask"], ids["retriever_ids"], masks["retriever_mask"]
    sentinel = 1999  # with which every query ends
    lengths = jnp.argmax(ids["reader_ids"][:, 0] == sentinel, axis=-1).astype(jnp.int32) + 1
    return Batch(ReaderBatch(*reader), lengths, RetrieverBatch(*retriever))


def config(weights, **changes) -> StepConfig:
    base = StepConfig(
        weights.cfg,
        OptimConfig(total_steps=6, warmup_steps=3, scheduler="linear", lr=1e-3, lr_retriever=3e-4, weight_decay=0.01),
        gold="ppmean",
        temperature_score=0.1,
        temperature_gold=0.1,
        averaging=Averaging(loss_group=4, separate_clip=False),
        n_context=5,
        pad_id=0,
        eos_id=1,
        text_maxlength=160,
        stats=False,
        dropout=False,
        query_side=False,
        remat_reader=False,
        remat_retriever=False,
    )
    return dataclasses.replace(base, **changes)


def initial_state(weights, cfg: StepConfig) -> TrainState:
    params = {path: jnp.asarray(array) for path, array in weights.params.items()}
    parts = [{p: x for p, x in params.items() if p.startswith(part)} for part in ("reader", "retriever")]
    gradients = jax.tree.map(jnp.zeros_like, params)  # as with --accumulation_steps: one program for all tests
    return TrainState(*(init_optimizer(part) for part in parts), {}, gradients, jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("cfg",))
def losses(params, batch, cfg):
    """Returns ((loss, metrics), gradients)."""

    def loss_fn(params):
        return joint_loss(build_model(params, cfg.model), batch, None, cfg)

    return jax.value_and_grad(loss_fn, has_aux=True)(params)


def norm(gradients, part):
    return np.sqrt(sum(np.square(np.asarray(x)).sum() for path, x in gradients.items() if path.startswith(part)))


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_gradients_equal_the_reference(golden, tiny_weights, batch, mode):
    """Both losses, the norm of each model's gradient, and single gradients; `test_mesh_step` has rematerialisation."""
    reference = np.load(golden / f"loss_{mode}.npz")
    cfg = config(tiny_weights, gold=mode)
    (_, metrics), gradients = losses(tiny_weights.params, batch, cfg)
    np.testing.assert_allclose(metrics["loss/reader_loss"], reference["reader_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/retriever_loss"], reference["retriever_loss"], rtol=1e-4)
    np.testing.assert_allclose(norm(gradients, "reader"), reference["grad_norm_reader"], rtol=1e-4)
    np.testing.assert_allclose(norm(gradients, "retriever"), reference["grad_norm_retriever"], rtol=1e-4)
    exported = export_weights({path: np.asarray(x) for path, x in gradients.items()}, tiny_weights.cfg)
    names = [name for name in reference.files if name.startswith("grad/")]
    assert len(names) == 14
    for name in names:
        found, expected = exported[name.removeprefix("grad/").replace("/", ".")], reference[name]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_attention_statistics_equal_the_reference(golden, tiny_weights, batch):
    """All 24 correlations with the gold scores; they differ from each other."""
    reference = np.load(golden / "stats.npz")
    (_, metrics), _ = losses(tiny_weights.params, batch, config(tiny_weights, stats=True))
    assert {name.removeprefix("corr/") for name in metrics if name.startswith("corr/")} == set(reference.files)
    for name in reference.files:
        np.testing.assert_allclose(metrics[f"corr/{name}"], reference[name], atol=1e-4, err_msg=name)
    assert np.ptp([reference[name] for name in reference.files]) > 0.5


@pytest.mark.parametrize("mode", MODES)
def test_gradients_equal_finite_differences(tiny_weights, batch, mode):
    """Along the gradient of each model, the loss grows by its norm; the gold scores do not depend on the retriever."""
    cfg = config(tiny_weights, gold=mode)
    _, gradients = losses(tiny_weights.params, batch, cfg)
    for part, metric, size in (("reader", "loss/reader_loss", 1e-3), ("retriever", "loss/retriever_loss", 1e-2)):
        length = norm(gradients, part)
        values = []
        for sign in (1, -1):
            moved = {
                path: x + sign * size * np.asarray(gradients[path]) / length if path.startswith(part) else x
                for path, x in tiny_weights.params.items()
            }
            values.append(float(losses(moved, batch, cfg)[0][1][metric]))
        assert (values[0] - values[1]) / (2 * size) == pytest.approx(length, rel=1e-2), part


@functools.partial(jax.jit, static_argnames=("cfg", "update"))
def step(state, batch, key, cfg, update=True):
    return train_step(state, batch, key, cfg, update=update)


def test_a_step_is_a_pure_function_of_state_batch_and_key(tiny_weights, batch):
    """Equal keys give equal bits; another key drops other activations, but only with dropout."""
    keys = [jax.random.key(n) for n in (0, 0, 1)]
    with_dropout = config(tiny_weights, dropout=True, model=tiny_weights.cfg.with_computation(dropout=0.1))
    without_dropout = config(tiny_weights)
    for cfg, equal in ((with_dropout, False), (without_dropout, True)):
        ends = [step(initial_state(tiny_weights, cfg), batch, key, cfg)[0].params for key in keys]
        first, second, other = ([np.asarray(x).tobytes() for x in end.values()] for end in ends)
        assert first == second
        assert (first == other) == equal


def test_accumulated_gradients_are_summed(tiny_weights, batch):
    """Twice the same batch, then an update: the gradient is twice as long; without an update no parameter changes."""
    cfg = config(tiny_weights)
    state = initial_state(tiny_weights, cfg)
    key = jax.random.key(0)
    alone = step(state, batch, key, cfg)[1]["grad_norm"]
    between, _ = step(state, batch, key, cfg, update=False)
    assert all((x == state.params[path]).all() for path, x in between.params.items())
    after, metrics = step(between, batch, key, cfg)
    assert metrics["grad_norm"] == pytest.approx(2 * float(alone), rel=1e-5)
    assert int(after.updates) == 1
    assert all((x == 0).all() for x in after.gradients.values())


def test_a_step_that_is_not_finite_changes_nothing(tiny_weights, batch):
    """With a NaN parameter the metric `bad` is 1, no parameter changes, and the sum of gradients is reset."""
    cfg = config(tiny_weights)
    good = initial_state(tiny_weights, cfg)
    params = good.reader.params | {"reader/decoder/final_norm/scale": jnp.full(64, jnp.nan, jnp.float32)}
    bad = good._replace(reader=init_optimizer(params), gradients=jax.tree.map(jnp.ones_like, good.params))
    for state, is_bad in ((good, 0), (bad, 1)):
        after, metrics = step(state, batch, jax.random.key(0), cfg)
        assert int(metrics["bad"]) == is_bad
        assert int(after.updates) == 1 - is_bad
        before, now = (np.asarray(x.params["retriever/encoder/embed_norm/scale"]) for x in (state, after))
        assert (before.tobytes() == now.tobytes()) == bool(is_bad)
    assert all((x == 0).all() for x in after.gradients.values())
    accumulated, _ = step(bad, batch, jax.random.key(0), cfg, update=False)
    assert all((x == 0).all() for x in accumulated.gradients.values())
