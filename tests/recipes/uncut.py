"""The zero-shot and the 5-shot experiment with every published flag as it is, on small weights: `make recipes`.

    python -m tests.recipes.uncut --questions 15

Passages of 512 tokens, 30 for each question, 16 training steps, bfloat16, two domains. Prints the score tables, after
comparing them with the scores that the runs report.
"""

import argparse
import tempfile
from pathlib import Path

from tests.recipes.published import DOMAINS, check_table, downloaded_files


def main() -> None:
    """Runs both experiments in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--questions", type=int, default=15, help="test and validation questions of each domain")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, downloaded_files(Path(home), args.questions) as reader:
        reader.variables["PRECISION"] = "bf16"
        gold, path = "5-shot-multitask/combined_test.jsonl", "zeroshot/combined_test-step-1.jsonl"
        reader.atlas("zeroshot", "")
        print(check_table(reader, [reader.save / path], path, gold))
        reader.variables["SAVE_DIR"] = str(reader.save / "5-shot")
        for domain in DOMAINS:
            reader.atlas("5-shot", "", DOMAIN=domain)
        reader.variables["SAVE_DIR"] = str(reader.save)
        predictions = [reader.save / f"5-shot/{domain}/{domain}.test-step-16.jsonl" for domain in DOMAINS]
        print(check_table(reader, predictions, "5-shot", gold, "--step 16 --split test"))


if __name__ == "__main__":
    main()
