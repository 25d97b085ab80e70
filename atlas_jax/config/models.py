"""Flags of the models: where they come from, what they read, and what they write."""

from dataclasses import dataclass
from typing import Literal

from atlas_jax.config.flag_fields import PathText, at_least, changeable, require, valid_format
from atlas_jax.errors import UserError

READERS = (
    *("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b"),
    *("google/t5-v1_1-base", "google/t5-v1_1-large", "google/t5-v1_1-xl", "google/t5-v1_1-xxl"),
    *("google/t5-base-lm-adapt", "google/t5-large-lm-adapt", "google/t5-xl-lm-adapt", "google/t5-xxl-lm-adapt"),
)
BERT_POSITIONS = 512  # position embeddings of the retriever


@dataclass(frozen=True)
class ModelConfig:
    """Model (reader, retriever, and where their weights come from)"""

    reader_model_type: PathText = changeable("")  # the T5 that reads: t5-{small,base,large,3b,11b},
    # google/t5-v1_1-{base,large,xl,xxl}, google/t5-{base,large,xl,xxl}-lm-adapt, or a local folder with config.json and
    # tokenizer; not needed if --model_path is a checkpoint of ours
    retriever_model_path: PathText = changeable("facebook/contriever")  # the encoder that retrieves: a BERT of the
    # Hugging Face hub by its name, or a local folder; weights in --model_path take precedence over its own
    model_path: PathText = changeable("none")  # folder with trained Atlas weights, ours or the published model.pth.tar;
    # none: resume the run's latest checkpoint, or else start from the two models above, whose weights are read from
    # their folders, or from the Hugging Face hub or its cache (HF_HOME, HF_HUB_OFFLINE)
    random_weights: bool = changeable(False)  # start from random weights, for tests and benchmarks: --seed draws both
    # models, and no weights are read or downloaded
    precision: Literal["fp16", "fp32", "bf16"] = "fp32"  # type to compute with; bf16 halves memory and time, fp16 is
    # refused
    dropout: float = 0.1  # share of activations dropped in training, reader and retriever
    use_gradient_checkpoint_reader: bool = False  # train with less memory and more time: recompute the reader's layers
    use_gradient_checkpoint_retriever: bool = False  # the same for the retriever

    def __post_init__(self) -> None:
        require(self.precision != "fp16", self, "precision", "overflows in T5; use bf16, as small and as fast")
        require(0 <= self.dropout < 1, self, "dropout", "must be at least 0 and below 1")
        if self.random_weights and self.model_path != "none":
            raise UserError(f"--random_weights: --model_path {self.model_path} has weights; leave one of the two out")


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
        at_least(1, self, "text_maxlength")
        if self.target_maxlength != -1:
            at_least(1, self, "target_maxlength")
        valid_format(self, "encoder_format")
        valid_format(self, "retriever_format")
        valid_format(self, "decoder_format", only="target")
        valid_format(self, "decoder_prompt_format", only="query")

    @property
    def retriever_maxlength(self) -> int:
        """The largest number of tokens that the retriever reads of a query or of a passage."""
        return min(self.text_maxlength, BERT_POSITIONS)


@dataclass(frozen=True)
class GenerationConfig:
    """Generation (how an answer is written)"""

    generation_max_length: int = changeable(128)  # tokens of an answer at most, the start token included
    generation_min_length: int | None = changeable(None)  # tokens of an answer at least
    generation_length_penalty: float = changeable(1.0)  # beam search: above 0 favours longer answers, below 0 shorter
    # ones
    generation_num_beams: int = changeable(1)  # beams of the search; 1 is greedy

    def __post_init__(self) -> None:
        at_least(1, self, "generation_max_length", "generation_num_beams")
        at_least(0, self, "generation_min_length")
        room = (self.generation_min_length or 0) <= self.generation_max_length
        require(room, self, "generation_min_length", f"is over --generation_max_length {self.generation_max_length}")
