"""Speed and memory of the command `atlas train`, with random weights of a published shape.

    python benchmarks/train.py --reader t5-base --passages passages.jsonl --questions questions.jsonl

Trains reader and retriever jointly (gold scores ppmean, query side of the retriever, gradient checkpointing in both),
or the reader only. Prints one JSON object: median seconds of a step without compilation, and of its parts, compile
seconds, number of compiled programs, peak memory. The tokenizers are those of atlas_jax/sample.
"""

import argparse
import json
import re
import resource
import statistics
import sys
import tempfile
from pathlib import Path

from shapes import SAMPLE, contriever_folder, t5_folder

from atlas_jax.commands.main import main as atlas
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default="t5-base", choices=list(T5_CONFIGS))
    parser.add_argument("--passages", default=str(SAMPLE / "passages.jsonl"))
    parser.add_argument("--max_passages", default="150")
    parser.add_argument("--questions", default=str(SAMPLE / "mmlu.jsonl"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--n_context", default="10")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--dropout", default="0.1")
    parser.add_argument("--gold", default="ppmean")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--reader_only", action="store_true", help="the retriever finds passages and does not learn")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = {
            "reader_model_type": t5_folder(T5_CONFIGS[args.reader], folder / "reader"),
            "retriever_model_path": contriever_folder(ContrieverConfig(), folder / "retriever"),
            "passages": args.passages,
            "max_passages": args.max_passages,
            "train_data": args.questions,
            "task": "multiple_choice",
            "n_context": args.n_context,
            "retriever_n_context": args.n_context,
            "text_maxlength": 512,
            "target_maxlength": 16,
            "per_gpu_batch_size": args.batch,
            "dropout": args.dropout,
            "gold_score_mode": args.gold,
            "precision": args.precision,
            "total_steps": args.steps,
            "warmup_steps": 2,
            "log_freq": 1,
            "keep": 0,
            "name": "benchmark",
            "checkpoint_dir": folder,
        }
        argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        switches = () if args.reader_only else ("train_retriever", "query_side_retriever_training")
        remat = ("use_gradient_checkpoint_reader", "use_gradient_checkpoint_retriever")
        if atlas(["train", *argv, "--random_weights", *(f"--{switch}" for switch in (*switches, *remat))]):
            sys.exit(2)
        run_folder = folder / "benchmark"
        rows = [json.loads(row) for row in (run_folder / "metrics.jsonl").read_text().splitlines()]
        log = (run_folder / "run.log").read_text()
    compiled = re.findall(r"compiled (.+) for .+ in ([\d.]+) s", log)
    step_seconds = [row["runtime/train_step"] for row in rows]
    part_names = [name for name in rows[-1] if name.startswith("runtime/") and name != "runtime/train_step"]
    print(
        json.dumps(
            {
                "reader": args.reader,
                "seconds_per_step": statistics.median(step_seconds),
                "steps": step_seconds,
                **{name: statistics.median(row.get(name, 0.0) for row in rows) for name in part_names},
                "compile_seconds": sum(float(seconds) for _, seconds in compiled),
                "programs": len(compiled),
                "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
