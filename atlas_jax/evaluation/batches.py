"""Examples and their retrieved passages as reader arrays of a few fixed shapes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from atlas_jax.config import TextConfig
from atlas_jax.data.reader_inputs import ReaderInputEncoder
from atlas_jax.data.tokens import Tokenizer, bucket, pad
from atlas_jax.errors import UserError
from atlas_jax.evaluation.step import CHOICE_POSITION
from atlas_jax.mesh import ArrayOrShape, local_row_indices, put_batch, put_passages
from atlas_jax.models.fid import ReaderBatch
from atlas_jax.retrieval.passage_source import RetrievedPassages
from atlas_jax.runtime.process_group import process_group
from atlas_jax.tasks import Example

MAX_TARGET = 2**14  # tokens of a target if --target_maxlength sets no limit


class ReaderBatcher:
    """Makes batches of `size` rows for the reader; rows without an example are padding.

    Each process makes the rows of its own devices, `local_rows`; all agree on the length of the longest text.
    """

    def __init__(self, text: TextConfig, tokenizer: Tokenizer, mesh: Mesh, size: int):
        self.text = text
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.size = size
        self.local_rows = local_row_indices(mesh, size)
        self._reader_text = ReaderInputEncoder(tokenizer, text.encoder_format, text.text_maxlength)

    def select_local(
        self, examples: Sequence[Example], retrieved: RetrievedPassages
    ) -> tuple[list[Example], RetrievedPassages]:
        """The examples, and their passages, that this process makes the rows of."""
        rows = self.local_rows[self.local_rows < len(examples)]
        local = retrieved._replace(numbers=retrieved.numbers[rows], valid=retrieved.valid[rows])
        return [examples[row] for row in rows], local

    def passages(self, queries: Sequence[str], retrieved: RetrievedPassages) -> list[list[int]]:
        """Token ids of each query with each of its passages, query after query; empty where there is no passage."""
        encoded = self._reader_text.encode(queries, retrieved.numbers, retrieved.store)
        texts = [ids for row in encoded for ids in row]
        return [ids if valid else [] for ids, valid in zip(texts, retrieved.valid.reshape(-1), strict=True)]

    def prompts(self, queries: Sequence[str]) -> list[list[int]]:
        """Token ids that the decoder starts with, by query; an empty list without --decoder_prompt_format."""
        form = self.text.decoder_prompt_format
        return self.tokenizer.ids([form.format(query=query) for query in queries]) if form else []

    @property
    def has_text_before_answer(self) -> bool:
        """True if the flags put text before the answer, so that a letter is not at CHOICE_POSITION."""
        return bool(self.text.decoder_format or self.text.decoder_prompt_format)

    def letter_positions(
        self, examples: Sequence[Example], letters: Sequence[str], tokens: Int32[np.ndarray, " c"]
    ) -> list[int]:
        """Returns the letter's position in each local row's target: the first at which the letters' targets differ.

        0 for rows without an example. UserError if the letters are not these `tokens` there, or cut off.
        """
        positions = []
        for example in examples:
            target = (example.target or "")[:-1]
            texts = [self._target(dataclasses.replace(example, target=target + letter)) for letter in letters]
            columns = zip(*self.tokenizer.target_ids(texts, self.text.target_maxlength), strict=False)
            found = next(((i, column) for i, column in enumerate(columns) if len(set(column)) > 1), None)
            if found is None or list(found[1]) != tokens.tolist():
                raise UserError(
                    f"--decoder_format {self.text.decoder_format}, --target_maxlength {self.text.target_maxlength}: no "
                    "token of the target tells the letters apart; put spaces around {target}, or allow more tokens"
                )
            positions.append(found[0])
        return positions + [0] * (len(self.local_rows) - len(examples))

    def batch(
        self, examples: Sequence[Example], passages: Sequence[list[int]], prompts: list[list[int]], length: int, n: int
    ) -> ReaderBatch:
        """The batch on the devices: `n` passages an example, each padded to `length` tokens."""
        padding = len(self.local_rows) - len(examples)
        ids, mask = pad([*passages, *[[]] * (padding * n)], length, self.tokenizer.pad_id)
        maximum = self.text.target_maxlength
        targets = self.tokenizer.target_ids([self._target(example) for example in examples], maximum)
        (longest,) = process_group().all_max(max(CHOICE_POSITION + 1, *map(len, targets), 0))
        target, target_mask = pad(
            [*targets, *[[]] * padding], bucket(longest, max(longest, maximum or MAX_TARGET)), self.tokenizer.pad_id
        )
        for row, prompt in enumerate(prompts):
            target_mask[row, : len(prompt)] = False  # the loss leaves out the prompt
        shape = (len(self.local_rows), n, length)
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
    """Puts the arrays of a reader batch on the mesh; `rows` as in `put_batch`."""
    read = (put_passages(mesh, array, rows) for array in (passages, mask))
    return ReaderBatch(*read, *(put_batch(mesh, array, rows) for array in (target, target_mask)))
