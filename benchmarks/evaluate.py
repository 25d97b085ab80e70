"""Speed and memory of `atlas evaluate` with random weights of a published shape, through the command itself.

    python benchmarks/evaluate.py --reader t5-base --passages passages.jsonl --questions mmlu.jsonl --max_questions 3

Prints one JSON object: passages embedded a second, questions a second without compilation, compile seconds and
programs, peak memory. Weights are random, tokenizers the sample's.
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
    parser.add_argument("--retriever", help="folder of an encoder; default: Contriever's shape, random")
    parser.add_argument("--passages", default=str(SAMPLE / "passages.jsonl"))
    parser.add_argument("--max_passages", default="-1")
    parser.add_argument("--questions", default=str(SAMPLE / "mmlu.jsonl"))
    parser.add_argument("--max_questions", type=int, default=200)
    parser.add_argument("--n_context", default="10")
    parser.add_argument("--batch", default="4")
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        lines = Path(given.questions).read_text(encoding="utf-8").splitlines(keepends=True)
        step = max(1, len(lines) // given.max_questions)  # spread over the domains
        (work / "questions.jsonl").write_text("".join(lines[::step][: given.max_questions]), encoding="utf-8")
        flags = {
            "reader_model_type": t5_folder(T5_CONFIGS[given.reader], work / "reader"),
            "retriever_model_path": given.retriever or contriever_folder(ContrieverConfig(), work / "retriever"),
            "passages": given.passages,
            "max_passages": given.max_passages,
            "eval_data": work / "questions.jsonl",
            "task": "multiple_choice",
            "multiple_choice_eval_permutations": "cyclic",
            "n_context": given.n_context,
            "text_maxlength": 512,
            "target_maxlength": 16,
            "generation_max_length": 16,
            "per_gpu_batch_size": given.batch,
            "precision": given.precision,
            "name": "benchmark",
            "checkpoint_dir": work,
        }
        argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        if atlas(["evaluate", *argv, "--write_results"]):
            sys.exit(2)
        run = work / "benchmark"
        found = json.loads((run / "questions-step-1.metrics.json").read_text())
        log = (run / "run.log").read_text()
    embedded = re.findall(r"embedding: \d+ of \d+ passages, ([\d.]+)/s, (\d+) s$", log, re.MULTILINE)
    print(
        json.dumps(
            {
                "reader": given.reader,
                "questions": found["examples"],
                "seconds_per_question": 1 / found["examples_per_second"],
                "compile_seconds": found["compile_seconds"],
                "programs": found["programs"],
                "passages_per_second": float(embedded[-1][0]),
                "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )
    )


if __name__ == "__main__":
    main()
