"""`atlas index build | convert | compress | inspect | merge`: what a person does with an index between runs."""

import argparse
import dataclasses
import logging
import os
import random
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atlas_jax.commands.flags import Parser, add_flags, choose, make_config
from atlas_jax.config import OUR_CHECKPOINT, READERS, Config, IndexConfig, ModelConfig, RunConfig, TextConfig
from atlas_jax.errors import UserError

if TYPE_CHECKING:
    from atlas_jax.retrieval.compress import Queries
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

MODEL = ("model_path", "reader_model_type", "retriever_model_path")


def main(argv: Sequence[str]) -> None:
    """Runs one of the five."""
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
    choose("atlas index", commands, argv[0])(argv[1:])


def _build(argv: Sequence[str]) -> None:
    parser = _parser(
        "build",
        "Embeds passages with the passage encoder of a checkpoint and writes an index.",
        """example:
  atlas index build --model_path models/base --passages wiki-1.jsonl wiki-2.jsonl --output index/base
in parts, side by side on several machines: give each some of the files and an --output of its own, then
  atlas index merge index/part1 index/part2 --output index/base""",
    )
    add_flags(parser, ModelConfig, *MODEL, "precision")
    add_flags(parser, IndexConfig, "passages", "max_passages", "index_mode", "faiss_index_type", "faiss_code_size")
    add_flags(parser, IndexConfig, "per_gpu_embedder_batch_size")
    add_flags(parser, TextConfig, "text_maxlength", "retriever_format")
    add_flags(parser, RunConfig, "seed", "mesh", "compile_cache")
    _add_output(parser)
    given = vars(parser.parse_args(argv))
    config, output = _config(given), _output(given)
    if not config.index.passages:
        raise UserError("no passages: pass --passages FILE.jsonl")
    for file in config.index.passages:
        if not Path(file).is_file():
            raise UserError(f"--passages {file}: no such file")
    embedder, fingerprint = _embedder(config, "passage")
    from atlas_jax.retrieval.passage_index import build_passage_index

    build_passage_index(config, embedder, fingerprint, output)
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
    add_flags(parser, ModelConfig, *MODEL)
    add_flags(parser, TextConfig, "text_maxlength", "retriever_format")
    _add_output(parser)
    given = vars(parser.parse_args(argv))
    source, output = _source(given), _output(given)
    from atlas_jax.retrieval.formats.convert import FlatIndexFolder, convert
    from atlas_jax.retrieval.formats.index_folder import is_index
    from atlas_jax.retrieval.formats.torch_shards import TorchShards

    shards = FlatIndexFolder(source) if is_index(source) else TorchShards(source)
    if given["to"] == "published":
        from atlas_jax.retrieval.formats.export import export_torch_shards

        export_torch_shards(shards, output, given["shards"])
    else:
        convert(shards, output, _origin(given, shards.dim, shards.origin))
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
    parser.add_argument("--queries", help="jsonl rows with `question` to measure recall with", metavar="FILE")
    _add_number(parser, "sample", 200, "how many queries, at most")
    _add_number(parser, "k", 20, "how many passages a query finds")
    add_flags(parser, ModelConfig, *MODEL)
    add_flags(parser, TextConfig, "text_maxlength")
    add_flags(parser, RunConfig, "seed")
    _add_output(parser)
    given = vars(parser.parse_args(argv))
    if "faiss_index_type" not in given:
        raise UserError("--faiss_index_type is missing: choose ivfsq (a quarter of the bytes), or ivfpq or pq (fewer)")
    source, output, config = _source(given), _output(given), _config(given | {"index_mode": "faiss"})
    from atlas_jax.retrieval.compress import compress, from_passages
    from atlas_jax.retrieval.formats.index_folder import read_about, read_vectors

    if given["sample"] < 1:
        raise UserError(f"--sample {given['sample']}: must be at least 1")
    count = len(read_vectors(source, read_about(source)))
    if not 0 < given["k"] < count:
        raise UserError(f"--k {given['k']}: must be 1 to {count - 1}, as the index holds {count} passages")
    if "queries" in given:
        queries = _questions(given["queries"], given["sample"], config, source)
    else:
        queries = from_passages(source, given["sample"], config.run.seed)
    before, after = compress(source, output, config, queries, given["k"])
    recall = f"recall@{given['k']}"
    print(f"{'':10}{'bytes':>16}{'bytes/passage':>16}{recall:>12}{'ms/query':>12}")
    for name, cost in (("before", before), ("after", after)):
        print(f"{name:10}{cost.bytes:16}{cost.bytes / count:16.1f}{cost.recall:12.4f}{cost.milliseconds:12.3f}")
    logger.info("%d %s as queries", len(queries.own), "questions" if "queries" in given else "passages")


def _inspect(argv: Sequence[str]) -> None:
    parser = _parser(
        "inspect",
        "Prints what the folder of an index holds, ours or the published shards, without loading it. Files that are "
        "missing or cut short are an error.",
        "example: atlas index inspect index/xxl",
    )
    parser.add_argument("folder", metavar="DIR")
    given = vars(parser.parse_args(argv))
    from atlas_jax.retrieval.formats.inspection import inspect

    for name, value in inspect(Path(given["folder"])).items():
        print(f"{name + ':':20}{value}")


def _merge(argv: Sequence[str]) -> None:
    parser = _parser(
        "merge",
        "Writes several flat indexes of one retriever as one, the passages of the first before those of the second.",
        "example: atlas index merge index/part1 index/part2 --output index/base",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR")
    _add_output(parser)
    given = vars(parser.parse_args(argv))
    folders = [Path(folder) for folder in given["folders"]]
    for folder in folders:
        _source(given | {"load_index_path": str(folder)}, flag="")
    output = _output(given)
    from atlas_jax.retrieval.formats.convert import convert
    from atlas_jax.retrieval.formats.merge import MergedIndexes

    parts = MergedIndexes(folders)
    convert(parts, output, parts.origin)
    logger.info("wrote %s; pass it as --load_index_path", output)


def _parser(name: str, description: str, examples: str) -> Parser:
    """A parser whose flags are there only if they are given, unless they have a default of their own."""
    return Parser(
        prog=f"atlas index {name}",
        description=textwrap.fill(description, 110),
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )


def _add_source(parser: Parser, text: str) -> None:
    parser.add_argument("--load_index_path", help=f"{text} (required)", metavar="DIR")


def _add_output(parser: Parser) -> None:
    text = "folder to write (required); an index of ours there is replaced, anything else is left alone"
    parser.add_argument("--output", help=text, metavar="DIR")


def _add_number(parser: Parser, name: str, default: int, text: str) -> None:
    parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})", metavar="N")


def _config(given: dict[str, Any]) -> Config:
    """The run that these flags belong to: one that retrieves and does not read."""
    return make_config(given | {"task": "base", "retrieve_only": True})


def _source(given: dict[str, Any], flag: str = "--load_index_path ") -> Path:
    """The folder to read, which must not be the one to write."""
    source = Path(_need(given, "load_index_path", "read"))
    if not source.is_dir():
        raise UserError(f"{flag}{source}: no such folder; name the folder of an index")
    output = Path(_need(given, "output", "write"))
    if output.exists() and source.samefile(output):
        raise UserError(f"--output {output}: is the folder that is read; choose another")
    return source


def _output(given: dict[str, Any]) -> Path:
    from atlas_jax.retrieval.formats.index_folder import check_replaceable

    output = Path(os.path.abspath(_need(given, "output", "write")))
    check_replaceable(output, "--output")
    return output


def _need(given: dict[str, Any], flag: str, what: str) -> str:
    """A flag that must be there; argparse, if it insisted, would not tell of a misspelt one."""
    if flag not in given:
        raise UserError(f"--{flag} is missing: name the folder to {what}")
    return given[flag]


def _embedder(config: Config, side: Literal["query", "passage"]) -> "tuple[Embedder, str]":
    """One side of the retriever, and the fingerprint of its passage side."""
    if not config.model.reader_model_type and not (Path(config.model.model_path) / OUR_CHECKPOINT).is_file():
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")
    from atlas_jax.checkpoints.restore import place_on_mesh, restore, retriever_fingerprint
    from atlas_jax.mesh import make_mesh
    from atlas_jax.retrieval.embedder import Embedder
    from atlas_jax.runtime.compiled import enable_compilation_cache

    enable_compilation_cache(config.run.compile_cache)
    mesh, weights = make_mesh(config.run.mesh), restore(config)
    retriever, tokenizer = place_on_mesh(weights, config, mesh).retriever, weights.retriever_tokenizer
    assert retriever is not None
    assert tokenizer is not None
    length = min(config.text.retriever_maxlength, retriever.encoder_of("query").cfg.max_positions)
    return Embedder(retriever, side, tokenizer, mesh, length), retriever_fingerprint(weights.params)


def _questions(file: str, sample: int, config: Config, source: Path) -> "Queries":
    """Questions of a file, drawn at random, as the retriever embeds them."""
    from atlas_jax.data.jsonl import JsonlRows
    from atlas_jax.retrieval.compress import from_questions
    from atlas_jax.retrieval.formats.index_folder import check_retriever, read_about

    rows = JsonlRows(file)
    numbers = sorted(random.Random(config.run.seed).sample(range(len(rows)), min(sample, len(rows))))
    questions = [rows[number].get("question") or "" for number in numbers]
    for number, question in zip(numbers, questions, strict=True):
        if not isinstance(question, str) or not question:
            raise rows.error(number, "no `question`; name a file whose rows have one, or leave --queries out")
    embedder, fingerprint = _embedder(config, "query")
    check_retriever(source, read_about(source), embedder.dim, [fingerprint])
    return from_questions(embedder, questions)


def _origin(given: dict[str, Any], dim: int, known: "Origin") -> "Origin":
    """Where vectors are from: what is known, and what the flags add."""
    from atlas_jax.retrieval.formats.index_folder import check_retriever

    retriever = known.retriever
    if {"model_path", "reader_model_type"} & given.keys():
        embedder, retriever = _embedder(_config(given), "passage")
        check_retriever(
            Path(given["load_index_path"]), {"dim": dim, "retriever": known.retriever}, embedder.dim, [retriever]
        )
    text = _config(given).text
    return dataclasses.replace(
        known,
        retriever=retriever,
        retriever_format=text.retriever_format if "retriever_format" in given else known.retriever_format,
        max_length=text.retriever_maxlength if "text_maxlength" in given else known.max_length,
    )
