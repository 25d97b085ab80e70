"""`atlas evaluate`: retrieves, reads and scores."""

from collections.abc import Sequence

from atlas_jax.commands.flags import parse_args
from atlas_jax.commands.run_context import connected_hosts, run_folder


def main(argv: Sequence[str]) -> None:
    """Evaluates as the flags say, in the run's folder."""
    config = parse_args("evaluate", argv)
    from atlas_jax.evaluation.loop import evaluate  # imports JAX, which takes seconds: after the flags are checked

    with connected_hosts(config), run_folder(config) as folder:
        evaluate(config, folder)
