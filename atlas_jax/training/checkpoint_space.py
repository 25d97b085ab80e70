"""How much of the disk a run's checkpoints will take: said before its first step."""

import logging
import shutil
from typing import NamedTuple

import jax

from atlas_jax.config import Config, RunConfig
from atlas_jax.runtime.process_group import process_group
from atlas_jax.training.index_refresh import passage_encoder_paths, trains_passage_encoder
from atlas_jax.training.step import TrainState

logger = logging.getLogger(__name__)


class CheckpointSpace(NamedTuple):
    """Bytes that the checkpoints of a run take at most, without their tokenizers and other small files."""

    peak: int  # while one is written, before older ones are removed
    left: int  # once the run has finished


def checkpoint_space(
    run: RunConfig, total_steps: int, step: int, existing: int, each: int, last: int
) -> CheckpointSpace:
    """The space of a run that goes on from `step` with this number of `existing` checkpoints.

    `each`: bytes of a checkpoint to resume from; `last`: those of the last one, and of a best one in the end.
    """
    remaining = range(step + 1, total_steps)
    due = {step for step in remaining if step % run.save_freq == 0}
    bests = {step for step in remaining if step % run.eval_freq == 0} if run.eval_data and run.keep != 0 else set()
    regular, saves = existing + len(due), existing + len(due | bests)

    def kept(limit: int) -> int:
        """Number of checkpoints that stay: the newest `limit`, and the best if all of those may be newer."""
        return min(saves, limit + (bool(bests) and regular >= limit))

    limit = regular if run.keep is None else run.keep or 1
    peak = max(min(saves, kept(limit) + 1) * each, kept(limit) * each + last)
    if run.keep == 0:
        return CheckpointSpace(peak, 0)
    newest = min(saves, limit if run.keep is None else run.keep - 1)  # beside the last one
    return CheckpointSpace(peak, newest * each + (kept(newest) - newest) * last + last)


def report_checkpoint_space(config: Config, step: int, state: TrainState) -> None:
    """Logs what the checkpoints of a run that goes on from `step` take, as a warning if that much is not free."""
    if process_group().index:
        return
    run, folder = config.run, config.run_folder / "checkpoint"
    params = state.params
    index_encoder = passage_encoder_paths(params) if trains_passage_encoder(config) else []
    index_bytes = sum(params[path].nbytes for path in index_encoder)
    each = sum(x.nbytes for x in jax.tree.leaves(state)) + index_bytes
    last = each if run.save_optimizer else sum(x.nbytes for x in params.values()) + index_bytes
    existing = len(list(folder.glob("step-*")))
    peak, left = checkpoint_space(run, config.optim.total_steps, step, existing, each, last)
    free = shutil.disk_usage(folder if folder.exists() else config.run_folder).free
    text = f"checkpoints: {_size(each)} each, the last one {_size(last)}; at most {_size(peak)} at a time"
    if existing:
        text += f", of which {_size(existing * each)} are there"
    text += f", and {_size(left)} once the run has finished; {_size(free)} are free in {run.checkpoint_dir}"
    if peak - existing * each > free:
        logger.warning(
            "%s, which is too little: lower --keep, raise --save_freq, or use another --checkpoint_dir", text
        )
    else:
        logger.info("%s", text)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
