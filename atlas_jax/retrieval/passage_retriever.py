"""Retrieval: embeds queries, searches the index and returns the passages of a batch of examples."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from atlas_jax.config import Config, TextConfig
from atlas_jax.data.reader_inputs import ReaderInputEncoder
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.mesh import global_batch_size
from atlas_jax.models.atlas import Retriever
from atlas_jax.retrieval.embedder import Embedder
from atlas_jax.retrieval.passage_index import PassageIndex, open_passage_index, rebuild_passage_index
from atlas_jax.retrieval.passage_source import RetrievedPassages
from atlas_jax.retrieval.passage_store import PassageTokens
from atlas_jax.retrieval.rerank import Reranker
from atlas_jax.retrieval.search import SearchResult
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import progress
from atlas_jax.tasks import Example


class PassageRetriever:
    """A `PassageSource` that searches an index.

    Queries are embedded with the current parameters; the index may have been built by older ones.
    """

    def __init__(
        self,
        index: PassageIndex,
        query_embedder: Embedder,
        passage_embedder: Embedder,
        query_batch_size: int,
        reranker: Reranker | None = None,
    ):
        """`query_batch_size`: the size of every batch of queries; smaller batches are padded to it."""
        self.index = index
        self.query_embedder = query_embedder
        self.passage_embedder = passage_embedder
        self.query_batch_size = query_batch_size
        self.reranker = reranker

    @classmethod
    def open(
        cls,
        config: Config,
        retriever: Retriever,
        tokenizer: Tokenizer,
        mesh: Mesh,
        scratch: Path,
        fingerprints: Sequence[str],
    ) -> "PassageRetriever":
        """Opens or builds the index that the flags name.

        `fingerprints`: accepted fingerprints; the first is the current passage encoder's. `scratch`: a folder that all
        processes share, for an index built without --save_index_path.
        """
        length = min(config.text.retriever_maxlength, retriever.encoder_of("query").cfg.max_positions)
        queries = Embedder(retriever, "query", tokenizer, mesh, length)
        passages = Embedder(retriever, "passage", tokenizer, mesh, length)
        index = open_passage_index(config, passages, fingerprints, mesh, scratch)
        reranker = None
        if config.retrieval.retrieve_with_rerank:
            tokens = _tokenize_for_retriever(index, tokenizer, config.text)
            candidates = config.retrieval.searched[1]
            reranker = Reranker(passages, tokens, candidates, config.index.per_gpu_embedder_batch_size)
        return cls(index, queries, passages, global_batch_size(mesh, config.run.per_gpu_batch_size), reranker)

    @property
    def programs(self) -> Sequence[CompiledFunction]:
        """The encoders' compiled functions."""
        return (
            (self.query_embedder.program, self.passage_embedder.program)
            if self.reranker
            else (self.query_embedder.program,)
        )

    def begin_retrieval(self, examples: Sequence[Example], n: int) -> Callable[[], RetrievedPassages]:
        """See `PassageSource.begin_retrieval`: the n best passages of each example's query."""
        store, wait = self.index.passages, self.begin_search([example.query for example in examples], n)

        def retrieved() -> RetrievedPassages:
            numbers = wait().numbers
            return RetrievedPassages(store, numbers, np.ones(numbers.shape, bool))

        return retrieved

    def begin_search(self, queries: Sequence[str], k: int) -> Callable[[], SearchResult]:
        """Starts to search the k best passages of each query; the returned function waits for them.

        Work on the devices is dispatched before this returns, ahead of any later work. With reranking the search
        itself is over when this returns.
        """
        vectors = self.query_embedder.embed_queries(queries, self.query_batch_size)
        if self.reranker is None:
            return self.index.vectors.begin_search(vectors, len(queries), k)
        on_host = np.asarray(vectors)[: len(queries)]
        candidates = self.index.vectors.search(on_host, self.reranker.candidates).numbers
        result = self.reranker(on_host, candidates, k)
        return lambda: result

    def tokenize_for_retriever(self, text: TextConfig) -> None:
        """Tokenizes all passages for the retriever now, with progress, rather than when they are first retrieved."""
        _tokenize_for_retriever(self.index, self.passage_embedder.tokenizer, text)

    def tokenize_for_reader(self, text: TextConfig, tokenizer: Tokenizer) -> None:
        """Tokenizes all passages for the reader now, with progress, rather than when they are first retrieved."""
        encoder = ReaderInputEncoder(tokenizer, text.encoder_format, text.text_maxlength)
        count = len(self.index.passages)
        with process_group().process_0_first(), progress("tokenizing for the reader", "passages", count) as advance:
            encoder.prepare(self.index.passages, advance)

    def update(self, retriever: Retriever) -> None:
        """Replaces the parameters of both embedders by those of `retriever`."""
        self.query_embedder.update(retriever)
        self.passage_embedder.update(retriever)

    def rebuild(self, config: Config, fingerprint: str, scratch: Path) -> None:
        """Embeds all passages again with the current parameters, which have this fingerprint."""
        self.index = rebuild_passage_index(
            self.index, config, self.passage_embedder, fingerprint, self.passage_embedder.mesh, scratch
        )


def _tokenize_for_retriever(index: PassageIndex, tokenizer: Tokenizer, text: TextConfig) -> PassageTokens:
    """Token ids of all passages for the retriever, made with progress if they are not there yet."""
    count = len(index.passages)
    with process_group().process_0_first(), progress("tokenizing for the retriever", "passages", count) as advance:
        return index.passages.tokens(tokenizer, text.retriever_format, "retriever", advance)
