"""`atlas convert`: converts weights between formats, a part at a time; `--inspect` prints what a checkpoint holds."""

import argparse
import functools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.export import write_huggingface, write_reference
from atlas_jax.checkpoints.inspection import inspect, lines
from atlas_jax.checkpoints.restore import PUBLISHED, open_weights
from atlas_jax.commands.flags import Parser, field_comments
from atlas_jax.config import READERS, Config, ModelConfig, RetrievalConfig, TaskConfig
from atlas_jax.config.run_weights import follow_link
from atlas_jax.errors import UserError
from atlas_jax.runtime.progress import byte_progress
from atlas_jax.storage.files import can_write, is_empty
from atlas_jax.storage.paths import expand_home

logger = logging.getLogger(__name__)

FORMATS = ("orbax", "huggingface", "reference")
EXAMPLES = """
examples:
  the published weights, into a folder that needs nothing else:
    atlas convert --model_path models/atlas/xxl --reader_model_type google/t5-xxl-lm-adapt --output models/xxl
  a T5 and a Contriever that never met, from their Hugging Face folders:
    atlas convert --reader_model_type t5-base-lm-adapt/ --retriever_model_path contriever/ --output models/fresh
  a trained model, for transformers (reader/ and retriever/) or for the PyTorch Atlas (model.pth.tar):
    atlas convert --model_path runs/mmlu/checkpoint/latest --to huggingface --output exported/mmlu
    atlas convert --model_path runs/mmlu/checkpoint/latest --to reference --output exported/mmlu.torch
  what is in a folder or file, in a moment however large it is:
    atlas convert --inspect models/atlas/xxl
"""


def main(argv: Sequence[str]) -> None:
    """Converts the weights that the flags name into --output, or prints the contents of the --inspect path."""
    args = _parser().parse_args(argv)
    if args.inspect:
        facts = inspect(follow_link(Path(args.inspect)))
        print(json.dumps(facts, indent=2) if args.json else "\n".join(lines(facts)))
        return
    output = Path(args.output or "")
    _check_args(args)
    check = functools.partial(_check_output, args)
    check()
    model = ModelConfig(args.reader_model_type, args.retriever_model_path, args.model_path)
    weights = open_weights(Config(model, TaskConfig("base"), retrieval=RetrievalConfig()))
    with byte_progress("converting", sum(array.nbytes for array in weights.params.values())) as advance:
        if args.to == "huggingface":
            write_huggingface(output, weights, advance, check)
        elif args.to == "reference":
            write_reference(output, weights, advance, check)
        else:
            store.save(output, weights, on_bytes=advance, check=check)
    logger.info("wrote %s%s", output, _usage_hint(args.to, output))


def _parser() -> Parser:
    comments = field_comments(ModelConfig)
    parser = Parser(
        prog="atlas convert",
        description="Converts weights: PyTorch Atlas, Hugging Face and ours, each into each, whatever their size.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag in ("model_path", "reader_model_type", "retriever_model_path"):
        default = getattr(ModelConfig, flag, "")
        parser.add_argument(f"--{flag}", type=_expand(flag), default=default, help=comments[flag], metavar="PATH")
    text = "folder to write; one of ours is replaced"
    parser.add_argument("--output", type=_expand("output"), help=text, metavar="DIR")
    formats = f"form to write: orbax is ours; huggingface has a folder for each model; reference is {PUBLISHED}"
    parser.add_argument("--to", choices=FORMATS, default="orbax", help=f"{formats} (default: orbax)")
    text = "describe a checkpoint or model, and write nothing"
    parser.add_argument("--inspect", type=_expand("inspect"), help=text, metavar="PATH")
    parser.add_argument("--json", action="store_true", help="print the description as JSON")
    return parser


def _expand(flag: str) -> Callable[[str], str]:
    """The `type` of a flag that names a path: expands its `~`."""
    return functools.partial(expand_home, name=f"--{flag} ")


def _check_output(args: argparse.Namespace) -> None:
    """UserError unless --output can be written, and is new, empty or an Orbax checkpoint to replace."""
    output = Path(args.output)
    if output.exists() and not is_empty(output) and not (args.to == "orbax" and store.is_checkpoint(output)):
        problem = "is there and no checkpoint of ours" if args.to == "orbax" else "is there"
        raise UserError(f"--output {output}: {problem}; choose a new folder")
    if not can_write(output):
        raise UserError(f"--output {output}: cannot be written; choose another folder")


def _check_args(args: argparse.Namespace) -> None:
    """Checks, without opening a file, that --output and the models are named."""
    if not args.output:
        raise UserError("--output is missing: name the folder to write, or --inspect PATH to only look")
    folder = follow_link(Path(args.model_path))
    if args.model_path != "none" and not folder.is_dir():
        raise UserError(f"--model_path {args.model_path}: no such folder; name one with {PUBLISHED}, or one of ours")
    if not args.reader_model_type and not store.is_checkpoint(folder):
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")


def _usage_hint(output_format: str, output: Path) -> str:
    """End of the log line about the written folder: what loads it."""
    if output_format == "reference":
        return "; the reference's --model_path takes it, torch.load opens it with weights_only=True"
    if output_format == "orbax":
        return "; pass it as --model_path, it needs no --reader_model_type"
    folders = sorted(path.name for path in output.iterdir())
    return f": {', '.join(folders)}; transformers' from_pretrained loads each"
