"""Greedy answers against the reference's."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.checkpoints.pretrained import folder_weights, reader_config
from atlas_jax.checkpoints.weights import import_weights
from atlas_jax.data.tokens import Tokenizer, pad
from atlas_jax.evaluation.generation import FREE, GenerationSettings, generate
from atlas_jax.models.atlas import AtlasConfig, build_model
from atlas_jax.models.fid import FiD


def load(folder, **changes) -> FiD:
    cfg = AtlasConfig(reader_config(str(folder)), None).with_computation(**changes)
    source = {f"reader.{name}": array for name, array in folder_weights(str(folder)).items()}
    return build_model(import_weights(source, cfg, where=str(folder)), cfg, lambda _, array: jnp.asarray(array)).reader


@pytest.fixture(scope="module")
def batch(golden):
    file = np.load(golden / "batch.npz")
    return jnp.asarray(file["reader_ids"]), jnp.asarray(file["reader_mask"].astype(bool))


@pytest.fixture(scope="module")
def reader(golden) -> FiD:
    return load(golden / "assets/reader")


@pytest.fixture(scope="module")
def answers(golden):
    return json.loads((golden / "meta.json").read_text())["generation"]


def answer(reader, batch, cfg, prompt=None):
    write = nnx.jit(lambda reader, ids, mask: generate(reader, reader.encode(ids, mask), cfg, prompt))
    return np.asarray(write(reader, *batch))


def test_greedy_equals_the_reference(golden, reader, batch, answers):
    """The same tokens, start token included, for T5 1.1 and 1.0."""
    np.testing.assert_array_equal(answer(reader, batch, GenerationSettings(16)), answers["greedy"])
    for_cpu = load(golden / "assets/reader", for_cpu=True)
    np.testing.assert_array_equal(answer(for_cpu, batch, GenerationSettings(16)), answers["greedy"])
    expected = np.load(golden / "t5_1_0/golden.npz")["greedy"]
    np.testing.assert_array_equal(answer(load(golden / "t5_1_0"), batch, GenerationSettings(16)), expected)


def test_prompted_generation_equals_the_reference(golden, reader, batch, answers):
    """Prompts of different lengths; after them only tokens in the tokenizer's vocabulary."""
    tokenizer = Tokenizer.load(golden / "assets/reader")
    queries = json.loads((golden / "batch.json").read_text())["query"]
    expected = np.asarray(answers["prompt"])
    prompt_ids = tokenizer.ids([f"the answer to {query} is" for query in queries])
    assert [row[1 : 1 + len(ids)] for row, ids in zip(expected.tolist(), prompt_ids, strict=True)] == prompt_ids
    prompt = jnp.asarray(pad(prompt_ids, max(map(len, prompt_ids)), FREE)[0])
    cfg = GenerationSettings(48, vocabulary=tokenizer.vocab_size)
    np.testing.assert_array_equal(answer(reader, batch, cfg, prompt), expected)


def test_generation_stops_at_eos_but_not_before_the_minimum_length(reader, batch, answers):
    """Padding follows `</s>`; a minimum length delays it."""
    np.testing.assert_array_equal(answer(reader, batch, GenerationSettings(16, 8)), answers["min8"])
    eos = int(answers["greedy"][0][5])  # a token of the answer, used as the end token
    found = answer(reader, batch, GenerationSettings(16, eos_id=eos))[0]
    assert found[5] == eos
    assert not found[6:].any()
    late = answer(reader, batch, GenerationSettings(16, 9, eos_id=eos))[0]
    assert eos not in late[:8]
    np.testing.assert_array_equal(late[:5], found[:5])


@pytest.mark.parametrize(("name", "penalty"), [("beam3", 1.0), ("beam3_lp0.5", 0.5)])
@pytest.mark.parametrize("for_cpu", [False, True])
def test_beams_equal_the_reference(golden, batch, answers, name, penalty, for_cpu):
    """Three beams, with either length penalty: the reference's tokens, which differ from the greedy ones."""
    reader = load(golden / "assets/reader", for_cpu=for_cpu)
    found = answer(reader, batch, GenerationSettings(16, beams=3, length_penalty=penalty))
    np.testing.assert_array_equal(found, answers[name])
    assert (found != answers["greedy"]).any()


@pytest.mark.parametrize("case", ["1.0_3_0", "0.5_3_0", "2.0_4_0", "1.0_4_9"])
def test_beams_that_finish_equal_pytorchs(golden, reader, batch, case):
    """If beams reach `</s>`, length penalty, number of beams and minimum length have the same effect as in PyTorch."""
    penalty, width, shortest = case.split("_")
    expected = np.load(golden / "beams.npz")[case]
    cfg = GenerationSettings(24, int(shortest), int(width), float(penalty), eos_id=1166)
    after_the_end = np.cumsum(expected == 1166, axis=1) - (expected == 1166) > 0  # PyTorch's tokens there are undefined
    np.testing.assert_array_equal(answer(reader, batch, cfg), np.where(after_the_end, 0, expected))
    assert after_the_end.any()
