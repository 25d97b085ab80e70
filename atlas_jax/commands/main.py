"""The `atlas` command."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_jax.commands.flags import choose
from atlas_jax.errors import UserError
from atlas_jax.runtime.cpu_threads import set_cpu_threads
from atlas_jax.runtime.interrupts import Interrupted, exit_while_compiling

if TYPE_CHECKING:
    from atlas_jax.config import Config

USAGE = """usage: atlas COMMAND [FLAGS]

ATLAS: a retriever and a reader, in JAX (arXiv 2208.03299).

  train      retriever and reader together:  atlas train --help
  evaluate   retrieve, read and score:       atlas evaluate --help
  index      what is searched, made ready:   atlas index --help
  convert    weights of one form to another: atlas convert --help
  plan       will a run fit, how fast is it: atlas plan --help
"""

logger = logging.getLogger(__name__)

INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports of a program that these signals end
SMALLER = "take a smaller --per_gpu_batch_size, --per_gpu_embedder_batch_size or --text_maxlength, or --precision bf16"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; 0, or 2 with one line on stderr that says what is wrong and what to do.

    1 is an answer: of `atlas plan`, that the run does not fit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        set_cpu_threads()
        with _log_to_stderr():
            status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has gone, as in `atlas evaluate --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor shall the interpreter complain when it flushes
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return exit_while_compiling(_failed("interrupted", INTERRUPTED))
    except Interrupted as stop:
        return exit_while_compiling(
            _failed(f"{stop}; the same command goes on from its newest checkpoint", stop.status)
        )
    except UserError as error:
        return _failed(str(error))
    except MemoryError as error:
        return _failed(f"out of memory ({str(error) or 'of this machine'}); {SMALLER}")
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror}; check the disk, its space and its permissions, and try again")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # XLA's
            raise
        return _failed(f"out of memory ({str(error).splitlines()[0]:.200}); {SMALLER}")
    return status


def _failed(message: str, status: int = 2) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(f"atlas: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return status


def _run(arguments: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], int | None]] = {
        "train": _train,
        "evaluate": _evaluate,
        "index": _index,
        "convert": _convert,
        "plan": _plan,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command = choose("atlas", commands, arguments[0])
    try:
        return command(arguments[1:]) or 0
    except SystemExit as done:
        if done.code:  # else argparse has shown --help
            raise
        return 0


def _train(argv: Sequence[str]) -> None:
    from atlas_jax.commands.flags import parse_args

    config = parse_args("train", argv)
    from atlas_jax.training.loop import train

    with _hosts(config), _run_folder(config) as run:
        train(config, run)


def _evaluate(argv: Sequence[str]) -> None:
    from atlas_jax.commands.flags import parse_args

    config = parse_args("evaluate", argv)
    from atlas_jax.evaluation.loop import evaluate  # takes seconds: after the flags are known to be right

    with _hosts(config), _run_folder(config) as run:
        evaluate(config, run)


@contextlib.contextmanager
def _hosts(config: "Config") -> Iterator[None]:
    """All processes of the run are there, and share the run's folder; those but the first only warn."""
    from atlas_jax.runtime.cluster import connect
    from atlas_jax.storage.shared_files import check_shared

    with connect(config.run) as group:
        if group.index:
            logging.getLogger("atlas_jax").setLevel(logging.WARNING)
        check_shared(config.run_folder, "--checkpoint_dir")
        yield


@contextlib.contextmanager
def _run_folder(config: "Config") -> Iterator[Path]:
    """The run's folder, with its flags in config.json and its log in run.log.

    All processes but the first have one of their own instead, which nobody will see.
    """
    from atlas_jax.config import to_dict
    from atlas_jax.runtime.process_group import process_group
    from atlas_jax.storage.files import write_json

    with contextlib.ExitStack() as stack:
        run = config.run_folder
        if process_group().index:
            run = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="atlas-")))
        try:
            run.mkdir(parents=True, exist_ok=True)
            log = logging.FileHandler(run / "run.log", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{run}: cannot be written ({error.strerror}); choose another --checkpoint_dir") from None
        stack.enter_context(_handler(log))
        write_json(run / "config.json", to_dict(config))
        yield run


def _index(argv: Sequence[str]) -> None:
    from atlas_jax.commands.index import main as index

    index(argv)


def _convert(argv: Sequence[str]) -> None:
    from atlas_jax.commands.convert import main as convert

    convert(argv)


def _plan(argv: Sequence[str]) -> int:
    from atlas_jax.commands.flags import parse_plan
    from atlas_jax.commands.plan import plan

    return plan(*parse_plan(argv), argv)


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    logging.getLogger("atlas_jax").setLevel(logging.INFO)
    with _handler(logging.StreamHandler()):
        yield


@contextlib.contextmanager
def _handler(handler: logging.Handler) -> Iterator[None]:
    """Log records go to the handler too, until the block ends."""
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


if __name__ == "__main__":
    sys.exit(main())
