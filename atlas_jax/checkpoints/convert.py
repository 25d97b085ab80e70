"""`atlas convert`: a published checkpoint, or a T5 and an encoder, into one folder of ours."""

import logging
from collections.abc import Sequence
from pathlib import Path

from atlas_jax.checkpoints import store
from atlas_jax.checkpoints.restore import restore
from atlas_jax.command_line import Parser, comments
from atlas_jax.config import READERS, Config, ModelConfig, RetrievalConfig, TaskConfig
from atlas_jax.errors import UserError

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Reads what the flags name and writes --output."""
    about = comments(ModelConfig)
    parser = Parser(
        prog="atlas convert",
        description="Writes a checkpoint of ours: weights, shapes and tokenizers in one folder, for --model_path.",
        epilog="example: atlas convert --model_path models/atlas/xxl --reader_model_type google/t5-xxl-lm-adapt "
        "--retriever_model_path facebook/contriever --output models/atlas_jax/xxl",
        allow_abbrev=False,
    )
    for flag in ("model_path", "reader_model_type", "retriever_model_path"):
        parser.add_argument(f"--{flag}", default=getattr(ModelConfig, flag, ""), help=about[flag], metavar="TEXT")
    parser.add_argument("--output", required=True, help="folder to write; one of ours there is replaced", metavar="DIR")
    given = parser.parse_args(argv)
    output = Path(given.output)
    if output.exists() and not store.is_checkpoint(output):
        raise UserError(f"--output {output}: is there and no checkpoint of ours; choose a new folder")
    if not given.reader_model_type and not store.is_checkpoint(Path(given.model_path)):
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")
    model = ModelConfig(given.reader_model_type, given.retriever_model_path, given.model_path)
    weights = restore(Config(model, TaskConfig("base"), retrieval=RetrievalConfig()))
    store.save(output, weights)
    logger.info("wrote %s; pass it as --model_path, it needs no --reader_model_type", output)
