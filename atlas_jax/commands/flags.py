"""A command line becomes a `Config`, or one line that says what is wrong with it.

Adds to the checks of `config` what only a command line knows: for which command, and are the files there.
"""

import argparse
import difflib
import functools
import inspect
import io
import logging
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from atlas_jax.config import OUR_CHECKPOINT, READERS, Command, Config, NoEffectConfig, PlanConfig, require
from atlas_jax.errors import UserError

logger = logging.getLogger(__name__)

Choice = TypeVar("Choice")


def choose(program: str, commands: Mapping[str, Choice], name: str) -> Choice:
    """What a command's name stands for; UserError if there is no such command."""
    if name not in commands:
        raise UserError(f"{program} {name}: no such command; {_suggest(name, list(commands))}")
    return commands[name]


def _suggest(text: str, known: Sequence[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(text.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise or f"choose from {', '.join(known)}"


GROUPS: dict[str, type[Any]] = get_type_hints(Config)


def parse_args(command: Command, argv: Sequence[str]) -> Config:
    """The run that a command line asks for; both commands take all flags. `--help` prints and exits."""
    config = make_config(_given(command, argv))
    _check_inputs(command, config)
    return config


def parse_plan(argv: Sequence[str]) -> tuple[Config, PlanConfig]:
    """The run that `atlas plan` is asked about, and the machine; no file of the run need be there."""
    given = _given("plan", argv)
    asked = PlanConfig(**{field.name: given.pop(field.name) for field in fields(PlanConfig) if field.name in given})
    config = make_config({"task": "qa"} | given)
    _check_reads(config)
    _check_reader(config)
    return config, asked


def _given(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    """Flag to value, of those that are on the command line."""
    namespace, unknown = _parser(command).parse_known_args(argv)
    given = vars(namespace)
    flags = {field.name: field for group in _groups(command) for field in fields(group)}
    if unknown:
        what = "no such flag" if unknown[0].startswith("-") else "a value that belongs to no flag"
        remedy = _suggest(unknown[0].split("=")[0], [f"--{flag}" for flag in flags], f"see atlas {command} --help")
        raise UserError(f"{unknown[0]}: {what}; {remedy}")
    for flag, field in flags.items():
        if field.default is MISSING and flag not in given and command != "plan":
            raise UserError(f"--{flag} is missing: {_suggest('', get_args(field.type) or READERS)}")
        if flag in WITHOUT_MEANING and flag in given:
            logger.warning("--%s has no effect: %s", flag, WITHOUT_MEANING[flag])
    return given


def make_config(given: Mapping[str, Any]) -> Config:
    """The run of these flags, which argparse has read; the others have their defaults."""
    given = {flag: tuple(value) if isinstance(value, list) else value for flag, value in given.items()}
    groups = {name: {f.name: given[f.name] for f in fields(group) if f.name in given} for name, group in GROUPS.items()}
    return Config(**{name: GROUPS[name](**values) for name, values in groups.items()})


def _check_inputs(command: Command, config: Config) -> None:
    """What a Config cannot know by itself: what the command needs, and what is on the disk."""
    run, model, retrieval, index = config.run, config.model, config.retrieval, config.index
    if not (run.eval_data if command == "evaluate" else run.train_data):
        kind = command.removesuffix("uate")
        raise UserError(f"no {kind} file: pass --{kind}_data FILE.jsonl")
    if command == "train":
        _check_reads(config)
    if not (index.load_index_path or index.passages or retrieval.use_file_passages):
        raise UserError("no passages: pass --load_index_path, --passages, --use_file_passages or --closed_book")
    for flag, files in (("train_data", run.train_data), ("eval_data", run.eval_data), ("passages", index.passages)):
        for file in files:
            if not Path(file).exists() or Path(file).is_dir():
                raise UserError(f"--{flag} {file}: no such file")
    found = model.model_path == "none" or Path(model.model_path).is_dir()
    require(found, model, "model_path", "no such folder; leave it out to start from plain T5 and Contriever")
    found = index.load_index_path is None or Path(index.load_index_path).is_dir()
    require(found, index, "load_index_path", "no such folder; --passages FILE.jsonl builds an index")
    reader = model.reader_model_type
    folder = config.weights_folder
    if not reader and folder and (folder / OUR_CHECKPOINT).is_file():
        return
    _check_reader(config)


def _check_reads(config: Config) -> None:
    """Training, which `atlas plan` is about too, has a reader."""
    if config.retrieval.retrieve_only:
        raise UserError("--retrieve_only: is for atlas evaluate; training needs the reader")


def _check_reader(config: Config) -> None:
    """--reader_model_type is one."""
    model, reader = config.model, config.model.reader_model_type
    if not reader:
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")
    found = reader in READERS or (Path(reader) / "config.json").is_file()
    what = "a folder without config.json" if Path(reader).is_dir() else "neither a known reader nor a local folder"
    require(found, model, "reader_model_type", f"{what}; {_suggest(reader, READERS)}")


EXAMPLES: dict[Command, str] = {
    "train": """atlas train --task qa --train_data train.jsonl --eval_data dev.jsonl --name run1 --precision bf16 \\
         --reader_model_type google/t5-base-lm-adapt --model_path atlas/base --load_index_path index/base \\
         --train_retriever --query_side_retriever_training --n_context 20 --retriever_n_context 20 --lr 4e-5""",
    "evaluate": """atlas evaluate --task qa --eval_data dev.jsonl --name run1 --precision bf16 --write_results \\
         --reader_model_type google/t5-base-lm-adapt --model_path atlas/base --load_index_path index/base""",
    "plan": """atlas plan --topology a100-80gb:8x8 --reader_model_type google/t5-xxl-lm-adapt --precision bf16 \\
         --train_retriever --query_side_retriever_training --n_context 30 --retriever_n_context 30 \\
         --text_maxlength 512 --target_maxlength 16 --passages_count 37500000 \\
         --use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever
       atlas plan --topology v5p:4x4x4 --mesh fsdp=32,passages=2 --reader_model_type google/t5-xl-lm-adapt --json
       Takes the flags of atlas train. Exit status 0: everything fits; 1: it does not; 2: bad input.""",
}


class Parser(argparse.ArgumentParser):
    """Refuses as all of ours does, with a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


@functools.cache
def _parser(command: Command) -> argparse.ArgumentParser:
    parser = Parser(f"atlas {command}", EXAMPLES[command], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for group in _groups(command):
        add_flags(parser.add_argument_group(group.__doc__), group, *(field.name for field in fields(group)))
    return parser


def _groups(command: Command) -> list[type[Any]]:
    return [PlanConfig, *GROUPS.values()] if command == "plan" else [*GROUPS.values()]


def add_flags(parser: Any, group: type[Any], *names: str) -> None:
    """Adds these flags of a group to a parser or to a section of one."""
    known, help_of = {field.name: field for field in fields(group)}, field_comments(group)
    for name in names:
        parser.add_argument(f"--{name}", **_argument(known[name], help_of[name]))


def _argument(field: Field[Any], text: str) -> dict[str, Any]:
    """How argparse takes a field: by its type."""
    kind: Any = get_args(field.type)[0] if NoneType in get_args(field.type) else field.type  # X | None: an X
    text = text.replace("%", "%%")
    if kind is bool:
        return {"help": text, "action": "store_true"}
    if field.default not in (None, ()):
        text += " (required)" if field.default is MISSING else f" (default: {field.default})"
    if get_origin(kind) is tuple:
        return {"help": text, "nargs": "+", "metavar": "FILE"}
    read = functools.partial(_read, field.name, kind)
    if get_origin(kind) is Literal:
        return {"help": text, "type": read, "choices": get_args(kind)}
    return {"help": text, "type": read, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def _read(flag: str, kind: Any, text: str) -> Any:
    """A value of a flag, from its text."""
    if choices := get_args(kind):
        if text in choices:
            return text
        raise UserError(f"--{flag} {text}: {_suggest(text, choices)}")
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{flag} {text}: expected a {'whole ' if kind is int else ''}number") from None


def field_comments(group: type[Any]) -> dict[str, str]:
    """Field to the comment beside it, continued on the comment lines right below."""
    found: dict[str, str] = {}
    names, name = {f.name for f in fields(group)}, ""
    for kind, text, (_, column), _, line in tokenize.generate_tokens(io.StringIO(inspect.getsource(group)).readline):
        if kind == tokenize.NAME and column == 4 and text in names:
            name = text
        elif kind == tokenize.COMMENT and name:
            found[name] = f"{found.get(name, '')} {text.lstrip('# ')}".strip()
        elif kind == tokenize.NL and not line.strip():
            name = ""  # a blank line: the next comment is not about this field
    return found


WITHOUT_MEANING = field_comments(NoEffectConfig)
