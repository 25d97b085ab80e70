"""`python -m atlas_jax` is `atlas`, where that is not on PATH."""

import sys

from atlas_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
