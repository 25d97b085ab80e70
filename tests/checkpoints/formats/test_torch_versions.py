"""Reads files that PyTorch itself wrote, from 1.6, the first version with zip files, to a recent one."""

from pathlib import Path

import numpy as np
import pytest

from atlas_jax.checkpoints.formats import torch_reader
from atlas_jax.checkpoints.formats.torch_reader import load_torch

FILES = sorted((Path(__file__).parent / "torch_versions").glob("*.pt"))
X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def content(request):
    return load_torch(request.param)


def test_five_versions_with_two_protocols_each():
    """There are files of five versions, each with the default pickle protocol, 2, and with protocol 4."""
    assert [file.read_bytes().index(b"\x80\x02") > 0 for file in FILES if "protocol4" not in file.stem] == [True] * 5
    assert len(FILES) == 10


def test_weights_are_read_bit_exact(content):
    """A Parameter and transposed, sliced, 0-d, expanded and empty views are exact, and tied tensors share memory."""
    model = content["model"]
    expected = {"weight": X[:2], "tied": X[:2], "view": X.T, "part": X[1:, 2:5], "one": X[1, 1], "many": X[[0] * 5]}
    assert list(model) == list(expected)
    for name, array in expected.items():
        assert model[name].dtype == np.float32
        assert not model[name].flags.writeable
        np.testing.assert_array_equal(model[name], array, strict=True)
    assert all(np.shares_memory(model["weight"], model[name]) for name in ("tied", "view", "one", "many"))
    assert content["empty"].shape == (0, 6)


def test_every_dtype_is_read(content):
    """Tensors of ten dtypes hold the values -3 to 2, bit for bit."""
    for name, array in content["dtypes"].items():
        dtype = torch_reader.TORCH_DTYPES[f"torch.{name}"]
        assert array.dtype == dtype
        assert array.tobytes() == (X[0] - 3).astype(np.int64).astype(dtype).tobytes()
    assert len(content["dtypes"]) == 10


def test_options_and_plain_values_are_read(content):
    """A Namespace with a long and a negative integer, Size, device, dtype, set, bytes and defaultdict are read."""
    options = {"name": "a\u00e9\U0001f44d", "lr": 0.5, "big": 2**70, "negative": -3, "none": None}
    assert content["opt"] == options | {"nested": [(1, {"b": True})]}
    assert content["plain"] == ((4, 6), "cuda:1", "torch.float16", {1, 2}, b"\x00\xff", {"k": [1]})
    assert content["step"] == 7


def test_optimizer_state_is_read(content):
    """Adam's state after one step on a gradient of ones is read under its parameter's index."""
    state = content["optimizer"]["state"][0]
    np.testing.assert_allclose(state["exp_avg"], np.full(3, 0.1, np.float32), rtol=1e-6)
    np.testing.assert_allclose(state["exp_avg_sq"], np.full(3, 1e-3, np.float32), rtol=1e-6)
    assert float(state["step"]) == 1
    [group] = content["optimizer"]["param_groups"]
    assert (group["lr"], group["params"]) == (0.5, [0])
