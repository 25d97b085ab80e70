"""Every flag once: typed, documented, checked. The comment beside a field is its `--help`.

A run is a `Config`: frozen groups of flags, by who reads them. Making one settles what flags say about each other and
refuses contradictions; `parse_args` adds what only a command line knows: for which command, and are the files there.
"""

import argparse
import difflib
import functools
import inspect
import io
import logging
import re
import string
import tokenize
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from atlas_jax.errors import UserError

logger = logging.getLogger(__name__)

Command = Literal["train", "evaluate"]
TaskName = Literal["base", "mlm", "lm", "multiple_choice", "kilt", "section", "fever", "qa"]
Permutations = Literal["single", "cyclic", "all"]

READERS = (
    *("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b"),
    *("google/t5-v1_1-base", "google/t5-v1_1-large", "google/t5-v1_1-xl", "google/t5-v1_1-xxl"),
    *("google/t5-base-lm-adapt", "google/t5-large-lm-adapt", "google/t5-xl-lm-adapt", "google/t5-xxl-lm-adapt"),
)
GoldMode = Literal["evalnormsum", "loop", "ppmean", "emdr"]
PAPER_NAMES: dict[str, GoldMode] = {"pdist": "ppmean", "adist": "evalnormsum"}
OUR_CHECKPOINT = "atlas.json"  # the file that tells a checkpoint of ours
BERT_POSITIONS = 512  # the retriever has no more
FOREVER = 2**32


def _suggest(text: str, known: Sequence[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(text.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else otherwise or f"choose from {', '.join(known)}"


def _require(ok: bool, group: object, flag: str, remedy: str) -> None:
    if not ok:
        raise UserError(f"--{flag} {getattr(group, flag)}: {remedy}")


def _at_least(low: int, group: object, *flags: str) -> None:
    for flag in flags:
        value = getattr(group, flag)
        _require(value is None or value >= low, group, flag, f"must be at least {low}")


def _above_zero(group: object, *flags: str) -> None:
    for flag in flags:
        _require(getattr(group, flag) > 0, group, flag, "must be above 0")


def _formats(group: object, flag: str, only: str | None = None) -> None:
    """Can `str.format` fill it in: with the fields of a passage, or with `only` this one?"""
    text = getattr(group, flag) or ""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}; a literal brace is written twice") from None
    for name in names:
        _require(name.isidentifier(), group, flag, f"{{{name}}} is not a field; a field is a name, such as {{title}}")
        _require(only in (None, name), group, flag, f"{{{name}}} is not known here, only {{{only}}} is")


@dataclass(frozen=True)
class RunConfig:
    """Run (its name, its files, how often it reports)"""

    name: str = "experiment_name"  # the run's folder inside --checkpoint_dir
    checkpoint_dir: str = "./checkpoint/"  # where the folders of all runs are
    seed: int = 0  # draws the weights that are not loaded, dropout, and the order of the data
    train_data: tuple[str, ...] = ()  # jsonl files to train on
    eval_data: tuple[str, ...] = ()  # jsonl files to evaluate on, each scored by itself
    shuffle: bool = False  # train on the rows in a new random order each epoch
    per_gpu_batch_size: int = 1  # questions per device and step
    log_freq: int = 100  # train: steps between two lines of metrics
    eval_freq: int = 500  # train: steps between two evaluations; the last step is evaluated in any case
    save_freq: int = 5000  # train: steps between two checkpoints; the last step is saved in any case
    save_optimizer: bool = False  # keep the optimizers in the last checkpoint of a finished run too; the others have
    # them in any case, so that a run that was stopped resumes exactly
    keep: int | None = None  # train: only the newest checkpoints stay, so many; left out, all do; 0: none once finished
    max_bad_steps: int = 20  # train: stop after so many steps in a row whose loss or gradient is not finite
    write_results: bool = False  # write the predictions of each evaluation to a jsonl file
    dont_write_passages: bool = False  # leave the passages, most of the bytes, out of the --write_results files
    mesh: str = "auto"  # how devices share the work: axes and their sizes, such as data=8,fsdp=8, or auto
    compile_cache: str | None = None  # folder that keeps compiled programs, so that the next run starts at once

    def __post_init__(self) -> None:
        _at_least(1, self, "per_gpu_batch_size", "log_freq", "eval_freq", "save_freq", "max_bad_steps")
        _at_least(0, self, "keep")


@dataclass(frozen=True)
class ModelConfig:
    """Model (reader, retriever, and where their weights come from)"""

    reader_model_type: str = ""  # the T5 that reads: t5-{small,base,large,3b,11b}, google/t5-v1_1-{base,large,xl,xxl},
    # google/t5-{base,large,xl,xxl}-lm-adapt, or a local folder with config.json and tokenizer; a checkpoint of
    # ours in --model_path knows it already
    retriever_model_path: str = "facebook/contriever"  # the encoder that retrieves: a known name or a local folder;
    # weights in --model_path come before its own
    model_path: str = "none"  # folder with trained Atlas weights, ours or the published model.pth.tar; none: resume the
    # run's latest checkpoint, or else start from the two models above
    precision: Literal["fp16", "fp32", "bf16"] = (
        "fp32"  # numbers to compute with; bf16 halves memory and time, fp16 is refused
    )
    dropout: float = 0.1  # share of activations dropped in training, reader and retriever
    use_gradient_checkpoint_reader: bool = False  # train with less memory and more time: recompute the reader's layers
    use_gradient_checkpoint_retriever: bool = False  # the same for the retriever

    def __post_init__(self) -> None:
        _require(self.precision != "fp16", self, "precision", "overflows in T5; use bf16, as small and as fast")
        _require(0 <= self.dropout < 1, self, "dropout", "must be at least 0 and below 1")


@dataclass(frozen=True)
class TextConfig:
    """Text (how questions, passages and answers become tokens)"""

    text_maxlength: int = 200  # tokens of question and passage together, at most; the retriever never sees over 512
    target_maxlength: int | None = None  # tokens of an answer, at most; -1 is no limit, as is leaving it out
    encoder_format: str = "{query} title: {title} context: {text}"  # what the reader sees: {query}, fields of a passage
    retriever_format: str = "{title} {text}"  # what the retriever sees of a passage: any of its fields
    decoder_format: str | None = None  # what the decoder learns to write, around {target}
    decoder_prompt_format: str | None = None  # text given to the decoder to continue, such as "answer to {query}:"

    def __post_init__(self) -> None:
        _at_least(1, self, "text_maxlength")
        if self.target_maxlength != -1:
            _at_least(1, self, "target_maxlength")
        _formats(self, "encoder_format")
        _formats(self, "retriever_format")
        _formats(self, "decoder_format", only="target")
        _formats(self, "decoder_prompt_format", only="query")

    @property
    def retriever_maxlength(self) -> int:
        """Tokens the retriever sees of a query or of a passage, at most."""
        return min(self.text_maxlength, BERT_POSITIONS)


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval (which passages a question gets)"""

    n_context: int = 1  # passages the reader sees per question
    retriever_n_context: int = 5  # train: passages retrieved per question; the retriever learns from all of them
    filtering_overretrieve_ratio: int = 2  # tasks that drop passages (mlm, lm, section) search for this many times more
    retrieve_with_rerank: bool = False  # embed the best passages again with today's encoder and reorder them
    n_to_rerank_with_retrieve_with_rerank: int = 128  # passages per question that --retrieve_with_rerank embeds
    query_side_retriever_training: bool = False  # train only a separate query encoder, so that the index stays valid
    use_file_passages: bool = False  # read each row's own `passages` field; no retriever, no index
    closed_book: bool = False  # no passages, a plain T5: --n_context 1 --encoder_format {query} --use_file_passages
    retrieve_only: bool = False  # evaluate: no reader; find the passages, and write them with --write_results

    def __post_init__(self) -> None:
        rerank = "n_to_rerank_with_retrieve_with_rerank"
        _at_least(1, self, "n_context", "retriever_n_context", "filtering_overretrieve_ratio", rerank)
        if self.retrieve_with_rerank:
            enough = self.n_to_rerank_with_retrieve_with_rerank >= self.n_context
            _require(enough, self, rerank, f"must be at least --n_context {self.n_context}")
        if self.retrieve_only and (self.use_file_passages or self.closed_book):
            raise UserError("--retrieve_only: drop --use_file_passages and --closed_book, which retrieve nothing")

    @property
    def searched(self) -> tuple[str, int]:
        """The flag that says how many passages a search must find per question, and that number."""
        flag = "n_to_rerank_with_retrieve_with_rerank" if self.retrieve_with_rerank else "n_context"
        return flag, getattr(self, flag)


@dataclass(frozen=True)
class IndexConfig:
    """Index (the passages to search, and how)"""

    passages: tuple[str, ...] = ()  # jsonl files of passages to embed and search; not read with --load_index_path
    max_passages: int = -1  # use only this many, the first ones; -1 uses all
    load_index_path: str | None = None  # folder of an index and its passages: ours, or the published embeddings.N.pt
    save_index_path: str | None = None  # folder to write the index to whenever it was built
    index_mode: Literal["flat", "faiss"] = "flat"  # flat: exact search on the mesh; faiss: on the host
    faiss_index_type: Literal["ivfflat", "flat", "ivfsq", "ivfpq", "pq"] = "flat"  # faiss: exact (flat), clustered
    # (ivf...), compressed (sq, pq)
    faiss_code_size: int | None = None  # faiss: bytes per passage for pq and ivfpq; must divide the vectors' width
    per_gpu_embedder_batch_size: int = 512  # passages embedded at a time per device

    def __post_init__(self) -> None:
        if self.max_passages != -1:
            _at_least(1, self, "max_passages")
        _at_least(1, self, "faiss_code_size", "per_gpu_embedder_batch_size")
        if self.index_mode == "faiss" and self.faiss_index_type in ("pq", "ivfpq"):
            _require(self.faiss_code_size is not None, self, "faiss_index_type", "needs --faiss_code_size, such as 64")


@dataclass(frozen=True)
class GenerationConfig:
    """Generation (how an answer is written)"""

    generation_max_length: int = 128  # tokens of an answer at most, the start token included
    generation_min_length: int | None = None  # tokens of an answer at least
    generation_length_penalty: float = 1.0  # beam search: above 0 favours longer answers, below 0 shorter ones
    generation_num_beams: int = 1  # beams of the search; 1 is greedy

    def __post_init__(self) -> None:
        _at_least(1, self, "generation_max_length", "generation_num_beams")
        _at_least(0, self, "generation_min_length")
        room = (self.generation_min_length or 0) <= self.generation_max_length
        _require(room, self, "generation_min_length", f"is over --generation_max_length {self.generation_max_length}")


@dataclass(frozen=True)
class TaskConfig:
    """Task (what a row is, and how an answer is scored)"""

    task: TaskName  # how rows become questions and answers become scores
    qa_prompt_format: str = "question: {question} answer: <extra_id_0>"  # qa: the query, around {question}
    multiple_choice_num_options: int = 4  # multiple_choice: options per question, lettered from A
    multiple_choice_train_permutations: Permutations = "single"  # option orders to train on: as is, rotations, or all
    multiple_choice_eval_permutations: Permutations = (
        "single"  # orders to average over; cyclic is nearly as good as all
    )
    mlm_noise_density: float = 0.15  # mlm: share of the tokens that is masked
    mlm_mean_noise_span_length: float = 3  # mlm: tokens in a masked span, on average
    min_words_per_lm_instance: int | None = None  # mlm, lm, section: skip texts of fewer words
    min_lm_context_ratio: float = 0.5  # lm: the given part is at least this share of the words
    max_lm_context_ratio: float = 0.5  # lm: the given part is at most this share; the rest is to be written

    def __post_init__(self) -> None:
        _formats(self, "qa_prompt_format", only="question")
        _at_least(0, self, "min_words_per_lm_instance")
        _above_zero(self, "mlm_noise_density", "mlm_mean_noise_span_length")
        _require(1 <= self.multiple_choice_num_options <= 26, self, "multiple_choice_num_options", "must be 1 to 26")
        _require(self.mlm_noise_density < 1, self, "mlm_noise_density", "must be below 1, or no text is left")
        _require(0 <= self.min_lm_context_ratio <= 1, self, "min_lm_context_ratio", "must be 0 to 1")
        ordered = self.min_lm_context_ratio <= self.max_lm_context_ratio <= 1
        _require(ordered, self, "max_lm_context_ratio", f"must be {self.min_lm_context_ratio} (the minimum) to 1")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation (what the retriever learns from the reader; train)"""

    train_retriever: bool = False  # train the retriever too, not the reader alone
    gold_score_mode: Literal["evalnormsum", "loop", "ppmean", "emdr", "pdist", "adist"] = "ppmean"  # how the reader
    # judges passages: ppmean (pdist in the paper), evalnormsum (adist in the paper), loop or emdr
    temperature_score: float = 0.01  # softmax temperature of the retriever's scores
    temperature_gold: float = 0.01  # softmax temperature of the reader's judgement
    freeze_retriever_steps: int = -1  # steps at the start in which the retriever does not learn
    refresh_index: str = "-1"  # embed the passages again every so many steps, such as 100; or by schedule, such as
    # 0-100:10,100-1000000:500 for every 10 steps in the first 100 and every 500 later; -1 never
    compute_crossattention_stats: bool = False  # log how far cross-attention agrees with the reader's judgement

    def __post_init__(self) -> None:
        _above_zero(self, "temperature_score", "temperature_gold")
        sound = self.refresh_schedule and all(start < end and every for start, end, every in self.refresh_schedule)
        _require(bool(sound), self, "refresh_index", "expected -1, or 100, or START-END:EVERY,START-END:EVERY")

    @property
    def gold(self) -> GoldMode:
        """The judgement by its name in the code."""
        return PAPER_NAMES.get(self.gold_score_mode, self.gold_score_mode)  # type: ignore[arg-type]

    @property
    def refresh_schedule(self) -> tuple[tuple[int, int, int], ...]:
        """(start, end, every): for steps in [start, end), build at start and every so many steps from there."""
        text = self.refresh_index.replace(" ", "")
        if text == "-1" or text.isdecimal():
            text = f"0-{FOREVER}:{FOREVER if text == '-1' else text}"  # Reference: -1 still builds at step 0
        pieces = [re.fullmatch(r"(\d+)-(\d+):(\d+)", piece) for piece in text.split(",")]
        return tuple((int(p[1]), int(p[2]), int(p[3])) for p in pieces if p) if all(pieces) else ()


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer (train)"""

    total_steps: int = 1000  # steps to train for
    warmup_steps: int = 1000  # steps in which the learning rates rise
    scheduler: Literal["linear", "cosine", "fixed"] = "cosine"  # how the learning rates fall after that
    lr: float = 1e-4  # highest learning rate of the reader
    lr_retriever: float = 1e-5  # highest learning rate of the retriever
    accumulation_steps: int = 1  # steps whose gradients add up to one update
    clip: float = 1.0  # largest norm of the gradient, reader and retriever together
    weight_decay: float = 0.1  # AdamW: decoupled, on every parameter
    beta2: float = 0.999  # AdamW: decay of the second moment
    epsilon: float = 1e-6  # AdamW: added to the root of the second moment

    def __post_init__(self) -> None:
        _at_least(1, self, "total_steps", "accumulation_steps")
        _at_least(0, self, "warmup_steps", "lr", "lr_retriever", "weight_decay", "epsilon")
        _above_zero(self, "clip")
        _require(0 <= self.beta2 < 1, self, "beta2", "must be at least 0 and below 1")


@dataclass(frozen=True)
class NoEffectConfig:
    """No effect here (accepted, so that a published command line runs as it is)"""

    local_rank: int = -1  # JAX finds the devices of each process itself
    main_port: int = -1  # JAX finds the other hosts itself
    shard_optim: bool = False  # the fsdp axis of --mesh shards parameters and optimizer together
    shard_grads: bool = False  # the fsdp axis of --mesh shards gradients too
    save_index_n_shards: int = 128  # an index is read by the files it has, whatever their number
    scheduler_steps: int | None = None  # schedules end at --total_steps; the PyTorch code does not read it either
    alpha: float = 1.0  # AdamW has no such value; the PyTorch code does not read it either


@dataclass(frozen=True)
class Config:
    """A run. What one flag says about another is settled when it is made."""

    model: ModelConfig
    task: TaskConfig
    run: RunConfig = RunConfig()
    text: TextConfig = TextConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    index: IndexConfig = IndexConfig()
    generation: GenerationConfig = GenerationConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig = OptimConfig()
    no_effect: NoEffectConfig = NoEffectConfig()

    def __post_init__(self) -> None:
        if self.retrieval.closed_book:
            self._override("retrieval", n_context=1, retriever_n_context=1, use_file_passages=True)
            self._override("text", encoder_format="{query}")
        if self.retrieval.use_file_passages:  # there is no retriever
            self._override("retrieval", query_side_retriever_training=False)
            self._override("distill", train_retriever=False)
            self._override("model", use_gradient_checkpoint_retriever=False)
        if self.distill.gold_score_mode in PAPER_NAMES:
            self._override("distill", gold_score_mode=PAPER_NAMES[self.distill.gold_score_mode])
        if self.text.target_maxlength == -1:
            self._override("text", target_maxlength=None)

    def _override(self, group: str, **flags: Any) -> None:
        object.__setattr__(self, group, replace(getattr(self, group), **flags))


def to_dict(config: Config) -> dict[str, Any]:
    """Flag to value, flat: what config.json holds."""
    return {flag: value for group in vars(config).values() for flag, value in vars(group).items()}


GROUPS: dict[str, type[Any]] = get_type_hints(Config)


def parse_args(command: Command, argv: Sequence[str]) -> Config:
    """The run that a command line asks for; both commands take all flags. `--help` prints and exits."""
    namespace, unknown = _parser(command).parse_known_args(argv)
    given = {flag: tuple(value) if isinstance(value, list) else value for flag, value in vars(namespace).items()}
    flags = {field.name: field for group in GROUPS.values() for field in fields(group)}
    if unknown:
        what = "no such flag" if unknown[0].startswith("-") else "a value that belongs to no flag"
        remedy = _suggest(unknown[0].split("=")[0], [f"--{flag}" for flag in flags], f"see atlas {command} --help")
        raise UserError(f"{unknown[0]}: {what}; {remedy}")
    for flag, field in flags.items():
        if field.default is MISSING and flag not in given:
            raise UserError(f"--{flag} is missing: {_suggest('', get_args(field.type) or READERS)}")
        if flag in WITHOUT_MEANING and flag in given:
            logger.warning("--%s has no effect: %s", flag, WITHOUT_MEANING[flag])
    groups = {name: {f.name: given[f.name] for f in fields(group) if f.name in given} for name, group in GROUPS.items()}
    config = Config(**{name: GROUPS[name](**values) for name, values in groups.items()})
    _check_inputs(command, config)
    return config


def _check_inputs(command: Command, config: Config) -> None:
    """What a Config cannot know by itself: what the command needs, and what is on the disk."""
    run, model, retrieval, index = config.run, config.model, config.retrieval, config.index
    if not (run.eval_data if command == "evaluate" else run.train_data):
        kind = command.removesuffix("uate")
        raise UserError(f"no {kind} file: pass --{kind}_data FILE.jsonl")
    if command == "train" and retrieval.retrieve_only:
        raise UserError("--retrieve_only: is for atlas evaluate; training needs the reader")
    if not (index.load_index_path or index.passages or retrieval.use_file_passages):
        raise UserError("no passages: pass --load_index_path, --passages, --use_file_passages or --closed_book")
    for flag, files in (("train_data", run.train_data), ("eval_data", run.eval_data), ("passages", index.passages)):
        for file in files:
            if not Path(file).exists() or Path(file).is_dir():
                raise UserError(f"--{flag} {file}: no such file")
    found = model.model_path == "none" or Path(model.model_path).is_dir()
    _require(found, model, "model_path", "no such folder; leave it out to start from plain T5 and Contriever")
    found = index.load_index_path is None or Path(index.load_index_path).is_dir()
    _require(found, index, "load_index_path", "no such folder; --passages FILE.jsonl builds an index")
    reader = model.reader_model_type
    if not reader and (Path(model.model_path) / OUR_CHECKPOINT).is_file():
        return
    if not reader:
        raise UserError(f"--reader_model_type is missing: choose from {', '.join(READERS)}, or a local folder")
    found = reader in READERS or (Path(reader) / "config.json").is_file()
    what = "a folder without config.json" if Path(reader).is_dir() else "neither a known reader nor a local folder"
    _require(found, model, "reader_model_type", f"{what}; {_suggest(reader, READERS)}")


EXAMPLES: dict[Command, str] = {
    "train": """atlas train --task qa --train_data train.jsonl --eval_data dev.jsonl --name run1 --precision bf16 \\
         --reader_model_type google/t5-base-lm-adapt --model_path atlas/base --load_index_path index/base \\
         --train_retriever --query_side_retriever_training --n_context 20 --retriever_n_context 20 --lr 4e-5""",
    "evaluate": """atlas evaluate --task qa --eval_data dev.jsonl --name run1 --precision bf16 --write_results \\
         --reader_model_type google/t5-base-lm-adapt --model_path atlas/base --load_index_path index/base""",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


@functools.cache
def _parser(command: Command) -> argparse.ArgumentParser:
    parser = _Parser(f"atlas {command}", EXAMPLES[command], allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for group in GROUPS.values():
        section, help_of = parser.add_argument_group(group.__doc__), comments(group)
        for field in fields(group):
            section.add_argument(f"--{field.name}", **_argument(field, help_of[field.name]))
    return parser


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


def comments(group: type[Any]) -> dict[str, str]:
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


WITHOUT_MEANING = comments(NoEffectConfig)
