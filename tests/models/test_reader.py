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
    """The reference's batch of its first four questions, see `golden/batch.npz`."""

    ids: np.ndarray
    mask: np.ndarray
    target: np.ndarray
    target_mask: np.ndarray


def load(folder, dtype=jnp.float32, **changes) -> FiD:
    cfg = AtlasConfig(reader_config(str(folder)), None).with_computation(dtype=dtype, **changes)
    source = {f"reader.{name}": array for name, array in folder_weights(str(folder)).items()}
    params = import_weights(source, cfg, where=str(folder))
    return build_model(params, cfg, lambda _, array: jnp.asarray(array)).reader


@nnx.jit
def outputs(reader: FiD, batch: Batch):
    """Returns encoder states, logits and mean loss of a batch."""
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


def assert_close(actual, expected, tolerance):
    """Asserts equality to `tolerance`, relative to each element and absolute as a fraction of the largest."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_states_logits_and_loss_equal_the_reference(golden, reader, batch):
    """T5 1.1: encoder states of all tokens that are not padding, every logit, the loss."""
    expected = np.load(golden / "reader.npz")
    states, logits, loss = outputs(reader, batch)
    is_token = batch.mask.reshape(4, -1)
    assert_close(fuse(states)[is_token], expected["encoder_last"][is_token], 1e-5)
    assert_close(logits, expected["logits"], 2e-5)
    assert_close(loss, expected["loss"], 1e-6)
    unmasked = outputs(reader, batch._replace(mask=np.ones_like(batch.mask)))[1]
    assert np.abs(unmasked - expected["logits"]).max() > 0.1  # the mask matters


def test_t5_1_0_equals_its_pytorch_twin(golden, twin, batch):
    """ReLU, tied embeddings, fewer encoder than decoder layers: states, logits and loss equal those of PyTorch."""
    expected = np.load(golden / "t5_1_0/golden.npz")
    states, logits, loss = outputs(twin, batch)
    is_token = batch.mask[:, ::2, ::8]
    assert_close(np.asarray(states)[:, ::2, ::8][is_token], expected["states"][is_token], 1e-5)
    assert_close(logits[:, :, ::4], expected["logits"], 2e-5)
    assert_close(loss, expected["loss"], 1e-6)
    assert twin.lm_head is None


@pytest.mark.parametrize("name", ["reader", "twin"])
def test_logits_do_not_depend_on_padding_or_passage_order(request, name, batch):
    """A longer bucket, one more empty passage, and passages in reverse order give the same logits."""
    reader = request.getfixturevalue(name)
    longer = batch._replace(
        ids=np.pad(batch.ids, ((0, 0), (0, 1), (0, 32))), mask=np.pad(batch.mask, ((0, 0), (0, 1), (0, 32)))
    )
    assert_close(outputs(reader, longer)[1], outputs(reader, batch)[1], 1e-5)
    reversed_passages = batch._replace(ids=batch.ids[:, ::-1], mask=batch.mask[:, ::-1])
    assert_close(outputs(reader, reversed_passages)[1], outputs(reader, batch)[1], 1e-5)  # FiD has no order of passages


@pytest.mark.parametrize("name", ["reader", "twin"])
def test_cached_decoding_gives_the_logits_of_decoding_at_once(request, name, batch):
    """Six tokens decoded one by one with the cache, and the same six in one call without it: equal logits."""
    reader = request.getfixturevalue(name)
    ids, mask, inputs = jnp.asarray(batch.ids), jnp.asarray(batch.mask), shift_right(jnp.asarray(batch.target), 0)

    @nnx.jit
    def stepwise_and_at_once(reader: FiD):
        encoded = reader.encode(ids, mask)
        cache, steps = reader.empty_cache(encoded, 4, 9), []
        for position in range(6):
            logits, cache = reader.decode(inputs[:, position : position + 1], encoded, past=cache, position=position)
            steps.append(logits)
        return jnp.concatenate(steps, axis=1), reader.decode(inputs[:, :6], encoded)[0]

    assert_close(*stepwise_and_at_once(reader), 1e-5)


def test_bfloat16_is_close_and_keeps_logits_and_norms_in_float32(golden, reader, batch):
    """bf16: a loss within 1 %, logits and norm scales in float32, and logits that differ from those in float32."""
    bf16 = load(golden / "assets/reader", jnp.bfloat16)
    states, logits, loss = outputs(bf16, batch)
    exact = outputs(reader, batch)
    assert states.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert bf16.encoder.final_norm.scale[...].dtype == jnp.float32
    assert_close(loss, exact[2], 1e-2)
    assert 1e-3 < np.abs(logits - exact[1]).mean() < 0.5


def test_for_cpu_gives_the_same_outputs(golden, reader, batch):
    """The encoder row by row and unstacked decoder layers: states, logits and loss as without `for_cpu`."""
    for_cpu = outputs(load(golden / "assets/reader", for_cpu=True), batch)
    for actual, expected in zip(for_cpu, outputs(reader, batch), strict=True):
        assert_close(actual, np.asarray(expected), 1e-5)


def test_program_size_does_not_depend_on_depth(golden, batch):
    """Layers are scanned: with 12 layers the lowered program has as many lines as with 3."""
    cfg = reader_config(str(golden / "assets/reader"))

    def program_lines(depth: int) -> int:
        cfg_of_depth = dataclasses.replace(cfg, num_layers=depth, num_decoder_layers=depth)
        graph, state = nnx.split(nnx.eval_shape(lambda: FiD(cfg_of_depth, rngs=nnx.Rngs(0))))
        ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
        lowered = jax.jit(lambda state: nnx.merge(graph, state).encode(ids, mask)).lower(state)
        return lowered.as_text().count("\n")

    assert program_lines(3) == program_lines(12)


def test_relative_buckets_match_the_t5_paper():
    """Half of the buckets hold one distance, the rest grow to the maximum; later keys have their own, or bucket 0."""
    distance = jnp.arange(-200, 201)
    bidirectional = np.asarray(relative_bucket(distance, bidirectional=True, buckets=32, max_distance=128))
    causal = np.asarray(relative_bucket(distance, bidirectional=False, buckets=32, max_distance=128))
    index = {d: i for i, d in enumerate(range(-200, 201))}
    assert [bidirectional[index[d]] for d in (0, -1, -7, -8, -127, -128, -200)] == [0, 1, 7, 8, 15, 15, 15]
    assert [bidirectional[index[d]] for d in (1, 7, 8, 127, 128, 200)] == [17, 23, 24, 31, 31, 31]
    assert [causal[index[d]] for d in (5, 0, -1, -15, -16, -127, -128)] == [0, 0, 1, 15, 16, 31, 31]
    assert (np.diff(causal) <= 0).all()
