"""Examples and the passages found for them, as arrays of a few fixed shapes for the reader."""

from collections.abc import Sequence

from jax.sharding import Mesh

from atlas_jax.config import TextConfig
from atlas_jax.data.reader_inputs import ReaderText
from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.evaluation.step import CHOICE_POSITION
from atlas_jax.mesh import ArrayOrShape, local_row_indices, put_batch, put_passages
from atlas_jax.models.fid import ReaderBatch
from atlas_jax.retrieval.passage_source import RetrievedPassages
from atlas_jax.runtime.process_group import process_group
from atlas_jax.tasks import Example

MAX_TARGET = 2**14  # tokens of a target where --target_maxlength sets no limit


class ReaderBatcher:
    """Makes batches of `size` rows; what examples do not fill holds nothing.

    Each process makes only the rows that its devices work on, `own`, and all agree on how long the longest text is.
    """

    def __init__(self, text: TextConfig, tokenizer: Tokenizer, mesh: Mesh, size: int):
        self.text = text
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.size = size
        self.own = local_row_indices(mesh, size)
        self._join = ReaderText(tokenizer, text.encoder_format, text.text_maxlength)

    def local_examples(
        self, examples: Sequence[Example], found: RetrievedPassages
    ) -> tuple[list[Example], RetrievedPassages]:
        """Of a batch what this process makes."""
        rows = self.own[self.own < len(examples)]
        return [examples[row] for row in rows], found._replace(numbers=found.numbers[rows], valid=found.valid[rows])

    def passages(self, queries: Sequence[str], found: RetrievedPassages) -> list[list[int]]:
        """The ids of each query with each of its passages, row after row; none where there is no passage."""
        texts = [ids for row in self._join.encode(queries, found.numbers, found.store) for ids in row]
        return [ids if valid else [] for ids, valid in zip(texts, found.valid.reshape(-1), strict=True)]

    def prompts(self, queries: Sequence[str]) -> list[list[int]]:
        """What the decoder is given to go on from; empty without --decoder_prompt_format."""
        form = self.text.decoder_prompt_format
        return self.tokenizer.ids([form.format(query=query) for query in queries]) if form else []

    def batch(
        self, examples: Sequence[Example], passages: Sequence[list[int]], prompts: list[list[int]], length: int, n: int
    ) -> ReaderBatch:
        """The arrays, on the devices, for `n` passages an example of at most `length` tokens."""
        empty = len(self.own) - len(examples)
        ids, mask = pad([*passages, *[[]] * (empty * n)], length, self.tokenizer.pad_id)
        maximum = self.text.target_maxlength
        targets = self.tokenizer.target_ids([self._target(example) for example in examples], maximum)
        (longest,) = process_group().all_max(max(CHOICE_POSITION + 1, *map(len, targets), 0))
        target, target_mask = pad(
            [*targets, *[[]] * empty], bucket(longest, max(longest, maximum or MAX_TARGET)), self.tokenizer.pad_id
        )
        for row, prompt in enumerate(prompts):
            target_mask[row, : len(prompt)] = False  # what is given is not to be learnt
        shape = (len(self.own), n, length)
        return put_reader_batch(self.mesh, ids.reshape(shape), mask.reshape(shape), target, target_mask, rows=self.size)

    def _target(self, example: Example) -> str:
        target = example.target or ""
        if self.text.decoder_prompt_format:
            target = self.text.decoder_prompt_format.format(query=example.query) + target
        return self.text.decoder_format.format(target=target) if self.text.decoder_format else target


def put_reader_batch(
    mesh: Mesh,
    passages: ArrayOrShape,
    mask: ArrayOrShape,
    target: ArrayOrShape,
    target_mask: ArrayOrShape,
    rows: int | None = None,
) -> ReaderBatch:
    """The arrays on the devices, see `put_batch`."""
    read = (put_passages(mesh, array, rows) for array in (passages, mask))
    return ReaderBatch(*read, *(put_batch(mesh, array, rows) for array in (target, target_mask)))
