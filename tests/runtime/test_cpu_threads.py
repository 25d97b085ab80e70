"""Several CPU devices have threads enough, and one device has XLA's own number."""

import os

import pytest

from atlas_jax.runtime.cpu_threads import set_cpu_threads


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ("--xla_force_host_platform_device_count=8", None, "64"),
        ("--xla_dump_to=x --xla_force_host_platform_device_count=2 --xla_a=1", None, "16"),
        ("--xla_force_host_platform_device_count=8", "5", "5"),  # who has said so knows why
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_threads(monkeypatch, flags, given, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", given or "")
    if given is None:
        monkeypatch.delenv("NPROC")
    set_cpu_threads()
    assert os.environ.get("NPROC") == expected
