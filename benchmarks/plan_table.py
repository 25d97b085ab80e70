"""Tables as in docs/plan.md: `atlas plan` for each model size on several machines, and for one size on many devices.

    python benchmarks/plan_table.py --output plans.jsonl [--only xxl --on v5p:4x4x4]

Each plan is a line of the output file; plans that the file already holds are not made again. Prints the whole file as
Markdown tables. Takes hours: XXL needs minutes per machine, most on TPUs.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = ("base", "large", "xl", "xxl")
MACHINES = ("a100-40gb:8x8", "a100-80gb:8x8", "v5e:8x8", "v5p:4x4x4")
SCALING = "base", ("a100-80gb:1x1", "a100-80gb:1x8", "a100-80gb:8x8", "a100-80gb:64x8")
PASSAGES = 37_500_000
FLAGS = (
    "--precision bf16 --train_retriever --query_side_retriever_training --n_context 30 --retriever_n_context 30 "
    "--text_maxlength 512 --target_maxlength 16 --use_gradient_checkpoint_reader --use_gradient_checkpoint_retriever"
)
GB = 1e9


def run_plan(size: str, machine: str, passages: int) -> dict[str, Any]:
    """Runs `atlas plan --json` and returns its result, or the last line of stderr as "error" if it fails."""
    command = [sys.executable, "-m", "atlas_jax", "plan", "--json", "--topology", machine]
    command += ["--reader_model_type", f"google/t5-{size}-lm-adapt", "--passages_count", str(passages), *FLAGS.split()]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    result = {"size": size, "machine": machine, "passages": passages, "seconds": time.monotonic() - start}
    if done.returncode not in (0, 1):
        return result | {"error": (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]}
    return result | json.loads(done.stdout)


def all_runs() -> list[tuple[str, str, int]]:
    """Returns (size, machine, passages) of all plans; weak scaling keeps PASSAGES / 64 passages per device."""
    runs = [(size, machine, PASSAGES) for size in SIZES for machine in MACHINES]
    size, machines = SCALING
    for machine in machines:
        nodes, gpus = map(int, machine.split(":")[1].split("x"))
        runs.append((size, machine, PASSAGES * nodes * gpus // 64))
    return [*runs, ("xxl", "a100-80gb:8x8", 382_000_000)]


def markdown_table(plans: list[dict[str, Any]], name: str = "train step") -> str:
    """Formats the figures of the program `name` in each plan as a Markdown table."""
    lines = [
        "| T5 | machine | passages, million | total GB | temporary | TFLOP | all-gather, GB "
        "| reduce-scatter, GB | all-reduce, GB | seconds at best | bound by | compiled in, s |",
        "|---" * 12 + "|",
    ]
    for plan in plans:
        cells = f"| {plan['size']} | {plan['machine']} | {plan['passages'] / 1e6:.3g} |"
        program = next((program for program in plan.get("steps", ()) if program["name"] == name), None)
        if program is None or program["refused"]:
            lines.append(f"{cells} {plan.get('error') or (program or {}).get('refused', 'none')} " + "|" * 9)
            continue
        collective_bytes = [
            program["collectives"].get(kind, {}).get("bytes", 0)
            for kind in ("all-gather", "reduce-scatter", "all-reduce")
        ]
        figures = [
            f"{program['total'] / GB:.2f}" + ("" if program["fits"] else ", does not fit"),
            f"{program['memory']['activations and temporaries'] / GB:.2f}",
            f"{sum(program['flops'].values()) / 1e12:.4g}",
            *(f"{nbytes / GB:.3g}" for nbytes in collective_bytes),
            f"{program['seconds_at_least']:.3g}",
            program["bound"],
            f"{program['compile_seconds']:.0f}",
        ]
        lines.append(f"{cells} {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Makes the plans that are missing, then prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=SIZES, nargs="*", default=SIZES)
    parser.add_argument("--on", nargs="*", help="machines; all of the tables otherwise")
    args = parser.parse_args()
    plans = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    existing = {(plan["size"], plan["machine"], plan["passages"]) for plan in plans}
    for size, machine, passages in all_runs():
        key = size, machine, passages
        if key not in existing and size in args.only and (not args.on or machine in args.on):
            existing.add(key)
            plans.append(run_plan(*key))
            with args.output.open("a") as out:
                out.write(json.dumps(plans[-1]) + "\n")
            print(f"{size} {machine}: {plans[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    order = {key: position for position, key in reversed(list(enumerate(all_runs())))}
    plans.sort(key=lambda plan: order.get((plan["size"], plan["machine"], plan["passages"]), len(order)))
    for name in ("train step", "reader", "search"):
        print(f"\n{name}\n\n{markdown_table(plans, name)}")


if __name__ == "__main__":
    main()
