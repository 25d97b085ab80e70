"""Flags of a run: its name and files, its processes, its task, its optimizer."""

from dataclasses import dataclass
from typing import Literal

from atlas_jax.config.flag_fields import PathText, above_zero, at_least, changeable, require, valid_format, warned

TaskName = Literal["base", "mlm", "lm", "multiple_choice", "kilt", "section", "fever", "qa"]
Permutations = Literal["single", "cyclic", "all"]


@dataclass(frozen=True)
class RunConfig:
    """Run (its name, its files, how often it reports)"""

    name: str = changeable("experiment_name")  # the run's folder inside --checkpoint_dir
    checkpoint_dir: PathText = changeable("./checkpoint/")  # where the folders of all runs are
    seed: int = 0  # draws dropout, the order of the data, and --random_weights
    train_data: tuple[PathText, ...] = warned(())  # jsonl files to train on
    eval_data: tuple[PathText, ...] = changeable(())  # jsonl files to evaluate on, each scored by itself
    shuffle: bool = False  # train on the rows in a new random order each epoch
    per_gpu_batch_size: int = changeable(1)  # questions per device and step
    log_freq: int = changeable(100)  # train: steps between two lines of metrics
    eval_freq: int = changeable(500)  # train: steps between two evaluations; the last step is evaluated in any case
    save_freq: int = changeable(5000)  # train: steps between two checkpoints; the last step is saved in any case
    save_optimizer: bool = changeable(False)  # keep the optimizers in the last checkpoint of a finished run too, and in
    # the best; the others have them in any case, so that a run that was stopped resumes exactly
    keep: int | None = changeable(None)  # train: number of newest checkpoints to keep, beside that of the best step;
    # left out: those of all --save_freq steps; 0: none once the run has finished
    select_by: str | None = changeable(None)  # train: the score that decides which step is the best, FILE:METRIC with a
    # file of --eval_data, such as dev:f1; left out: the first file and the task's main metric
    max_bad_steps: int = changeable(20)  # train: stop after this many consecutive steps whose loss or gradient is not
    # finite
    write_results: bool = changeable(False)  # write the predictions of each evaluation to a jsonl file
    dont_write_passages: bool = changeable(False)  # leave the passages, most of the bytes, out of the --write_results
    # files
    mesh: str = changeable("auto")  # how devices share the work: sizes of data, fsdp, passages and model, as
    # data=8,fsdp=8; or auto
    cache_dir: PathText | None = changeable(None)  # folder for what is made once and used by later runs: compiled
    # programs, published indexes and token ids where theirs cannot be written; left out: $ATLAS_CACHE, or the user's
    # cache
    compile_cache: PathText = changeable("auto")  # folder that keeps compiled programs for the next run; auto: in
    # --cache_dir; or none
    coordinator: str | None = changeable(None)  # several hosts: host:port of process 0; SLURM, Open MPI and Google's
    # TPUs need none
    num_processes: int | None = changeable(None)  # with --coordinator: how many processes there are
    process_id: int | None = changeable(None)  # with --coordinator: index of this process, from 0
    main_port: int = changeable(-1)  # SLURM, Open MPI: port of process 0; -1: computed from the job id
    host_timeout: int = changeable(300)  # seconds to wait for processes at the start, or for one that stops responding

    def __post_init__(self) -> None:
        at_least(1, self, "num_processes", "host_timeout")
        at_least(0, self, "process_id")
        require(self.main_port == -1 or 1 <= self.main_port < 65536, self, "main_port", "must be 1 to 65535, or -1")
        at_least(1, self, "per_gpu_batch_size", "log_freq", "eval_freq", "save_freq", "max_bad_steps")
        at_least(0, self, "keep")


@dataclass(frozen=True)
class TaskConfig:
    """Task (what a row is, and how an answer is scored)"""

    task: TaskName  # how rows become questions and answers become scores
    qa_prompt_format: str = "question: {question} answer: <extra_id_0>"  # qa: the query, around {question}
    multiple_choice_num_options: int = 4  # multiple_choice: options per question, lettered from A
    multiple_choice_train_permutations: Permutations = "single"  # option orders to train on: as is, rotations, or all
    multiple_choice_eval_permutations: Permutations = changeable("single")  # orders to average over; cyclic is nearly
    # as good as all
    max_orders: int | None = changeable(None)  # multiple_choice: evaluate at most this many orders, spread evenly over
    # all; needed for all orders of more than 5 options
    mlm_noise_density: float = 0.15  # mlm: share of the tokens that is masked
    mlm_mean_noise_span_length: float = 3  # mlm: tokens in a masked span, on average
    min_words_per_lm_instance: int | None = None  # mlm, lm, section: skip texts of fewer words
    min_lm_context_ratio: float = 0.5  # lm: the given part is at least this share of the words
    max_lm_context_ratio: float = 0.5  # lm: the given part is at most this share; the rest is to be written

    def __post_init__(self) -> None:
        valid_format(self, "qa_prompt_format", only="question")
        at_least(0, self, "min_words_per_lm_instance")
        at_least(1, self, "max_orders")
        above_zero(self, "mlm_noise_density", "mlm_mean_noise_span_length")
        require(1 <= self.multiple_choice_num_options <= 26, self, "multiple_choice_num_options", "must be 1 to 26")
        feasible = self.multiple_choice_eval_permutations != "all" or self.multiple_choice_num_options <= 5
        remedy = f"{self.multiple_choice_num_options} options have too many orders; pass --max_orders 120, or cyclic"
        require(feasible or self.max_orders is not None, self, "multiple_choice_eval_permutations", remedy)
        require(self.mlm_noise_density < 1, self, "mlm_noise_density", "must be below 1, or no text is left")
        require(0 <= self.min_lm_context_ratio <= 1, self, "min_lm_context_ratio", "must be 0 to 1")
        ordered = self.min_lm_context_ratio <= self.max_lm_context_ratio <= 1
        require(ordered, self, "max_lm_context_ratio", f"must be {self.min_lm_context_ratio} (the minimum) to 1")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer (train)"""

    total_steps: int = warned(1000)  # steps to train for
    warmup_steps: int = 1000  # steps in which the learning rates rise
    scheduler: Literal["linear", "cosine", "fixed"] = "cosine"  # how the learning rates fall after that
    lr: float = 1e-4  # highest learning rate of the reader
    lr_retriever: float = 1e-5  # highest learning rate of the retriever
    accumulation_steps: int = 1  # steps whose gradients add up to one update
    loss_group: int | None = changeable(None)  # consecutive questions whose answer tokens share a mean loss, as those
    # of one GPU do in the PyTorch code; left out: --per_gpu_batch_size, or what the run was started with
    clip: float = 1.0  # largest norm of the gradient of reader and retriever together; with --shard_optim of each
    shard_optim: bool = False  # clip the gradients of reader and retriever each by its own norm; the optimizers are
    # always divided over devices, by the fsdp axis of --mesh
    weight_decay: float = 0.1  # AdamW: decoupled, on every parameter
    beta2: float = 0.999  # AdamW: decay of the second moment
    epsilon: float = 1e-6  # AdamW: added to the root of the second moment

    def __post_init__(self) -> None:
        at_least(1, self, "total_steps", "accumulation_steps", "loss_group")
        at_least(0, self, "warmup_steps", "lr", "lr_retriever", "weight_decay", "epsilon")
        above_zero(self, "clip")
        require(0 <= self.beta2 < 1, self, "beta2", "must be at least 0 and below 1")


@dataclass(frozen=True)
class NoEffectConfig:
    """No effect here (accepted, so that a published command line runs as it is)"""

    local_rank: int = changeable(-1)  # a process takes the GPUs it sees, under SLURM and Open MPI its share of
    # CUDA_VISIBLE_DEVICES
    shard_grads: bool = changeable(False)  # the fsdp axis of --mesh, on which all is by default, splits gradients
    save_index_n_shards: int = changeable(128)  # an index is read by the files it has, whatever their number
    scheduler_steps: int | None = changeable(None)  # schedules end at --total_steps; the PyTorch code does not read it
    # either
    alpha: float = changeable(1.0)  # AdamW has no such value; the PyTorch code does not read it either
