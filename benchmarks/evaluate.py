"""Speed and memory of the command `atlas evaluate`, with random weights of a published shape.

    python benchmarks/evaluate.py --reader t5-base --passages passages.jsonl --questions mmlu.jsonl --max_questions 3

Prints one JSON object: seconds per question without compilation, passages embedded per second, compile seconds, number
of compiled programs, peak memory. The tokenizers are those of atlas_jax/sample.
"""

import argparse
import json
import re
import resource
import sys
import tempfile
from pathlib import Path

from shapes import SAMPLE, contriever_folder, t5_folder

from atlas_jax.commands.main import main as atlas
from atlas_jax.models.contriever import ContrieverConfig
from atlas_jax.models.t5 import T5_CONFIGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default="t5-small", choices=list(T5_CONFIGS))
    parser.add_argument("--retriever", help="folder of an encoder, for its shape; default: Contriever's")
    parser.add_argument("--passages", default=str(SAMPLE / "passages.jsonl"))
    parser.add_argument("--max_passages", default="-1")
    parser.add_argument("--questions", default=str(SAMPLE / "mmlu.jsonl"))
    parser.add_argument("--max_questions", type=int, default=200)
    parser.add_argument("--n_context", default="10")
    parser.add_argument("--batch", default="4")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = Path(args.questions).read_text(encoding="utf-8").splitlines(keepends=True)
        stride = max(1, len(lines) // args.max_questions)  # spread over the domains
        (folder / "questions.jsonl").write_text("".join(lines[::stride][: args.max_questions]), encoding="utf-8")
        flags = {
            "reader_model_type": t5_folder(T5_CONFIGS[args.reader], folder / "reader"),
            "retriever_model_path": args.retriever or contriever_folder(ContrieverConfig(), folder / "retriever"),
            "passages": args.passages,
            "max_passages": args.max_passages,
            "eval_data": folder / "questions.jsonl",
            "task": "multiple_choice",
            "multiple_choice_eval_permutations": "cyclic",
            "n_context": args.n_context,
            "text_maxlength": 512,
            "target_maxlength": 16,
            "generation_max_length": 16,
            "per_gpu_batch_size": args.batch,
            "precision": args.precision,
            "name": "benchmark",
            "checkpoint_dir": folder,
        }
        argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        if atlas(["evaluate", *argv, "--random_weights", "--write_results"]):
            sys.exit(2)
        run_folder = folder / "benchmark"
        metrics = json.loads((run_folder / "questions-step-1.metrics.json").read_text())
        log = (run_folder / "run.log").read_text()
    embedding_lines = re.findall(r"embedding: \d+ of \d+ passages, ([\d.]+)/s, (\d+) s$", log, re.MULTILINE)
    print(
        json.dumps(
            {
                "reader": args.reader,
                "questions": metrics["examples"],
                "seconds_per_question": 1 / metrics["examples_per_second"],
                "compile_seconds": metrics["compile_seconds"],
                "programs": metrics["programs"],
                "passages_per_second": float(embedding_lines[-1][0]),
                "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
