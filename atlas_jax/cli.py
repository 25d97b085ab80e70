"""The `atlas` command."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from atlas_jax.errors import UserError

USAGE = """usage: atlas COMMAND [FLAGS]

ATLAS: a retriever and a reader, in JAX (arXiv 2208.03299).

  evaluate   retrieve, read and score:      atlas evaluate --help
  convert    a published checkpoint to ours: atlas convert --help
"""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0, or 2 with one line on stderr that says what is wrong and what to do."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[Sequence[str]], None]] = {"evaluate": _evaluate, "convert": _convert}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if arguments[0] not in commands:
            raise UserError(f"atlas {arguments[0]}: no such command; there are {', '.join(commands)}")
        commands[arguments[0]](arguments[1:])
    except UserError as error:
        print(f"atlas: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(argv: Sequence[str]) -> None:
    from atlas_jax.config import parse_args, to_dict

    _log_to_stderr()
    config = parse_args("evaluate", argv)
    from atlas_jax.evaluation.loop import evaluate  # takes seconds: after the flags are known to be right
    from atlas_jax.files import write_json

    run = Path(config.run.checkpoint_dir) / config.run.name
    try:
        run.mkdir(parents=True, exist_ok=True)
        logging.getLogger().addHandler(_formatted(logging.FileHandler(run / "run.log", encoding="utf-8")))
        write_json(run / "config.json", to_dict(config))
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); choose another --checkpoint_dir") from None
    evaluate(config, run)


def _convert(argv: Sequence[str]) -> None:
    from atlas_jax.checkpoints.convert import main as convert

    _log_to_stderr()
    convert(argv)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, handlers=[_formatted(logging.StreamHandler())], force=True)
    logging.getLogger("atlas_jax").setLevel(logging.INFO)


def _formatted(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    return handler


if __name__ == "__main__":
    sys.exit(main())
