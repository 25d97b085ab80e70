"""Command lines are parsed into a `Config`, or refused with one line; flags and defaults are the reference's."""

import dataclasses
import json
import logging
import re
from dataclasses import fields
from typing import get_args

import pytest

from atlas_jax.commands.flags import EXAMPLES, GROUPS, NO_EFFECT, _flag_values, field_comments, parse_args
from atlas_jax.config import (
    READERS,
    Config,
    DistillConfig,
    ModelConfig,
    RetrievalConfig,
    TaskConfig,
    TextConfig,
    to_dict,
)
from atlas_jax.errors import UserError
from tests.commands.reference_flags import INTEGERS_OR_NONE, REFERENCE_CHOICES, REFERENCE_FLAGS, REQUIRED
from tests.commands.sample_evaluation import evaluate_argv

NEW_FLAGS = {  # flags that the reference does not have
    **{"mesh": "auto", "cache_dir": None, "compile_cache": "auto", "keep": None, "max_bad_steps": 20},
    **{"loss_group": None, "select_by": None, "random_weights": False, "max_orders": None},
    **{"coordinator": None, "num_processes": None, "process_id": None, "host_timeout": 300},
}
FLAGS = {field.name: field for group in GROUPS.values() for field in fields(group)}

ZERO_SHOT = """--precision bf16 --target_maxlength 16 --reader_model_type google/t5-xxl-lm-adapt --text_maxlength 512
    --model_path M --eval_data valid.jsonl test.jsonl --per_gpu_batch_size 1 --n_context 30 --retriever_n_context 30
    --name N --checkpoint_dir S --main_port 15000 --write_results --task multiple_choice
    --multiple_choice_train_permutations all --multiple_choice_eval_permutations cyclic --index_mode flat
    --load_index_path I"""
FEW_SHOT = f"""{ZERO_SHOT} --shuffle --train_retriever --gold_score_mode ppmean --use_gradient_checkpoint_reader
    --use_gradient_checkpoint_retriever --shard_optim --shard_grads --temperature_gold 0.1 --temperature_score 0.1
    --refresh_index -1 --dropout 0.1 --lr 5e-5 --lr_retriever 1e-5 --scheduler linear --weight_decay 0.01
    --train_data T --eval_freq 150 --log_freq 4 --total_steps 2000 --warmup_steps 50 --save_freq 10000000000
    --query_side_retriever_training"""
MINIMAL = "--task qa --reader_model_type t5-small --eval_data test.jsonl --train_data T --load_index_path I"


@pytest.fixture(autouse=True)
def input_files(tmp_path, monkeypatch):
    """Creates the files and folders that the command lines name, in the working directory."""
    for folder in ("M", "I", "empty"):
        (tmp_path / folder).mkdir()
    for file in ("valid.jsonl", "test.jsonl", "T", "passages.jsonl"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)


def refusal(flags: str | list[str], command="evaluate") -> str:
    """The message of the UserError, one line, that parsing these flags raises."""
    with pytest.raises(UserError) as error:
        parse_args(command, flags.split() if isinstance(flags, str) else flags)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_reference_flag_exists_with_its_default():
    """The flags are those of the reference and NEW_FLAGS, each a field of exactly one configuration class."""
    expected = REFERENCE_FLAGS | NEW_FLAGS
    assert FLAGS.keys() == expected.keys()
    assert sum(len(fields(group)) for group in GROUPS.values()) == len(FLAGS)
    assert {name: field.default for name, field in FLAGS.items()} == expected


@pytest.mark.parametrize("flag", REFERENCE_CHOICES)
def test_choices_are_those_of_the_reference(flag):
    assert set(get_args(FLAGS[flag].type)) == REFERENCE_CHOICES[flag]


def test_types_are_those_of_the_reference():
    """Integer flags refuse 0.5, float flags refuse `half` and take 0.5, boolean flags refuse a value."""
    integers = {name for name, default in REFERENCE_FLAGS.items() if type(default) is int} | INTEGERS_OR_NONE
    integers -= {"mlm_mean_noise_span_length"}  # a float, whose default is written 3
    floats = {name for name, default in REFERENCE_FLAGS.items() if type(default) is float}
    floats.add("mlm_mean_noise_span_length")
    for flag in integers:
        assert refusal(f"{MINIMAL} --{flag} 0.5") == f"--{flag} 0.5: expected a whole number"
    for flag in floats:
        assert refusal(f"{MINIMAL} --{flag} half") == f"--{flag} half: expected a number"
        assert to_dict(parse_args("evaluate", [*MINIMAL.split(), f"--{flag}", "0.5"]))[flag] == 0.5
    booleans = {name for name, default in REFERENCE_FLAGS.items() if default is False}
    for flag in booleans:
        assert "ignored explicit argument" in refusal(f"{MINIMAL} --{flag}=1")


def test_the_published_zero_shot_command_parses():
    """The published MMLU evaluation of the 11B model: flags have the values that it passes, or else their defaults."""
    config = parse_args("evaluate", ZERO_SHOT.split())
    passed = {
        "precision": "bf16",
        "target_maxlength": 16,
        "reader_model_type": "google/t5-xxl-lm-adapt",
        "text_maxlength": 512,
        "model_path": "M",
        "eval_data": ("valid.jsonl", "test.jsonl"),
        "n_context": 30,
        "retriever_n_context": 30,
        "name": "N",
        "checkpoint_dir": "S",
        "main_port": 15000,
        "write_results": True,
        "task": "multiple_choice",
        "multiple_choice_train_permutations": "all",
        "multiple_choice_eval_permutations": "cyclic",
        "load_index_path": "I",
    }
    assert to_dict(config) == REFERENCE_FLAGS | NEW_FLAGS | passed
    assert config.task.task == "multiple_choice"
    assert config.index.load_index_path == "I"


def test_the_published_train_command_parses():
    """The published few-shot training parses; the `-1` of --refresh_index is read as a value, not as a flag."""
    config = parse_args("train", FEW_SHOT.split())
    assert config.distill.refresh_index == "-1"
    assert config.run.train_data == ("T",)
    assert config.run.save_freq == 10_000_000_000
    assert config.run.shuffle
    assert (config.optim.lr, config.optim.lr_retriever, config.optim.scheduler) == (5e-5, 1e-5, "linear")
    assert config.distill.train_retriever
    assert config.retrieval.query_side_retriever_training
    assert config.distill.temperature_gold == config.distill.temperature_score == 0.1
    assert config.model.use_gradient_checkpoint_reader
    assert config.model.use_gradient_checkpoint_retriever
    parse_args("evaluate", FEW_SHOT.split())  # both commands have all flags
    assert refusal(ZERO_SHOT, "train") == "no train file: pass --train_data FILE.jsonl"


def test_the_last_of_two_values_is_used():
    assert parse_args("evaluate", f"{MINIMAL} --n_context 2 --n_context 3".split()).retrieval.n_context == 3


def test_config_is_hashable_and_frozen():
    """Equal flags make equal configs, which may be static arguments of a jitted function; json takes their dict."""
    config = parse_args("evaluate", MINIMAL.split())
    assert config == parse_args("evaluate", MINIMAL.split())
    assert hash(config) == hash(parse_args("evaluate", MINIMAL.split()))
    assert config != parse_args("evaluate", f"{MINIMAL} --seed 1".split())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1
    assert json.loads(json.dumps(to_dict(config)))["eval_data"] == ["test.jsonl"]


@pytest.mark.parametrize("flag", NO_EFFECT)
def test_a_flag_without_effect_is_warned_of_once(flag, caplog):
    """The warning comes only if the flag is passed, once even if it is passed twice, with the reason."""
    value = [] if FLAGS[flag].type is bool else ["1"]
    parse_args("evaluate", MINIMAL.split())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        parse_args("evaluate", [*MINIMAL.split(), f"--{flag}", *value, f"--{flag}", *value])
    assert [record.getMessage() for record in caplog.records] == [f"--{flag} has no effect: {NO_EFFECT[flag]}"]


def test_flags_without_effect_in_the_published_commands(caplog):
    parse_args("train", FEW_SHOT.split())
    assert [re.findall(r"--\w+", m)[0] for m in caplog.messages] == ["--shard_grads"]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_describes_every_flag(command, capsys, monkeypatch):
    """Help begins with an example and lists every flag in a titled group, with its comment and its default."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as exit_info:
        parse_args(command, ["--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert text.startswith(f"usage: atlas {command} --task qa")
    for group in GROUPS.values():
        assert f"\n{group.__doc__}:\n" in text
        for field in fields(group):
            entry = re.search(rf"\n  --{field.name}\b[^\n]*?(\n {{10,}}[^\n]*)?(?=\n)", text)[0]
            assert field_comments(group)[field.name] in entry
            if field.default is not REQUIRED and field.default not in (None, (), False):
                assert f"(default: {field.default})" in entry


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_example_in_help_parses(command, tmp_path):
    for folder in ("atlas/base", "index/base"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("train.jsonl", "dev.jsonl"):
        (tmp_path / file).touch()
    example = EXAMPLES[command].replace("\\\n", " ").split()
    assert example[:2] == ["atlas", command]
    assert parse_args(command, example[2:]).run.name == "run1"


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_every_field_has_help(group):
    assert field_comments(group).keys() == {field.name for field in fields(group)}
    assert all(len(text.split()) >= 3 for text in field_comments(group).values())


@dataclasses.dataclass(frozen=True)
class Commented:
    # not about a field
    one: int = 1  # a # sign, and {braces}
    two: str = "# no comment"  # begun here
    # and ended here

    # not about a field either
    three: int = 3

    def one_(self):  # nor this
        return self.one


def test_field_comments_are_those_beside_a_field_and_right_below():
    """A `#` in a string begins no comment, and a blank line ends a comment."""
    assert field_comments(Commented)["one"] == "a # sign, and {braces}"
    assert field_comments(Commented)["two"] == "begun here and ended here"
    assert not any("about" in text for text in field_comments(Commented).values())


@pytest.mark.parametrize("reader", READERS)
def test_published_readers_are_known(reader):
    assert parse_args("evaluate", f"{MINIMAL} --reader_model_type {reader}".split()).model.reader_model_type == reader
    assert len(set(READERS)) == 13


def test_a_reader_may_be_a_local_folder(tmp_path):
    (tmp_path / "empty" / "config.json").touch()
    parse_args("evaluate", f"{MINIMAL} --reader_model_type empty".split())


def test_closed_book_overrides_other_flags():
    """Reference: --closed_book sets one passage and no retriever, whatever else is passed."""
    line = f"{MINIMAL} --closed_book --n_context 9 --retriever_n_context 9 --train_retriever --encoder_format {{text}}"
    config = parse_args("train", line.split())
    assert config.retrieval == RetrievalConfig(
        n_context=1, retriever_n_context=1, closed_book=True, use_file_passages=True
    )
    assert config.text.encoder_format == "{query}"
    assert not config.distill.train_retriever


def test_use_file_passages_turns_the_retriever_off():
    flags = "--train_retriever --query_side_retriever_training --use_gradient_checkpoint_retriever"
    on = parse_args("train", f"{MINIMAL} {flags}".split())
    off = parse_args("train", f"{MINIMAL} {flags} --use_file_passages --n_context 9".split())
    for config, expected in ((on, True), (off, False)):
        assert config.distill.train_retriever is expected
        assert config.retrieval.query_side_retriever_training is expected
        assert config.model.use_gradient_checkpoint_retriever is expected
    assert off.retrieval.n_context == 9
    assert (on.passages_a_query, off.passages_a_query) == (5, 9)  # retrieved passages; passages of the row's own


def test_overrides_and_checks_apply_without_a_command_line():
    """A `Config` built in Python has the same overrides and refuses the same values."""
    config = Config(ModelConfig("t5-small"), TaskConfig("qa"), retrieval=RetrievalConfig(closed_book=True))
    assert config.retrieval.use_file_passages
    assert config.text.encoder_format == "{query}"
    with pytest.raises(UserError, match="--n_context 0"):
        RetrievalConfig(n_context=0)


@pytest.mark.parametrize(
    ("alias", "mode"), [("pdist", "ppmean"), ("adist", "evalnormsum"), ("loop", "loop"), ("emdr", "emdr")]
)
def test_gold_score_modes_may_have_their_names_in_the_paper(alias, mode):
    config = Config(ModelConfig("t5-small"), TaskConfig("qa"), distill=DistillConfig(gold_score_mode=alias))
    assert config.distill.gold_score_mode == mode


def test_the_retriever_length_is_at_most_512_and_the_reader_length_is_not_limited():
    """--text_maxlength is the reader's; the retriever's is at most 512; --target_maxlength -1 or none is no limit."""
    assert TextConfig(text_maxlength=1000).retriever_maxlength == 512
    assert TextConfig(text_maxlength=100).retriever_maxlength == 100
    for line, limit in (("", None), ("--target_maxlength -1", None), ("--target_maxlength 16", 16)):
        config = parse_args("evaluate", f"{MINIMAL} --text_maxlength 1000 {line}".split())
        assert config.text.text_maxlength == 1000
        assert config.text.target_maxlength == limit


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("-1", ((0, 2**32, 2**32),)),
        ("100", ((0, 2**32, 100),)),
        ("0-100:10,100-1000000:500", ((0, 100, 10), (100, 1000000, 500))),
        ("0-100:10, 100-200:5", ((0, 100, 10), (100, 200, 5))),
    ],
)
def test_refresh_index_is_parsed_into_ranges(text, schedule):
    assert DistillConfig(refresh_index=text).refresh_schedule == schedule


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"n_contxt": 3}, ["--n_contxt: no such flag", "did you mean --n_context?"]),
        ({"task": "multi_choice"}, ["--task multi_choice: did you mean multiple_choice?"]),
        ({"n_context": "two"}, ["--n_context two: expected a whole number"]),
        ({"n_context": 0}, ["--n_context 0: must be at least 1"]),
        ({"index_mode": "flatt"}, ["--index_mode flatt: did you mean flat?"]),
        ({"precision": "fp16"}, ["--precision fp16", "use bf16"]),
        ({"mesh": "data=16"}, ["--mesh data=16: 16 devices, but there are 8"]),
        ({"eval_data": None}, ["no eval file: pass --eval_data FILE.jsonl"]),
        ({"eval_data": "missing.jsonl"}, ["--eval_data missing.jsonl: no such file"]),
        ({"passages": "missing.jsonl"}, ["--passages missing.jsonl: no such file"]),
        ({"passages": None}, ["no passages: pass --load_index_path, --passages"]),
        ({"model_path": "modle"}, ["--model_path modle: no such folder"]),
        ({"reader_model_type": "t5-bse"}, ["--reader_model_type t5-bse", "did you mean t5-base?"]),
        ({"load_index_path": "nowhere"}, ["--load_index_path nowhere: no such folder"]),
        ({"task": None}, ["--task is missing: choose from"]),
    ],
)
def test_a_wrong_flag_ends_the_command_with_one_line(assert_refused, no_weights, tmp_path, flags, parts):
    """The message names the flag, what is wrong with its value, and the nearest right one; no weights are loaded."""
    assert_refused(evaluate_argv(tmp_path, **flags), *parts)


@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_a_tilde_is_expanded_in_every_flag_that_names_a_path(command, monkeypatch, tmp_path):
    """Inputs and outputs alike, also as `--flag=~/x`; in a flag that names no path, `~` is a character."""
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"reader_model_type", "retriever_model_path", "model_path", "checkpoint_dir", "train_data", "eval_data"}
    paths |= {"passages", "load_index_path", "save_index_path", "cache_dir", "compile_cache"}
    texts = {"name", "encoder_format", "retriever_format", "select_by", "mesh", "refresh_index", "coordinator"}
    for flag in paths | texts:
        (value,) = (v for k, v in _flag_values(command, [f"--{flag}=~/x", "--task=qa"]).items() if k == flag)
        expected = f"{tmp_path}/x" if flag in paths else "~/x"
        assert value == ([expected] if flag in ("train_data", "eval_data", "passages") else expected)
    with pytest.raises(UserError, match="--model_path ~nobody-here: no home folder for ~nobody-here"):
        _flag_values(command, ["--model_path", "~nobody-here"])


def test_a_text_of_the_retriever_has_room_for_a_token(input_files):
    """[CLS], a token and [SEP]; without a retriever the reader may read less."""
    assert "--text_maxlength 2: must be at least 3" in refusal(f"{MINIMAL} --text_maxlength 2")
    assert parse_args("evaluate", [*MINIMAL.split(), "--text_maxlength", "3"]).text.text_maxlength == 3
    assert parse_args("evaluate", f"{MINIMAL} --text_maxlength 1 --closed_book".split()).text.text_maxlength == 1
