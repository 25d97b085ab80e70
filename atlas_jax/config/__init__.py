"""Every flag once: typed, documented, checked. The comment beside a field is its `--help` (see `commands.flags`).

A run is a `Config`: frozen groups of flags, by which part of the code reads them. Creating one resolves flags that
imply others and raises UserError for contradictions. A run is resumed with the same flags, but for those declared
`changeable`, which do not affect what it learns, and `warned`, whose change is accepted and logged as a warning.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from atlas_jax.config.flag_fields import PathText, ResumeRule, at_least, require
from atlas_jax.config.models import BERT_POSITIONS, READERS, GenerationConfig, ModelConfig, TextConfig
from atlas_jax.config.retrieval import DistillConfig, GoldMode, IndexConfig, RetrievalConfig
from atlas_jax.config.run import NoEffectConfig, OptimConfig, Permutations, RunConfig, TaskConfig, TaskName
from atlas_jax.config.run_weights import CHECKPOINT_FILE, follow_link, newest_checkpoint

__all__ = [
    "BERT_POSITIONS",
    "CHECKPOINT_FILE",
    "READERS",
    "Command",
    "Config",
    "DistillConfig",
    "GenerationConfig",
    "GoldMode",
    "IndexConfig",
    "ModelConfig",
    "NoEffectConfig",
    "OptimConfig",
    "PathText",
    "Permutations",
    "ResumeRule",
    "RetrievalConfig",
    "RunConfig",
    "TaskConfig",
    "TaskName",
    "TextConfig",
    "require",
    "resume_rules",
    "to_dict",
]

Command = Literal["train", "evaluate", "plan"]
RETRIEVER_MINLENGTH = 3  # tokens: [CLS], one of the text, [SEP]


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
        else:
            at_least(RETRIEVER_MINLENGTH, self.text, "text_maxlength")
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
        """The folder of trained weights: --model_path, else the run's newest checkpoint, else None."""
        if self.model.model_path != "none":
            return follow_link(Path(self.model.model_path))
        return newest_checkpoint(self.run_folder / "checkpoint")

    def _override(self, group: str, **flags: Any) -> None:
        object.__setattr__(self, group, replace(getattr(self, group), **flags))


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the value of each flag by name, without groups, as in config.json."""
    return {flag: value for group in vars(config).values() for flag, value in vars(group).items()}


def resume_rules() -> dict[str, ResumeRule]:
    """Maps each flag to whether a resumed run may have another value of it."""
    groups = (getattr(Config, "__annotations__", {})[group.name] for group in fields(Config))
    return {flag.name: flag.metadata.get("resume", "same") for group in groups for flag in fields(group)}
