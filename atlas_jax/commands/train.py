"""`atlas train`: trains reader and retriever together."""

from collections.abc import Sequence

from atlas_jax.commands.flags import parse_args
from atlas_jax.commands.run_context import connected_hosts, run_folder


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say, in the run's folder."""
    config = parse_args("train", argv)
    from atlas_jax.training.loop import train  # imports JAX, which takes seconds: after the flags are checked

    with connected_hosts(config), run_folder(config) as folder:
        train(config, folder)
