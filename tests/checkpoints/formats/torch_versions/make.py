"""Writes this folder's two files of the installed PyTorch version: `VENV/bin/python make.py`, from any folder.

`test_torch_versions.py` checks their content. Needs only torch; ran with 1.6.0 (Python 3.8) to 2.13.0 (Python 3.11).
"""

import argparse
import collections
from pathlib import Path

import torch


def trained_optimizer_state():
    """Returns the state of Adam for one parameter after one step on a gradient of ones."""
    weight = torch.nn.Parameter(torch.arange(3, dtype=torch.float32))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    weight.sum().backward()
    optimizer.step()
    return optimizer.state_dict()


x = torch.arange(24, dtype=torch.float32).reshape(4, 6)
tied = torch.nn.Parameter(x[:2])
options = argparse.Namespace(
    name="a\u00e9\U0001f44d", lr=0.5, big=2**70, negative=-3, none=None, nested=[(1, {"b": True})]
)
names = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
value = {
    "step": 7,
    "model": collections.OrderedDict(
        weight=tied, tied=tied, view=x.t(), part=x[1:, 2:5], one=x[1, 1], many=x[:1].expand(5, 6)
    ),
    "empty": x[:0],
    "optimizer": trained_optimizer_state(),
    "opt": options,
    "dtypes": {name: (x[0] - 3).to(getattr(torch, name)) for name in names},
    "plain": (
        x.shape,
        torch.device("cuda:1"),
        torch.float16,
        {1, 2},
        b"\x00\xff",
        collections.defaultdict(list, k=[1]),
    ),
}
folder = Path(__file__).parent
version = torch.__version__.split("+")[0]
torch.save(value, folder / f"{version}.pt")
torch.save(value, folder / f"{version}.protocol4.pt", pickle_protocol=4)
