"""The reader against PyTorch: the reference's T5 1.1 and a T5 1.0 twin, same weights and tokens, float32."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.checkpoints.pretrained import folder_weights, reader_config
from atlas_jax.checkpoints.weights import import_weights
from atlas_jax.models.atlas import AtlasConfig, build_model
from atlas_jax.models.fid import FiD, fuse, shift_right, token_losses
from atlas_jax.models.t5 import relative_bucket


class Batch(NamedTuple):
    """The reference's first four questions."""

    ids: np.ndarray
    mask: np.ndarray
    target: np.ndarray
    target_mask: np.ndarray


def load(folder, dtype=jnp.float32, **how) -> FiD:
    cfg = AtlasConfig(reader_config(str(folder)), None).computing(dtype=dtype, **how)
    source = {f"reader.{name}": array for name, array in folder_weights(str(folder)).items()}
    params = import_weights(source, cfg, where=str(folder))
    return build_model(params, cfg, lambda _, array: jnp.asarray(array)).reader


@nnx.jit
def outputs(reader: FiD, batch: Batch):
    """Encoder states, logits and loss of a batch."""
    states = reader.encoder_states(batch.ids, batch.mask)
    logits, _ = reader.decode(shift_right(batch.target, 0), reader.encode(batch.ids, batch.mask))
    losses = token_losses(logits, batch.target, batch.target_mask)
    return states, logits, losses.sum() / batch.target_mask.sum()


@pytest.fixture(scope="module")
def batch(golden) -> Batch:
    file = np.load(golden / "batch.npz")
    labels = file["labels"]
    return Batch(file["reader_ids"], file["reader_mask"].astype(bool), np.maximum(labels, 0), labels >= 0)


@pytest.fixture(scope="module")
def reader(golden) -> FiD:
    return load(golden / "assets/reader")


@pytest.fixture(scope="module")
def twin(golden) -> FiD:
    return load(golden / "t5_1_0")


def close(found, wanted, relative):
    np.testing.assert_allclose(found, wanted, rtol=relative, atol=relative * np.abs(wanted).max())


def test_states_logits_and_loss_equal_the_reference(golden, reader, batch):
    """T5 1.1: the encoder's states where there are tokens, every logit, the loss."""
    wanted = np.load(golden / "reader.npz")
    states, logits, loss = outputs(reader, batch)
    there = batch.mask.reshape(4, -1)
    close(fuse(states)[there], wanted["encoder_last"][there], 1e-5)
    close(logits, wanted["logits"], 2e-5)
    close(loss, wanted["loss"], 1e-6)
    unmasked = outputs(reader, batch._replace(mask=np.ones_like(batch.mask)))[1]
    assert np.abs(unmasked - wanted["logits"]).max() > 0.1  # the mask matters


def test_t5_1_0_equals_its_pytorch_twin(golden, twin, batch):
    """ReLU, output tied to input, fewer encoder than decoder layers: states, logits and loss."""
    wanted = np.load(golden / "t5_1_0/golden.npz")
    states, logits, loss = outputs(twin, batch)
    there = batch.mask[:, ::2, ::8]
    close(np.asarray(states)[:, ::2, ::8][there], wanted["states"][there], 1e-5)
    close(logits[:, :, ::4], wanted["logits"], 2e-5)
    close(loss, wanted["loss"], 1e-6)
    assert twin.lm_head is None


@pytest.mark.parametrize("name", ["reader", "twin"])
def test_padding_changes_nothing(request, name, batch):
    """A longer bucket and an empty passage more give the same logits: results do not depend on the bucket."""
    reader = request.getfixturevalue(name)
    longer = batch._replace(
        ids=np.pad(batch.ids, ((0, 0), (0, 1), (0, 32))), mask=np.pad(batch.mask, ((0, 0), (0, 1), (0, 32)))
    )
    close(outputs(reader, longer)[1], outputs(reader, batch)[1], 1e-5)
    moved = batch._replace(ids=batch.ids[:, ::-1], mask=batch.mask[:, ::-1])
    close(outputs(reader, moved)[1], outputs(reader, batch)[1], 1e-5)  # FiD does not know the passages' order


@pytest.mark.parametrize("name", ["reader", "twin"])
def test_the_cache_continues_what_it_holds(request, name, batch):
    """Decoding token by token over the cache gives the logits of decoding all at once."""
    reader = request.getfixturevalue(name)
    ids, mask, inputs = jnp.asarray(batch.ids), jnp.asarray(batch.mask), shift_right(jnp.asarray(batch.target), 0)

    @nnx.jit
    def both(reader: FiD):
        encoded = reader.encode(ids, mask)
        cache, steps = reader.empty_cache(encoded, 4, 9), []
        for position in range(6):
            logits, cache = reader.decode(inputs[:, position : position + 1], encoded, past=cache, position=position)
            steps.append(logits)
        return jnp.concatenate(steps, axis=1), reader.decode(inputs[:, :6], encoded)[0]

    close(*both(reader), 1e-5)


def test_bfloat16_is_near_and_keeps_float32_where_it_matters(golden, reader, batch):
    """bf16: float32 logits and norms, a loss within 1 %, and really another computation."""
    half = load(golden / "assets/reader", jnp.bfloat16)
    states, logits, loss = outputs(half, batch)
    exact = outputs(reader, batch)
    assert states.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert half.encoder.final_norm.scale[...].dtype == jnp.float32
    close(loss, exact[2], 1e-2)
    assert 1e-3 < np.abs(logits - exact[1]).mean() < 0.5


def test_a_cpus_way_gives_the_same_numbers(golden, reader, batch):
    """Attention of one row after the other, and the decoder's layers one by one, change nothing."""
    unstack = outputs(load(golden / "assets/reader", for_cpu=True), batch)
    for one, other in zip(unstack, outputs(reader, batch), strict=True):
        close(one, np.asarray(other), 1e-5)


def test_layers_are_compiled_once(golden, batch):
    """Scanned layers: a reader of four times the depth has a program of the same size."""
    cfg = reader_config(str(golden / "assets/reader"))

    def instructions(depth: int) -> int:
        shape = dataclasses.replace(cfg, num_layers=depth, num_decoder_layers=depth)
        graph, state = nnx.split(nnx.eval_shape(lambda: FiD(shape, rngs=nnx.Rngs(0))))
        ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
        lowered = jax.jit(lambda state: nnx.merge(graph, state).encode(ids, mask)).lower(state)
        return lowered.as_text().count("\n")

    assert instructions(3) == instructions(12)


def test_relative_buckets_are_the_papers():
    """Half of the buckets are exact, the rest grow to the maximum distance; the future has its own, or bucket 0."""
    distance = jnp.arange(-200, 201)
    both = np.asarray(relative_bucket(distance, bidirectional=True, buckets=32, max_distance=128))
    past = np.asarray(relative_bucket(distance, bidirectional=False, buckets=32, max_distance=128))
    at = {d: i for i, d in enumerate(range(-200, 201))}
    assert [both[at[d]] for d in (0, -1, -7, -8, -127, -128, -200)] == [0, 1, 7, 8, 15, 15, 15]
    assert [both[at[d]] for d in (1, 7, 8, 127, 128, 200)] == [17, 23, 24, 31, 31, 31]
    assert [past[at[d]] for d in (5, 0, -1, -15, -16, -127, -128)] == [0, 0, 1, 15, 16, 31, 31]
    assert (np.diff(past) <= 0).all()
