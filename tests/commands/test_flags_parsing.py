"""Command lines become a Config, or one line that says what is wrong with them."""

import dataclasses
import json
import logging
import re
from dataclasses import fields
from typing import get_args

import pytest

from atlas_jax.commands.flags import EXAMPLES, GROUPS, WITHOUT_MEANING, field_comments, parse_args
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

REQUIRED = dataclasses.MISSING
NEW_FLAGS = {
    **{"mesh": "auto", "compile_cache": "auto", "keep": None, "max_bad_steps": 20},
    **{"coordinator": None, "num_processes": None, "process_id": None, "host_timeout": 300},
}
REFERENCE_FLAGS = {
    "name": "experiment_name",
    "checkpoint_dir": "./checkpoint/",
    "model_path": "none",
    "per_gpu_batch_size": 1,
    "per_gpu_embedder_batch_size": 512,
    "local_rank": -1,
    "main_port": -1,
    "seed": 0,
    "log_freq": 100,
    "eval_freq": 500,
    "save_freq": 5000,
    "train_data": (),
    "eval_data": (),
    "write_results": False,
    "dont_write_passages": False,
    "load_index_path": None,
    "save_index_path": None,
    "save_index_n_shards": 128,
    "index_mode": "flat",
    "faiss_index_type": "flat",
    "faiss_code_size": None,
    "reader_model_type": "",  # required there; here a checkpoint may know it
    "text_maxlength": 200,
    "target_maxlength": None,
    "n_context": 1,
    "passages": (),  # None there: nothing given, either way
    "max_passages": -1,
    "retriever_model_path": "facebook/contriever",
    "retrieve_only": False,
    "train_retriever": False,
    "use_file_passages": False,
    "retriever_n_context": 5,
    "gold_score_mode": "ppmean",
    "closed_book": False,
    "temperature_score": 0.01,
    "temperature_gold": 0.01,
    "compute_crossattention_stats": False,
    "filtering_overretrieve_ratio": 2,
    "freeze_retriever_steps": -1,
    "query_side_retriever_training": False,
    "retrieve_with_rerank": False,
    "n_to_rerank_with_retrieve_with_rerank": 128,
    "decoder_format": None,
    "decoder_prompt_format": None,
    "encoder_format": "{query} title: {title} context: {text}",
    "retriever_format": "{title} {text}",
    "generation_max_length": 128,
    "generation_min_length": None,
    "generation_length_penalty": 1.0,
    "generation_num_beams": 1,
    "task": REQUIRED,  # None there, and refused later
    "mlm_noise_density": 0.15,
    "mlm_mean_noise_span_length": 3,
    "min_words_per_lm_instance": None,
    "min_lm_context_ratio": 0.5,
    "max_lm_context_ratio": 0.5,
    "qa_prompt_format": "question: {question} answer: <extra_id_0>",
    "multiple_choice_num_options": 4,
    "multiple_choice_train_permutations": "single",
    "multiple_choice_eval_permutations": "single",
    "warmup_steps": 1000,
    "total_steps": 1000,
    "scheduler_steps": None,
    "accumulation_steps": 1,
    "dropout": 0.1,
    "lr": 1e-4,
    "lr_retriever": 1e-5,
    "clip": 1.0,
    "scheduler": "cosine",
    "weight_decay": 0.1,
    "save_optimizer": False,
    "epsilon": 1e-6,
    "alpha": 1.0,
    "beta2": 0.999,
    "refresh_index": "-1",
    "shuffle": False,
    "precision": "fp32",
    "shard_optim": False,
    "shard_grads": False,
    "use_gradient_checkpoint_reader": False,
    "use_gradient_checkpoint_retriever": False,
}
REFERENCE_CHOICES = {
    "index_mode": {"flat", "faiss"},
    "faiss_index_type": {"ivfflat", "flat", "ivfsq", "ivfpq", "pq"},
    "gold_score_mode": {"evalnormsum", "loop", "ppmean", "emdr", "pdist", "adist"},
    "task": {"base", "mlm", "lm", "multiple_choice", "kilt", "section", "fever", "qa"},
    "multiple_choice_train_permutations": {"single", "cyclic", "all"},
    "multiple_choice_eval_permutations": {"single", "cyclic", "all"},
    "scheduler": {"linear", "cosine", "fixed"},
    "precision": {"fp16", "fp32", "bf16"},
}
WHOLE_NUMBERS_OR_NONE = {
    "faiss_code_size",
    "target_maxlength",
    "generation_min_length",
    "min_words_per_lm_instance",
    "scheduler_steps",
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
SHORT = "--task qa --reader_model_type t5-small --eval_data test.jsonl --train_data T --load_index_path I"


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """What the command lines here name."""
    for folder in ("M", "I", "empty"):
        (tmp_path / folder).mkdir()
    for file in ("valid.jsonl", "test.jsonl", "T", "passages.jsonl"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)


def refusal(line: str | list[str], command="evaluate") -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(UserError) as error:
        parse_args(command, line.split() if isinstance(line, str) else line)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_reference_flag_is_here_with_its_default():
    """The flags are the reference's and a few new ones, no more and no fewer, each in one group."""
    expected = REFERENCE_FLAGS | NEW_FLAGS
    assert FLAGS.keys() == expected.keys()
    assert sum(len(fields(group)) for group in GROUPS.values()) == len(FLAGS)
    assert {name: field.default for name, field in FLAGS.items()} == expected


@pytest.mark.parametrize("flag", REFERENCE_CHOICES)
def test_choices_are_the_reference_s(flag):
    assert set(get_args(FLAGS[flag].type)) == REFERENCE_CHOICES[flag]


def test_types_are_the_reference_s():
    """A word is refused by exactly the flags that are numbers, a fraction by those that are whole."""
    whole = {name for name, default in REFERENCE_FLAGS.items() if type(default) is int} | WHOLE_NUMBERS_OR_NONE
    whole -= {"mlm_mean_noise_span_length"}  # a float, whose default is written 3
    fractions = {name for name, default in REFERENCE_FLAGS.items() if type(default) is float}
    fractions.add("mlm_mean_noise_span_length")
    for flag in whole:
        assert refusal(f"{SHORT} --{flag} 0.5") == f"--{flag} 0.5: expected a whole number"
    for flag in fractions:
        assert refusal(f"{SHORT} --{flag} half") == f"--{flag} half: expected a number"
        assert to_dict(parse_args("evaluate", [*SHORT.split(), f"--{flag}", "0.5"]))[flag] == 0.5
    switches = {name for name, default in REFERENCE_FLAGS.items() if default is False}
    for flag in switches:
        assert "ignored explicit argument" in refusal(f"{SHORT} --{flag}=1")


def test_published_zero_shot_command():
    """The published evaluation of the 11B model on MMLU: what it passes is set, all else keeps its default."""
    config = parse_args("evaluate", ZERO_SHOT.split())
    given = {
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
    assert to_dict(config) == REFERENCE_FLAGS | NEW_FLAGS | given
    assert config.task.task == "multiple_choice"
    assert config.index.load_index_path == "I"


def test_published_train_command():
    """The published few-shot training parses; `-1` is a value there, not a flag."""
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
    parse_args("evaluate", FEW_SHOT.split())  # both commands take all flags
    assert refusal(ZERO_SHOT, "train") == "no train file: pass --train_data FILE.jsonl"


def test_the_last_of_two_values_counts():
    assert parse_args("evaluate", f"{SHORT} --n_context 2 --n_context 3".split()).retrieval.n_context == 3


def test_config_is_a_value():
    """Equal, hashable, frozen: it may be a static argument of a jitted function; and json takes its dict."""
    config = parse_args("evaluate", SHORT.split())
    assert config == parse_args("evaluate", SHORT.split())
    assert hash(config) == hash(parse_args("evaluate", SHORT.split()))
    assert config != parse_args("evaluate", f"{SHORT} --seed 1".split())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1
    assert json.loads(json.dumps(to_dict(config)))["eval_data"] == ["test.jsonl"]


@pytest.mark.parametrize("flag", WITHOUT_MEANING)
def test_a_flag_without_meaning_says_so_once(flag, caplog):
    """Only if it was passed, only once, with the reason."""
    value = [] if FLAGS[flag].type is bool else ["1"]
    parse_args("evaluate", SHORT.split())
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        parse_args("evaluate", [*SHORT.split(), f"--{flag}", *value, f"--{flag}", *value])
    assert [record.getMessage() for record in caplog.records] == [f"--{flag} has no effect: {WITHOUT_MEANING[flag]}"]


def test_the_published_commands_name_these_without_meaning(caplog):
    parse_args("train", FEW_SHOT.split())
    assert [re.findall(r"--\w+", m)[0] for m in caplog.messages] == ["--shard_optim", "--shard_grads"]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_teaches(command, capsys, monkeypatch):
    """An example that parses at the top, every flag in a titled group, its words and its default."""
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stop:
        parse_args(command, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert text.startswith(f"usage: atlas {command} --task qa")
    for group in GROUPS.values():
        assert f"\n{group.__doc__}:\n" in text
        for field in fields(group):
            entry = re.search(rf"\n  --{field.name}\b[^\n]*?(\n {{10,}}[^\n]*)?(?=\n)", text)[0]
            assert field_comments(group)[field.name] in entry
            if field.default is not REQUIRED and field.default not in (None, (), False):
                assert f"(default: {field.default})" in entry


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_example_of_the_help_parses(command, tmp_path):
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


def test_comments_are_those_beside_a_field_and_right_below():
    """A `#` in a string is no comment, and a blank line ends one."""
    assert field_comments(Commented)["one"] == "a # sign, and {braces}"
    assert field_comments(Commented)["two"] == "begun here and ended here"
    assert not any("about" in text for text in field_comments(Commented).values())


@pytest.mark.parametrize("reader", READERS)
def test_the_known_readers(reader):
    assert parse_args("evaluate", f"{SHORT} --reader_model_type {reader}".split()).model.reader_model_type == reader
    assert len(set(READERS)) == 13


def test_a_reader_may_be_a_local_folder(tmp_path):
    (tmp_path / "empty" / "config.json").touch()
    parse_args("evaluate", f"{SHORT} --reader_model_type empty".split())


def test_closed_book_overrides():
    """Reference: --closed_book wins over what else was passed."""
    line = f"{SHORT} --closed_book --n_context 9 --retriever_n_context 9 --train_retriever --encoder_format {{text}}"
    config = parse_args("train", line.split())
    assert config.retrieval == RetrievalConfig(
        n_context=1, retriever_n_context=1, closed_book=True, use_file_passages=True
    )
    assert config.text.encoder_format == "{query}"
    assert not config.distill.train_retriever


def test_use_file_passages_turns_the_retriever_off():
    flags = "--train_retriever --query_side_retriever_training --use_gradient_checkpoint_retriever"
    on = parse_args("train", f"{SHORT} {flags}".split())
    off = parse_args("train", f"{SHORT} {flags} --use_file_passages --n_context 9".split())
    for config, expected in ((on, True), (off, False)):
        assert config.distill.train_retriever is expected
        assert config.retrieval.query_side_retriever_training is expected
        assert config.model.use_gradient_checkpoint_retriever is expected
    assert off.retrieval.n_context == 9
    assert (on.passages_a_query, off.passages_a_query) == (5, 9)  # retrieved, and the row's own


def test_overrides_hold_without_a_command_line():
    """A preset written in Python is settled by the same rules."""
    config = Config(ModelConfig("t5-small"), TaskConfig("qa"), retrieval=RetrievalConfig(closed_book=True))
    assert config.retrieval.use_file_passages
    assert config.text.encoder_format == "{query}"
    with pytest.raises(UserError, match="--n_context 0"):
        RetrievalConfig(n_context=0)


@pytest.mark.parametrize(
    ("given", "meant"), [("pdist", "ppmean"), ("adist", "evalnormsum"), ("loop", "loop"), ("emdr", "emdr")]
)
def test_gold_scores_by_the_names_of_the_paper(given, meant):
    config = Config(ModelConfig("t5-small"), TaskConfig("qa"), distill=DistillConfig(gold_score_mode=given))
    assert config.distill.gold_score_mode == meant


def test_lengths():
    """The reader's length is the user's; the retriever's ends at 512; -1 and nothing are no limit for a target."""
    assert TextConfig(text_maxlength=1000).retriever_maxlength == 512
    assert TextConfig(text_maxlength=100).retriever_maxlength == 100
    for line, limit in (("", None), ("--target_maxlength -1", None), ("--target_maxlength 16", 16)):
        config = parse_args("evaluate", f"{SHORT} --text_maxlength 1000 {line}".split())
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
def test_refresh_schedule(text, schedule):
    assert DistillConfig(refresh_index=text).refresh_schedule == schedule
