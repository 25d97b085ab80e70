"""Every flag once: typed, documented, checked. The comment beside a field is its `--help` (see `commands.flags`).

A run is a `Config`: frozen groups of flags, by which part of the code reads them. Creating one resolves flags that
imply others and raises UserError for contradictions. A run is resumed with the same flags, but for those declared
`changeable`, which do not affect what it learns, and `warned`, whose change is accepted and logged as a warning.
"""

import re
import string
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from atlas_jax.errors import UserError

Command = Literal["train", "evaluate", "plan"]
TaskName = Literal["base", "mlm", "lm", "multiple_choice", "kilt", "section", "fever", "qa"]
Permutations = Literal["single", "cyclic", "all"]

READERS = (
    *("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b"),
    *("google/t5-v1_1-base", "google/t5-v1_1-large", "google/t5-v1_1-xl", "google/t5-v1_1-xxl"),
    *("google/t5-base-lm-adapt", "google/t5-large-lm-adapt", "google/t5-xl-lm-adapt", "google/t5-xxl-lm-adapt"),
)
GoldMode = Literal["evalnormsum", "loop", "ppmean", "emdr"]
CHECKPOINT_FILE = "atlas.json"  # the file by which a checkpoint of ours is recognised
BERT_POSITIONS = 512  # position embeddings of the retriever
FOREVER = 2**32
ResumeRule = Literal["same", "changeable", "warned"]


def changeable(default: Any) -> Any:
    """A flag that may have another value when a run is resumed."""
    return field(default=default, metadata={"resume": "changeable"})


def warned(default: Any) -> Any:
    """A flag that may have another value when a run is resumed, which is logged as a warning."""
    return field(default=default, metadata={"resume": "warned"})


def require(ok: bool, group: object, flag: str, remedy: str) -> None:
    """Raises UserError with the flag, its value and the remedy, unless `ok`."""
    if not ok:
        raise UserError(f"--{flag} {getattr(group, flag)}: {remedy}")


def _at_least(low: int, group: object, *flags: str) -> None:
    for flag in flags:
        value = getattr(group, flag)
        require(value is None or value >= low, group, flag, f"must be at least {low}")


def _above_zero(group: object, *flags: str) -> None:
    for flag in flags:
        require(getattr(group, flag) > 0, group, flag, "must be above 0")


def _formats(group: object, flag: str, only: str | None = None) -> None:
    """UserError unless `str.format` can fill in the flag: with fields of a passage, or with the field `only`."""
    text = getattr(group, flag) or ""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise UserError(f"--{flag} {text}: {error}; a literal brace is written twice") from None
    for name in names:
        require(name.isidentifier(), group, flag, f"{{{name}}} is not a field; a field is a name, such as {{title}}")
        require(only in (None, name), group, flag, f"{{{name}}} is not known here, only {{{only}}} is")


@dataclass(frozen=True)
class RunConfig:
    """Run (its name, its files, how often it reports)"""

    name: str = changeable("experiment_name")  # the run's folder inside --checkpoint_dir
    checkpoint_dir: str = changeable("./checkpoint/")  # where the folders of all runs are
    seed: int = 0  # draws the weights that are not loaded, dropout, and the order of the data
    train_data: tuple[str, ...] = warned(())  # jsonl files to train on
    eval_data: tuple[str, ...] = changeable(())  # jsonl files to evaluate on, each scored by itself
    shuffle: bool = False  # train on the rows in a new random order each epoch
    per_gpu_batch_size: int = changeable(1)  # questions per device and step
    log_freq: int = changeable(100)  # train: steps between two lines of metrics
    eval_freq: int = changeable(500)  # train: steps between two evaluations; the last step is evaluated in any case
    save_freq: int = changeable(5000)  # train: steps between two checkpoints; the last step is saved in any case
    save_optimizer: bool = changeable(False)  # keep the optimizers in the last checkpoint of a finished run too; the
    # others have them in any case, so that a run that was stopped resumes exactly
    keep: int | None = changeable(None)  # train: number of newest checkpoints to keep; left out: all; 0: none once the
    # run has finished
    max_bad_steps: int = changeable(20)  # train: stop after this many consecutive steps whose loss or gradient is not
    # finite
    write_results: bool = changeable(False)  # write the predictions of each evaluation to a jsonl file
    dont_write_passages: bool = changeable(False)  # leave the passages, most of the bytes, out of the --write_results
    # files
    mesh: str = changeable("auto")  # how devices share the work: sizes of data, fsdp, passages and model, as
    # data=8,fsdp=8; or auto
    compile_cache: str = changeable("auto")  # folder that keeps compiled programs for the next run; auto: the user's
    # cache; or none
    coordinator: str | None = changeable(None)  # several hosts: host:port of process 0; SLURM, Open MPI and Google's
    # TPUs need none
    num_processes: int | None = changeable(None)  # with --coordinator: how many processes there are
    process_id: int | None = changeable(None)  # with --coordinator: index of this process, from 0
    main_port: int = changeable(-1)  # SLURM, Open MPI: port of process 0; -1: computed from the job id
    host_timeout: int = changeable(300)  # seconds to wait for processes at the start, or for one that stops responding

    def __post_init__(self) -> None:
        _at_least(1, self, "num_processes", "host_timeout")
        _at_least(0, self, "process_id")
        require(self.main_port == -1 or 1 <= self.main_port < 65536, self, "main_port", "must be 1 to 65535, or -1")
        _at_least(1, self, "per_gpu_batch_size", "log_freq", "eval_freq", "save_freq", "max_bad_steps")
        _at_least(0, self, "keep")


@dataclass(frozen=True)
class ModelConfig:
    """Model (reader, retriever, and where their weights come from)"""

    reader_model_type: str = changeable("")  # the T5 that reads: t5-{small,base,large,3b,11b},
    # google/t5-v1_1-{base,large,xl,xxl}, google/t5-{base,large,xl,xxl}-lm-adapt, or a local folder with config.json and
    # tokenizer; not needed if --model_path is a checkpoint of ours
    retriever_model_path: str = changeable("facebook/contriever")  # the encoder that retrieves: a known name or a local
    # folder; weights in --model_path take precedence over its own
    model_path: str = changeable("none")  # folder with trained Atlas weights, ours or the published model.pth.tar;
    # none: resume the run's latest checkpoint, or else start from the two models above
    precision: Literal["fp16", "fp32", "bf16"] = "fp32"  # type to compute with; bf16 halves memory and time, fp16 is
    # refused
    dropout: float = 0.1  # share of activations dropped in training, reader and retriever
    use_gradient_checkpoint_reader: bool = False  # train with less memory and more time: recompute the reader's layers
    use_gradient_checkpoint_retriever: bool = False  # the same for the retriever

    def __post_init__(self) -> None:
        require(self.precision != "fp16", self, "precision", "overflows in T5; use bf16, as small and as fast")
        require(0 <= self.dropout < 1, self, "dropout", "must be at least 0 and below 1")


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
        """The largest number of tokens that the retriever reads of a query or of a passage."""
        return min(self.text_maxlength, BERT_POSITIONS)


@dataclass(frozen=True)
class RetrievalConfig:
    """Retrieval (which passages a question gets)"""

    n_context: int = 1  # passages the reader sees per question
    retriever_n_context: int = 5  # train: passages retrieved per question; the retriever learns from all of them
    filtering_overretrieve_ratio: int = 2  # tasks that drop passages (mlm, lm, section) search for this many times more
    retrieve_with_rerank: bool = False  # embed the best passages again with the current encoder and reorder them
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
            require(enough, self, rerank, f"must be at least --n_context {self.n_context}")
        if self.retrieve_only and (self.use_file_passages or self.closed_book):
            raise UserError("--retrieve_only: drop --use_file_passages and --closed_book, which retrieve nothing")

    @property
    def searched(self) -> tuple[str, int]:
        """The flag that sets how many passages a search finds per question, and that number."""
        flag = "n_to_rerank_with_retrieve_with_rerank" if self.retrieve_with_rerank else "n_context"
        return flag, getattr(self, flag)


@dataclass(frozen=True)
class IndexConfig:
    """Index (the passages to search, and how)"""

    passages: tuple[str, ...] = warned(())  # jsonl files of passages to embed and search; not read with
    # --load_index_path
    max_passages: int = -1  # use only this many, the first ones; -1 uses all
    load_index_path: str | None = warned(None)  # folder of an index and its passages: ours, or the published
    # embeddings.N.pt
    save_index_path: str | None = warned(None)  # folder to write the index to whenever it was built
    index_mode: Literal["flat", "faiss"] = "flat"  # flat: exact search on the mesh; faiss: on the host
    faiss_index_type: Literal["ivfflat", "flat", "ivfsq", "ivfpq", "pq"] = "flat"  # faiss: exact (flat), clustered
    # (ivf...), compressed (sq, pq)
    faiss_code_size: int | None = None  # faiss: bytes per passage for pq and ivfpq; must divide the vectors' width
    per_gpu_embedder_batch_size: int = changeable(512)  # passages embedded at a time per device

    def __post_init__(self) -> None:
        if self.max_passages != -1:
            _at_least(1, self, "max_passages")
        _at_least(1, self, "faiss_code_size", "per_gpu_embedder_batch_size")
        if self.index_mode == "faiss" and self.faiss_index_type in ("pq", "ivfpq"):
            require(self.faiss_code_size is not None, self, "faiss_index_type", "needs --faiss_code_size, such as 64")


@dataclass(frozen=True)
class GenerationConfig:
    """Generation (how an answer is written)"""

    generation_max_length: int = changeable(128)  # tokens of an answer at most, the start token included
    generation_min_length: int | None = changeable(None)  # tokens of an answer at least
    generation_length_penalty: float = changeable(1.0)  # beam search: above 0 favours longer answers, below 0 shorter
    # ones
    generation_num_beams: int = changeable(1)  # beams of the search; 1 is greedy

    def __post_init__(self) -> None:
        _at_least(1, self, "generation_max_length", "generation_num_beams")
        _at_least(0, self, "generation_min_length")
        room = (self.generation_min_length or 0) <= self.generation_max_length
        require(room, self, "generation_min_length", f"is over --generation_max_length {self.generation_max_length}")


@dataclass(frozen=True)
class TaskConfig:
    """Task (what a row is, and how an answer is scored)"""

    task: TaskName  # how rows become questions and answers become scores
    qa_prompt_format: str = "question: {question} answer: <extra_id_0>"  # qa: the query, around {question}
    multiple_choice_num_options: int = 4  # multiple_choice: options per question, lettered from A
    multiple_choice_train_permutations: Permutations = "single"  # option orders to train on: as is, rotations, or all
    multiple_choice_eval_permutations: Permutations = changeable("single")  # orders to average over; cyclic is nearly
    # as good as all
    mlm_noise_density: float = 0.15  # mlm: share of the tokens that is masked
    mlm_mean_noise_span_length: float = 3  # mlm: tokens in a masked span, on average
    min_words_per_lm_instance: int | None = None  # mlm, lm, section: skip texts of fewer words
    min_lm_context_ratio: float = 0.5  # lm: the given part is at least this share of the words
    max_lm_context_ratio: float = 0.5  # lm: the given part is at most this share; the rest is to be written

    def __post_init__(self) -> None:
        _formats(self, "qa_prompt_format", only="question")
        _at_least(0, self, "min_words_per_lm_instance")
        _above_zero(self, "mlm_noise_density", "mlm_mean_noise_span_length")
        require(1 <= self.multiple_choice_num_options <= 26, self, "multiple_choice_num_options", "must be 1 to 26")
        require(self.mlm_noise_density < 1, self, "mlm_noise_density", "must be below 1, or no text is left")
        require(0 <= self.min_lm_context_ratio <= 1, self, "min_lm_context_ratio", "must be 0 to 1")
        ordered = self.min_lm_context_ratio <= self.max_lm_context_ratio <= 1
        require(ordered, self, "max_lm_context_ratio", f"must be {self.min_lm_context_ratio} (the minimum) to 1")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation (what the retriever learns from the reader; train)"""

    train_retriever: bool = False  # train the retriever too, not the reader alone
    gold_score_mode: Literal["evalnormsum", "loop", "ppmean", "emdr", "pdist", "adist"] = "ppmean"  # how the reader
    # scores passages: ppmean (pdist in the paper), evalnormsum (adist in the paper), loop or emdr
    temperature_score: float = 0.01  # softmax temperature of the retriever's scores
    temperature_gold: float = 0.01  # softmax temperature of the reader's gold scores
    freeze_retriever_steps: int = -1  # steps at the start in which the retriever does not learn
    refresh_index: str = "-1"  # embed the passages again every N steps, such as 100; or by schedule, such as
    # 0-100:10,100-1000000:500 for every 10 steps in the first 100 and every 500 later; -1: never
    compute_crossattention_stats: bool = False  # log the correlation of cross-attention with the gold scores

    def __post_init__(self) -> None:
        _above_zero(self, "temperature_score", "temperature_gold")
        valid = self.refresh_schedule and all(start < end and every for start, end, every in self.refresh_schedule)
        require(bool(valid), self, "refresh_index", "expected -1, or 100, or START-END:EVERY,START-END:EVERY")

    @property
    def gold(self) -> GoldMode:
        """The mode by its name in the code; the flag may have the paper's name."""
        match self.gold_score_mode:
            case "pdist":
                return "ppmean"
            case "adist":
                return "evalnormsum"
            case mode:
                return mode

    @property
    def refresh_schedule(self) -> tuple[tuple[int, int, int], ...]:
        """Ranges (start, end, every): in steps [start, end) the index is built at start, then every `every` steps."""
        text = self.refresh_index.replace(" ", "")
        if text == "-1" or text.isdecimal():
            text = f"0-{FOREVER}:{FOREVER if text == '-1' else text}"  # Reference: -1 too refreshes at step 0
        pieces = [re.fullmatch(r"(\d+)-(\d+):(\d+)", piece) for piece in text.split(",")]
        return tuple((int(p[1]), int(p[2]), int(p[3])) for p in pieces if p) if all(pieces) else ()


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer (train)"""

    total_steps: int = warned(1000)  # steps to train for
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
        require(0 <= self.beta2 < 1, self, "beta2", "must be at least 0 and below 1")


@dataclass(frozen=True)
class NoEffectConfig:
    """No effect here (accepted, so that a published command line runs as it is)"""

    local_rank: int = changeable(-1)  # a process takes the GPUs it sees, under SLURM and Open MPI its share of
    # CUDA_VISIBLE_DEVICES
    shard_optim: bool = changeable(False)  # the fsdp axis of --mesh, on which all is by default, splits parameters and
    # optimizers
    shard_grads: bool = changeable(False)  # the fsdp axis of --mesh splits gradients too
    save_index_n_shards: int = changeable(128)  # an index is read by the files it has, whatever their number
    scheduler_steps: int | None = changeable(None)  # schedules end at --total_steps; the PyTorch code does not read it
    # either
    alpha: float = changeable(1.0)  # AdamW has no such value; the PyTorch code does not read it either


@dataclass(frozen=True)
class Config:
    """All flags of a run, by group; flags that imply others are resolved on creation."""

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
        self._override("distill", gold_score_mode=self.distill.gold)
        if self.text.target_maxlength == -1:
            self._override("text", target_maxlength=None)

    @property
    def passages_a_query(self) -> int:
        """Passages of each query in a training step; the reader is trained on the first --n_context of them."""
        retrieval = self.retrieval
        if retrieval.use_file_passages:
            return retrieval.n_context
        if self.distill.train_retriever:
            return retrieval.retriever_n_context
        return min(retrieval.n_context, retrieval.retriever_n_context)

    @property
    def run_folder(self) -> Path:
        """The folder that the run writes to."""
        return Path(self.run.checkpoint_dir) / self.run.name

    @property
    def weights_folder(self) -> Path | None:
        """The folder of trained weights: --model_path, else the run's latest checkpoint, else None."""
        if self.model.model_path != "none":
            return Path(self.model.model_path)
        latest = self.run_folder / "checkpoint" / "latest"
        return latest if (latest / CHECKPOINT_FILE).is_file() else None

    def _override(self, group: str, **flags: Any) -> None:
        object.__setattr__(self, group, replace(getattr(self, group), **flags))


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the value of each flag by name, without groups, as in config.json."""
    return {flag: value for group in vars(config).values() for flag, value in vars(group).items()}


def resume_rules() -> dict[str, ResumeRule]:
    """Maps each flag to whether a resumed run may have another value of it."""
    groups = (getattr(Config, "__annotations__", {})[group.name] for group in fields(Config))
    return {flag.name: flag.metadata.get("resume", "same") for group in groups for flag in fields(group)}
