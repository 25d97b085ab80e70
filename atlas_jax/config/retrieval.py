"""Flags of retrieval: which passages a question gets, from which index, and what the retriever learns."""

import re
from dataclasses import dataclass
from typing import Literal

from atlas_jax.config.flag_fields import PathText, above_zero, at_least, changeable, require, warned
from atlas_jax.errors import UserError

GoldMode = Literal["evalnormsum", "loop", "ppmean", "emdr"]
FOREVER = 2**32


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
        at_least(1, self, "n_context", "retriever_n_context", "filtering_overretrieve_ratio", rerank)
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

    passages: tuple[PathText, ...] = warned(())  # jsonl files of passages to embed and search; not read with
    # --load_index_path
    max_passages: int = -1  # use only this many, the first ones; -1 uses all
    load_index_path: PathText | None = warned(None)  # folder of an index and its passages: ours, or the published
    # embeddings.N.pt
    save_index_path: PathText | None = warned(None)  # folder to write the index to whenever it was built
    index_mode: Literal["flat", "faiss"] = "flat"  # flat: exact search on the mesh; faiss: on the host
    faiss_index_type: Literal["ivfflat", "flat", "ivfsq", "ivfpq", "pq"] = "flat"  # faiss: exact (flat), clustered
    # (ivf...), compressed (sq, pq)
    faiss_code_size: int | None = None  # faiss: bytes per passage for pq and ivfpq; must divide the vectors' width
    per_gpu_embedder_batch_size: int = changeable(512)  # passages embedded at a time per device

    def __post_init__(self) -> None:
        if self.max_passages != -1:
            at_least(1, self, "max_passages")
        at_least(1, self, "faiss_code_size", "per_gpu_embedder_batch_size")
        if self.index_mode == "faiss" and self.faiss_index_type in ("pq", "ivfpq"):
            require(self.faiss_code_size is not None, self, "faiss_index_type", "needs --faiss_code_size, such as 64")


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
        above_zero(self, "temperature_score", "temperature_gold")
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
