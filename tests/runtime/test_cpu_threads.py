"""`set_cpu_threads`: eight threads for each of several CPU devices, XLA's default for one."""

import os

import pytest

from atlas_jax.runtime.cpu_threads import set_cpu_threads


@pytest.mark.parametrize(
    ("flags", "given", "expected"),
    [
        ("--xla_force_host_platform_device_count=8", None, "64"),
        ("--xla_dump_to=x --xla_force_host_platform_device_count=2 --xla_a=1", None, "16"),
        ("--xla_force_host_platform_device_count=8", "5", "5"),  # a value set by the user stays
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_nproc_is_eight_per_device_unless_set(monkeypatch, flags, given, expected):
    """NPROC after the call; None where it stays unset."""
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("NPROC", given or "")
    if given is None:
        monkeypatch.delenv("NPROC")
    set_cpu_threads()
    assert os.environ.get("NPROC") == expected
