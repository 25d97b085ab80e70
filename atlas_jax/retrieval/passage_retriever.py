"""The retriever at work: its encoders, its index, and what they find for a batch of examples."""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from atlas_jax.config import Config
from atlas_jax.data.reader_inputs import ReaderText
from atlas_jax.data.tokens import Tokenizer
from atlas_jax.mesh import global_batch_size
from atlas_jax.models.atlas import Retriever
from atlas_jax.retrieval.embedder import Embedder
from atlas_jax.retrieval.passage_index import open_passage_index, rebuild_passage_index
from atlas_jax.retrieval.passage_source import IndexPassages
from atlas_jax.retrieval.search import Rerank, Search
from atlas_jax.runtime.process_group import process_group
from atlas_jax.runtime.progress import progress


class PassageRetriever:
    """Finds passages with the retriever's present parameters, in an index that may be older than they are."""

    def __init__(
        self,
        config: Config,
        retriever: Retriever,
        tokenizer: Tokenizer,
        mesh: Mesh,
        scratch: Path,
        fingerprints: Sequence[str],
    ):
        """`fingerprints`: of the passage encoder, and of others whose index will do as well."""
        self.config, self.mesh, self.scratch = config, mesh, scratch
        length = min(config.text.retriever_maxlength, retriever.encoder_of("query").cfg.max_positions)
        self.queries = Embedder(retriever, "query", tokenizer, mesh, length)
        self.passages = Embedder(retriever, "passage", tokenizer, mesh, length)
        self.library = open_passage_index(config, self.passages, fingerprints, mesh, scratch)
        self._search = Search(self.library.index, self.queries, global_batch_size(mesh, config.run.per_gpu_batch_size))
        self.source = IndexPassages(self._search, self.library.passages)
        if config.retrieval.retrieve_with_rerank:
            with process_group().process_0_first():
                tokens = self.library.passages.tokens(tokenizer, config.text.retriever_format, "retriever")
            candidates, batch = config.retrieval.searched[1], config.index.per_gpu_embedder_batch_size
            self.source.search = Rerank(self._search, self.passages, tokens, candidates, batch)

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Tokenizes all passages for the reader now, visibly, rather than a few at a time later."""
        text = ReaderText(tokenizer, self.config.text.encoder_format, self.config.text.text_maxlength)
        count = len(self.library.passages)
        with process_group().process_0_first(), progress("tokenizing for the reader", "passages", count) as more:
            text.prepare(self.library.passages, more)

    def update(self, retriever: Retriever) -> None:
        """Takes the retriever's present parameters, for queries and for what is embedded from now on."""
        self.queries.update(retriever)
        self.passages.update(retriever)

    def rebuild(self, fingerprint: str) -> None:
        """Embeds all passages with the present parameters, which have this fingerprint."""
        self.library = rebuild_passage_index(
            self.library, self.config, self.passages, fingerprint, self.mesh, self.scratch
        )
        self._search.index = self.library.index
        self.source.store = self.library.passages
