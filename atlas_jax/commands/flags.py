"""Parses a command line into a `Config`, or raises a `UserError` of one line.

Checks what `config` cannot: the flags that the command needs, and that the files exist.
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

from atlas_jax.commands.presets import PRESETS
from atlas_jax.config import (
    CHECKPOINT_FILE,
    READERS,
    Command,
    Config,
    ModelConfig,
    NoEffectConfig,
    PathText,
    RetrievalConfig,
    require,
)
from atlas_jax.errors import UserError
from atlas_jax.plan.plan_config import PlanConfig
from atlas_jax.storage.paths import check_text_file, expand_home

logger = logging.getLogger(__name__)

T = TypeVar("T")


def find_command(program: str, commands: Mapping[str, T], name: str) -> T:
    """Returns `commands[name]`; UserError, with the nearest name, if there is no such command."""
    if name not in commands:
        raise UserError(f"{program} {name}: no such command; {_suggest(name, list(commands))}")
    return commands[name]


def _suggest(text: str, choices: Sequence[str], fallback: str = "") -> str:
    """Names the choice nearest to `text`; if none is near, returns `fallback`, or names all choices."""
    matches = difflib.get_close_matches(text.lower(), choices, n=1)
    return f"did you mean {matches[0]}?" if matches else fallback or f"choose from {', '.join(choices)}"


GROUPS: dict[str, type[Any]] = get_type_hints(Config)  # field of `Config` to its class


def parse_args(command: Command, argv: Sequence[str]) -> Config:
    """Parses the flags of `atlas train` or `atlas evaluate`, which are the same; `--help` prints and exits."""
    config = make_config(_flag_values(command, argv))
    _check_inputs(command, config)
    return config


def parse_plan(argv: Sequence[str]) -> tuple[Config, PlanConfig]:
    """Parses the flags of `atlas plan`: the run and the machine; no file that the run names need exist."""
    values = _flag_values("plan", argv)
    plan_config = PlanConfig(
        **{field.name: values.pop(field.name) for field in fields(PlanConfig) if field.name in values}
    )
    config = make_config({"task": "qa"} | values)
    _refuse_retrieve_only(config.retrieval)
    _check_reader_model_type(config.model)
    return config, plan_config


def _flag_values(command: Command, argv: Sequence[str]) -> dict[str, Any]:
    """Values of the flags on the command line, by name; UserError if one is unknown or a required one is missing."""
    namespace, unknown = _parser(command).parse_known_args(argv)
    given = vars(namespace)
    values = PRESETS[command][given.pop("preset")]() | given if "preset" in given else given
    flags = {field.name: field for group in _groups(command) for field in fields(group)}
    if unknown:
        problem = "no such flag" if unknown[0].startswith("-") else "a value that belongs to no flag"
        remedy = _suggest(unknown[0].split("=")[0], [f"--{flag}" for flag in flags], f"see atlas {command} --help")
        raise UserError(f"{unknown[0]}: {problem}; {remedy}")
    for flag, field in flags.items():
        if field.default is MISSING and flag not in values and command != "plan":
            raise UserError(f"--{flag} is missing: {_suggest('', get_args(field.type) or READERS)}")
        if flag in NO_EFFECT and flag in given:
            logger.warning("--%s has no effect: %s", flag, NO_EFFECT[flag])
    return values


def make_config(values: Mapping[str, Any]) -> Config:
    """Builds a `Config` from flag values that argparse has converted; flags left out have their defaults."""
    values = {flag: tuple(value) if isinstance(value, list) else value for flag, value in values.items()}
    groups = {
        name: {f.name: values[f.name] for f in fields(group) if f.name in values} for name, group in GROUPS.items()
    }
    return Config(**{name: GROUPS[name](**group_values) for name, group_values in groups.items()})


def _check_inputs(command: Command, config: Config) -> None:
    """Checks the flags that the command requires and that the files and folders exist; UserError otherwise."""
    run, model, retrieval, index = config.run, config.model, config.retrieval, config.index
    if not (run.eval_data if command == "evaluate" else run.train_data):
        kind = command.removesuffix("uate")
        raise UserError(f"no {kind} file: pass --{kind}_data FILE.jsonl")
    if command == "train":
        _refuse_retrieve_only(config.retrieval)
    if not (index.load_index_path or index.passages or retrieval.use_file_passages):
        raise UserError("no passages: pass --load_index_path, --passages, --use_file_passages or --closed_book")
    for flag, files in (("train_data", run.train_data), ("eval_data", run.eval_data), ("passages", index.passages)):
        for file in files:
            check_text_file(file, f"--{flag} ", seekable=flag != "passages")
    folder = config.weights_folder
    exists = model.model_path == "none" or (folder is not None and folder.is_dir())
    require(exists, model, "model_path", "no such folder; leave it out to start from plain T5 and Contriever")
    exists = index.load_index_path is None or Path(index.load_index_path).is_dir()
    require(exists, index, "load_index_path", "no such folder; --passages FILE.jsonl builds an index")
    reader = model.reader_model_type
    if not reader and folder and (folder / CHECKPOINT_FILE).is_file():
        return
    _check_reader_model_type(config.model)


def _refuse_retrieve_only(retrieval: RetrievalConfig) -> None:
    """Refuses --retrieve_only, which has no reader to train or to plan for."""
    if retrieval.retrieve_only:
        raise UserError("--retrieve_only: is for atlas evaluate; training needs the reader")


def _check_reader_model_type(model: ModelConfig) -> None:
    """Refuses a --reader_model_type that is neither one of READERS nor a folder with config.json."""
    reader = model.reader_model_type
    if not reader:
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")
    known = reader in READERS or (Path(reader) / "config.json").is_file()
    problem = "a folder without config.json" if Path(reader).is_dir() else "neither a known reader nor a local folder"
    require(known, model, "reader_model_type", f"{problem}; {_suggest(reader, READERS)}")


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
    """An `ArgumentParser` that raises a `UserError` instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


@functools.cache
def _parser(command: Command) -> argparse.ArgumentParser:
    parser = Parser(f"atlas {command}", EXAMPLES[command], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument_group("Preset (a published experiment, see docs/training.md)").add_argument(
        "--preset",
        metavar="NAME",
        type=functools.partial(_preset_name, command),
        help=f"start from the flags of {', '.join(PRESETS[command])}; flags beside it replace its own, and --no-FLAG "
        "turns a switch off",
    )
    for group in _groups(command):
        add_flags(parser.add_argument_group(group.__doc__), group, *(field.name for field in fields(group)))
    return parser


def _preset_name(command: Command, name: str) -> str:
    """The name itself; UserError if the command has no such preset."""
    if name not in PRESETS[command]:
        others = [other for other, presets in PRESETS.items() if name in presets and other != "plan"]
        remedy = f"is for atlas {others[0]}" if others else _suggest(name, list(PRESETS[command]))
        raise UserError(f"--preset {name}: {remedy}")
    return name


def _groups(command: Command) -> list[type[Any]]:
    """Configuration classes whose fields are flags of the command."""
    return [PlanConfig, *GROUPS.values()] if command == "plan" else [*GROUPS.values()]


def add_flags(parser: Any, group: type[Any], *names: str) -> None:
    """Adds the flags `names` of a configuration class to a parser or to an argument group of one."""
    by_name, comments = {field.name: field for field in fields(group)}, field_comments(group)
    for name in names:
        parser.add_argument(f"--{name}", **_argument_options(by_name[name], comments[name]))


def _argument_options(field: Field[Any], text: str) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field, by its type; `text` is its help."""
    # `X | None` is parsed as X
    flag_type: Any = get_args(field.type)[0] if NoneType in get_args(field.type) else field.type
    text = text.replace("%", "%%")
    if flag_type is bool:
        return {"help": text, "action": argparse.BooleanOptionalAction}
    if field.default not in (None, ()):
        text += " (required)" if field.default is MISSING else f" (default: {field.default})"
    if get_origin(flag_type) is tuple:
        convert = functools.partial(_convert_value, field.name, get_args(flag_type)[0])
        return {"help": text, "type": convert, "nargs": "+", "metavar": "FILE"}
    convert = functools.partial(_convert_value, field.name, flag_type)
    if get_origin(flag_type) is Literal:
        return {"help": text, "type": convert, "choices": get_args(flag_type)}
    return {"help": text, "type": convert, "metavar": {int: "N", float: "X", str: "TEXT", PathText: "PATH"}[flag_type]}


def _convert_value(flag: str, flag_type: Any, text: str) -> Any:
    """Converts the text of a flag's value to its type; UserError if it is no choice, no number, or a `~` of nobody."""
    if flag_type is PathText:
        return expand_home(text, f"--{flag} ")
    if choices := get_args(flag_type):
        if text in choices:
            return text
        raise UserError(f"--{flag} {text}: {_suggest(text, choices)}")
    try:
        return flag_type(text)
    except ValueError:
        raise UserError(f"--{flag} {text}: expected a {'whole ' if flag_type is int else ''}number") from None


def field_comments(group: type[Any]) -> dict[str, str]:
    """Maps each field of a configuration class to the comment beside it, with the comment lines right below joined."""
    comments: dict[str, str] = {}
    names, name = {f.name for f in fields(group)}, ""
    for kind, text, (_, column), _, line in tokenize.generate_tokens(io.StringIO(inspect.getsource(group)).readline):
        if kind == tokenize.NAME and column == 4 and text in names:
            name = text
        elif kind == tokenize.COMMENT and name:
            comments[name] = f"{comments.get(name, '')} {text.lstrip('# ')}".strip()
        elif kind == tokenize.NL and not line.strip():
            name = ""  # a blank line: the next comment is not about this field
    return comments


NO_EFFECT = field_comments(NoEffectConfig)  # flag that is accepted but does nothing -> why
