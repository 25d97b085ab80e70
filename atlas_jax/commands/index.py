"""`atlas index build | convert | compress | inspect | merge`: commands that make and inspect an index between runs."""

import argparse
import dataclasses
import functools
import logging
import os
import random
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atlas_jax.commands.flags import Parser, add_flags, find_command, make_config
from atlas_jax.config import CHECKPOINT_FILE, READERS, Config, IndexConfig, ModelConfig, RunConfig, TextConfig
from atlas_jax.config.run_weights import follow_link
from atlas_jax.errors import UserError
from atlas_jax.storage.paths import check_text_file, expand_home

if TYPE_CHECKING:
    from atlas_jax.retrieval.compress import RecallQueries
    from atlas_jax.retrieval.embedder import Embedder
    from atlas_jax.retrieval.formats.index_folder import Origin

logger = logging.getLogger(__name__)

USAGE = """usage: atlas index COMMAND [FLAGS]

An index is passages, their vectors, and which retriever made them; runs take it with --load_index_path.

  build      embed passages:                                    atlas index build --help
  convert    the published shards to ours, and back:            atlas index convert --help
  compress   a flat index to a faiss type, and what that costs: atlas index compress --help
  inspect    what a folder holds, and whether it is whole:      atlas index inspect --help
  merge      indexes built in parts to one:                     atlas index merge --help
"""

MODEL_FLAGS = ("model_path", "reader_model_type", "retriever_model_path")


def main(argv: Sequence[str]) -> None:
    """Prints USAGE, or runs the subcommand; UserError if there is no such subcommand."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "build": _build,
        "convert": _convert,
        "compress": _compress,
        "inspect": _inspect,
        "merge": _merge,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    find_command("atlas index", commands, argv[0])(argv[1:])


def _build(argv: Sequence[str]) -> None:
    parser = _parser(
        "build",
        "Embeds passages with the passage encoder of a checkpoint and writes an index.",
        """example:
  atlas index build --model_path models/base --passages wiki-1.jsonl wiki-2.jsonl --output index/base
in parts, side by side on several machines: give each some of the files and an --output of its own, then
  atlas index merge index/part1 index/part2 --output index/base""",
    )
    add_flags(parser, ModelConfig, *MODEL_FLAGS, "precision")
    add_flags(parser, IndexConfig, "passages", "max_passages", "index_mode", "faiss_index_type", "faiss_code_size")
    add_flags(parser, IndexConfig, "per_gpu_embedder_batch_size")
    add_flags(parser, TextConfig, "text_maxlength", "retriever_format")
    add_flags(parser, RunConfig, "seed", "mesh", "cache_dir", "compile_cache")
    _add_output(parser)
    args = vars(parser.parse_args(argv))
    config, output = _config(args), _output_folder(args)
    if not config.index.passages:
        raise UserError("no passages: pass --passages FILE.jsonl")
    for file in config.index.passages:
        check_text_file(file, "--passages ", seekable=False)
    embedder, fingerprint = _load_embedder(config, "passage")
    from atlas_jax.retrieval.passage_index import build_passage_index

    build_passage_index(config, embedder, fingerprint, output, "choose another --output, with room")
    logger.info("wrote %s; pass it as --load_index_path", output)


def _convert(argv: Sequence[str]) -> None:
    parser = _parser(
        "convert",
        "Reads the published shards (embeddings.N.pt, passages.N.pt), however many there are, and writes one "
        "memory-mapped array, of which any number of hosts and devices read their rows. With a model, the index "
        "remembers it, and the queries of another will be refused; the shards cannot say which it was. "
        "`--to published` writes shards, of shards or of a flat index of ours.",
        """examples:
  atlas index convert --load_index_path indices/atlas/wiki/xxl --output index/xxl
  atlas index convert --load_index_path indices/atlas/wiki/xxl --output index/xxl --model_path models/xxl
for the PyTorch code, on as many GPUs as divide the number of shards:
  atlas index convert --load_index_path index/xxl --output shards --to published --shards 64""",
    )
    _add_source(parser, "folder of the published shards, or of a flat index of ours")
    parser.add_argument("--to", choices=("ours", "published"), default="ours", help="form to write (default: ours)")
    _add_number(parser, "shards", 128, "with --to published, how many")
    add_flags(parser, ModelConfig, *MODEL_FLAGS)
    add_flags(parser, TextConfig, "text_maxlength", "retriever_format")
    _add_output(parser)
    args = vars(parser.parse_args(argv))
    source, output = _source_folder(args), _output_folder(args)
    from atlas_jax.retrieval.formats.convert import FlatIndexFolder, convert
    from atlas_jax.retrieval.formats.index_folder import is_index
    from atlas_jax.retrieval.formats.torch_shards import TorchShards

    shards = FlatIndexFolder(source) if is_index(source) else TorchShards(source)
    if args["to"] == "published":
        from atlas_jax.retrieval.formats.export import export_torch_shards

        export_torch_shards(shards, output, args["shards"])
    else:
        convert(shards, output, _index_origin(args, shards.dim, shards.origin))
    logger.info("wrote %s; pass it as --load_index_path", output)


def _compress(argv: Sequence[str]) -> None:
    parser = _parser(
        "compress",
        "Writes a flat index as a faiss type: trained on a sample, then filled as a stream. Prints what that costs: "
        "recall@k, the share of the best k passages by exact search that the new index has among its k; bytes; time. "
        "Without --queries, passages drawn at random stand for questions (each without itself).",
        """examples, from good to small:
  atlas index compress --load_index_path index/xxl --output index/xxl-sq --faiss_index_type ivfsq
  atlas index compress --load_index_path index/xxl --output index/xxl-pq --faiss_index_type ivfpq --faiss_code_size 64
with questions of your own (jsonl rows with `question`), which another model may find harder than passages:
  atlas index compress ... --queries data/nq_data/dev.jsonl --model_path models/xxl
then: atlas evaluate ... --load_index_path index/xxl-sq --index_mode faiss --faiss_index_type ivfsq""",
    )
    _add_source(parser, "folder of a flat index of ours")
    add_flags(parser, IndexConfig, "faiss_index_type", "faiss_code_size")
    _add_path(parser, "--queries", "FILE", "jsonl rows with `question` to measure recall with")
    _add_number(parser, "sample", 200, "how many queries, at most")
    _add_number(parser, "k", 20, "how many passages a query finds")
    add_flags(parser, ModelConfig, *MODEL_FLAGS)
    add_flags(parser, TextConfig, "text_maxlength")
    add_flags(parser, RunConfig, "seed")
    _add_output(parser)
    args = vars(parser.parse_args(argv))
    if "faiss_index_type" not in args:
        raise UserError("--faiss_index_type is missing: choose ivfsq (a quarter of the bytes), or ivfpq or pq (fewer)")
    source, output, config = _source_folder(args), _output_folder(args), _config(args | {"index_mode": "faiss"})
    from atlas_jax.retrieval.compress import compress, from_passages
    from atlas_jax.retrieval.formats.index_folder import read_metadata, read_vectors

    if args["sample"] < 1:
        raise UserError(f"--sample {args['sample']}: must be at least 1")
    count = len(read_vectors(source, read_metadata(source)))
    if not 0 < args["k"] < count:
        raise UserError(f"--k {args['k']}: must be 1 to {count - 1}, as the index holds {count} passages")
    if "queries" in args:
        queries = _sample_questions(args["queries"], args["sample"], config, source)
    else:
        queries = from_passages(source, args["sample"], config.run.seed)
    before, after = compress(source, output, config, queries, args["k"])
    recall = f"recall@{args['k']}"
    print(f"{'':10}{'bytes':>16}{'bytes/passage':>16}{recall:>12}{'ms/query':>12}")
    for name, cost in (("before", before), ("after", after)):
        print(
            f"{name:10}{cost.bytes:16}{cost.bytes / count:16.1f}{cost.recall:12.4f}{cost.milliseconds_per_query:12.3f}"
        )
    logger.info("%d %s as queries", len(queries.source_passages), "questions" if "queries" in args else "passages")


def _inspect(argv: Sequence[str]) -> None:
    parser = _parser(
        "inspect",
        "Prints what the folder of an index holds, ours or the published shards, without loading it. Files that are "
        "missing or cut short are an error.",
        "example: atlas index inspect index/xxl",
    )
    _add_path(parser, "folder", "DIR")
    args = vars(parser.parse_args(argv))
    from atlas_jax.retrieval.formats.inspection import inspect

    for name, value in inspect(Path(args["folder"])).items():
        print(f"{name + ':':20}{value}")


def _merge(argv: Sequence[str]) -> None:
    parser = _parser(
        "merge",
        "Writes several flat indexes of one retriever as one, the passages of the first before those of the second.",
        "example: atlas index merge index/part1 index/part2 --output index/base",
    )
    _add_path(parser, "folders", "DIR", nargs="+")
    _add_output(parser)
    args = vars(parser.parse_args(argv))
    folders = [Path(folder) for folder in args["folders"]]
    for folder in folders:
        _source_folder(args | {"load_index_path": str(folder)}, flag="")
    output = _output_folder(args)
    from atlas_jax.retrieval.formats.convert import convert
    from atlas_jax.retrieval.formats.merge import MergedIndexes, check_disjoint

    parts = MergedIndexes(folders)
    check_disjoint(parts)
    convert(parts, output, parts.origin)
    logger.info("wrote %s; pass it as --load_index_path", output)


def _parser(name: str, description: str, examples: str) -> Parser:
    """Builds a subcommand's parser; a flag that is left out is absent from the namespace, unless it has a default."""
    return Parser(
        prog=f"atlas index {name}",
        description=textwrap.fill(description, 110),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def _add_source(parser: Parser, text: str) -> None:
    _add_path(parser, "--load_index_path", "DIR", f"{text} (required)")


def _add_output(parser: Parser) -> None:
    text = "folder to write (required); an index of ours there is replaced, anything else is left alone"
    _add_path(parser, "--output", "DIR", text)


def _add_path(parser: Parser, name: str, metavar: str, text: str | None = None, **options: Any) -> None:
    """Adds a flag or an argument that names a file or a folder; `~` is expanded in its value."""
    expand = functools.partial(expand_home, name=f"{name} ")
    parser.add_argument(name, type=expand, metavar=metavar, help=text, **options)


def _add_number(parser: Parser, name: str, default: int, text: str) -> None:
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})", metavar="N")


def _config(args: dict[str, Any]) -> Config:
    """Builds the configuration of a run that retrieves with these flags and does not read."""
    return make_config(args | {"task": "base", "retrieve_only": True})


def _source_folder(args: dict[str, Any], flag: str = "--load_index_path ") -> Path:
    """The folder to read; UserError if it does not exist or is the one to write."""
    source = Path(_required_folder(args, "load_index_path", "read"))
    if not source.is_dir():
        raise UserError(f"{flag}{source}: no such folder; name the folder of an index")
    output = Path(_required_folder(args, "output", "write"))
    if output.exists() and source.samefile(output):
        raise UserError(f"--output {output}: is the folder that is read; choose another")
    return source


def _output_folder(args: dict[str, Any]) -> Path:
    """Absolute path of --output; UserError if something other than an index is there."""
    from atlas_jax.retrieval.formats.index_folder import check_replaceable

    output = Path(os.path.abspath(_required_folder(args, "output", "write")))
    check_replaceable(output, "--output")
    return output


def _required_folder(args: dict[str, Any], flag: str, purpose: str) -> str:
    """Value of a required flag, or UserError.

    Not `required=True`: argparse would report the missing flag and not the misspelt one.
    """
    if flag not in args:
        raise UserError(f"--{flag} is missing: name the folder to {purpose}")
    return args[flag]


def _load_embedder(config: Config, side: Literal["query", "passage"]) -> "tuple[Embedder, str]":
    """Loads one encoder of the retriever; returns it with the fingerprint of the passage encoder."""
    if (
        not config.model.reader_model_type
        and not (follow_link(Path(config.model.model_path)) / CHECKPOINT_FILE).is_file()
    ):
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")
    from atlas_jax.checkpoints.restore import place_on_mesh, restore, retriever_fingerprint
    from atlas_jax.mesh import make_mesh
    from atlas_jax.retrieval.embedder import Embedder
    from atlas_jax.runtime.backend import start_backend
    from atlas_jax.runtime.compiled import enable_compilation_cache
    from atlas_jax.storage.cache import cache_folder

    start_backend()
    enable_compilation_cache(config.run.compile_cache, cache_folder(config.run.cache_dir))
    mesh, weights = make_mesh(config.run.mesh), restore(config)
    retriever, tokenizer = place_on_mesh(weights, config.model, mesh).retriever, weights.retriever_tokenizer
    assert retriever is not None
    assert tokenizer is not None
    length = min(config.text.retriever_maxlength, retriever.encoder_of("query").cfg.max_positions)
    return Embedder(retriever, side, tokenizer, mesh, length), retriever_fingerprint(weights.params)


def _sample_questions(file: str, sample: int, config: Config, source: Path) -> "RecallQueries":
    """Embeds up to `sample` questions of a file, drawn at random; UserError if a row has none."""
    from atlas_jax.data.jsonl import JsonlRows
    from atlas_jax.retrieval.compress import from_questions
    from atlas_jax.retrieval.formats.index_folder import check_retriever, read_metadata

    check_text_file(file, "--queries ")
    rows = JsonlRows(file)
    numbers = sorted(random.Random(config.run.seed).sample(range(len(rows)), min(sample, len(rows))))
    questions = [rows[number].get("question") or "" for number in numbers]
    for number, question in zip(numbers, questions, strict=True):
        if not isinstance(question, str) or not question:
            raise rows.error(number, "no `question`; name a file whose rows have one, or leave --queries out")
    embedder, fingerprint = _load_embedder(config, "query")
    check_retriever(source, read_metadata(source), embedder.dim, [fingerprint])
    return from_questions(embedder, questions)


def _index_origin(args: dict[str, Any], dim: int, known: "Origin") -> "Origin":
    """Adds to the known origin of an index what the flags say: its retriever, passage format and text length."""
    from atlas_jax.retrieval.formats.index_folder import check_retriever

    retriever = known.retriever
    if {"model_path", "reader_model_type"} & args.keys():
        embedder, retriever = _load_embedder(_config(args), "passage")
        check_retriever(
            Path(args["load_index_path"]), {"dim": dim, "retriever": known.retriever}, embedder.dim, [retriever]
        )
    text = _config(args).text
    return dataclasses.replace(
        known,
        retriever=retriever,
        retriever_format=text.retriever_format if "retriever_format" in args else known.retriever_format,
        max_length=text.retriever_maxlength if "text_maxlength" in args else known.max_length,
    )
