"""The `atlas` command: runs a subcommand, logs to stderr, and turns errors into one line and an exit status."""

import contextlib
import importlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from atlas_jax.commands.run_context import log_handler
from atlas_jax.errors import UserError
from atlas_jax.runtime.cpu_threads import set_cpu_threads
from atlas_jax.runtime.interrupts import Interrupted, Interrupts, exit_while_compiling
from atlas_jax.runtime.streams import discard_unwritable_stdout, prepare_streams

USAGE = """usage: atlas COMMAND [FLAGS]

ATLAS: a retriever and a reader, in JAX (arXiv 2208.03299).

  train      retriever and reader together:  atlas train --help
  evaluate   retrieve, read and score:       atlas evaluate --help
  index      what is searched, made ready:   atlas index --help
  convert    weights of one form to another: atlas convert --help
  plan       will a run fit, how fast is it: atlas plan --help
"""

# Subcommand to the module whose `main` runs it; imported only when called, since JAX takes seconds to import
COMMANDS = {name: f"atlas_jax.commands.{name}" for name in ("train", "evaluate", "index", "convert", "plan")}
INTERRUPTED, BROKEN_PIPE = 130, 141  # exit statuses: 128 + SIGINT and 128 + SIGPIPE, as a shell reports them
MEMORY_FLAGS = {  # by command: flags whose smaller value saves memory
    **dict.fromkeys(("train", "evaluate", "plan"), "--per_gpu_batch_size, --per_gpu_embedder_batch_size"),
    "index build": "--per_gpu_embedder_batch_size",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status.

    0: success; 2: an error, with one line on stderr that says what is wrong and what to do; 128 + the number of the
    signal: interrupted. `atlas plan` also returns 1: the run does not fit.
    """
    prepare_streams()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    finally:
        discard_unwritable_stdout()


def _run(arguments: Sequence[str]) -> int:
    """Runs a subcommand; returns its exit status, after one line on stderr if it fails."""
    try:
        set_cpu_threads()
        with _log_to_stderr():
            status = _dispatch(arguments)
        _flush_stdout()
    except BrokenPipeError:  # the reader of stdout has exited, as in `atlas evaluate --help | head`
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return exit_while_compiling(_print_error("interrupted", INTERRUPTED))
    except Interrupted as interruption:
        goes_on = "; the same command goes on from its newest checkpoint" if arguments[:1] == ["train"] else ""
        return exit_while_compiling(_print_error(f"{interruption}{goes_on}", interruption.status))
    except UserError as error:
        return _print_error(str(error))
    except MemoryError as error:
        return _print_error(f"out of memory ({str(error) or 'of this machine'}); {_memory_remedy(arguments)}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("", "atlas_jax"):
            raise
        made_by = "make plan-env" if Path(sys.prefix).name == ".venv-plan" else "make setup"
        return _print_error(f"{sys.prefix}: is no whole environment ({error}); run `{made_by}`, to its end")
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _print_error(f"{where}{error.strerror}; check the disk, its space and its permissions, and try again")
    except ValueError as error:
        if not _is_raised_by_jax_config(error):
            raise
        return _print_error(f"JAX_* variables of the environment: {error}; correct the variable, or unset it")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # the status that XLA reports when memory runs out
            raise
        return _print_error(f"out of memory ({str(error).splitlines()[0]:.200}); {_memory_remedy(arguments)}")
    return status


def _flush_stdout() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output: cannot be written ({error.strerror}); send it to another place") from None


def _is_raised_by_jax_config(error: ValueError) -> bool:
    """True if JAX raised the error when its import read the environment."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"] == "jax._src.config"


def _memory_remedy(arguments: Sequence[str]) -> str:
    """Returns the remedy for a lack of memory, naming flags that the command has."""
    command = " ".join(arguments[: 2 if arguments[0] == "index" else 1])
    if command not in MEMORY_FLAGS:
        return "take a machine with more, or end other programs"
    return f"take a smaller {MEMORY_FLAGS[command]} or --text_maxlength, or --precision bf16"


def _print_error(message: str, status: int = 2) -> int:
    """Prints one line on stderr and returns `status`."""
    with contextlib.suppress(OSError):
        print(f"atlas: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)
    return status


def _dispatch(arguments: Sequence[str]) -> int:
    """Prints USAGE, or runs the subcommand and returns its exit status; UserError if there is no such subcommand."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    from atlas_jax.commands.flags import find_command  # here, where Ctrl-C is handled

    module = importlib.import_module(find_command("atlas", COMMANDS, arguments[0]))
    command: Callable[[Sequence[str]], int | None] = module.main
    with Interrupts() as interrupts:
        try:
            return command(arguments[1:]) or 0
        except SystemExit as done:
            if done.code:  # 0: argparse has printed --help
                raise
            return 0
        except UserError:
            raise
        except Exception:
            if interrupts.first():  # what a library made of the interruption
                raise Interrupted(interrupts.first()) from None
            raise


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    logging.getLogger("atlas_jax").setLevel(logging.INFO)
    with log_handler(logging.StreamHandler()):
        yield


if __name__ == "__main__":
    sys.exit(main())
