"""docs/flags.md is what atlas_jax/config/ says."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_flags_page_is_up_to_date():
    """`make docs` would write the same page; the counter-case: without its last line it differs."""
    spec = importlib.util.spec_from_file_location("make_flags", ROOT / "docs" / "make_flags.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == module.page(), "run `make docs`"
    assert written.rsplit("\n", 2)[0] != module.page()
