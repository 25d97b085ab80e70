"""The tables of docs/plan.md: what `atlas plan` says of each size on several machines, and of one on many devices.

    python benchmarks/plan_table.py --output plans.jsonl [--only xxl --on v5p:4x4x4]

Each plan is a line of the file; those that are there are not made again. Prints what the file holds, as Markdown. It
takes hours: XXL needs minutes a machine, on a TPU most.
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


def plan(size: str, machine: str, passages: int) -> dict[str, Any]:
    """What the command says; of its last line, if it refuses."""
    command = [sys.executable, "-m", "atlas_jax", "plan", "--json", "--topology", machine]
    command += ["--reader_model_type", f"google/t5-{size}-lm-adapt", "--passages_count", str(passages), *FLAGS.split()]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    found = {"size": size, "machine": machine, "passages": passages, "seconds": time.monotonic() - began}
    if done.returncode not in (0, 1):
        return found | {"error": (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]}
    return found | json.loads(done.stdout)


def wanted() -> list[tuple[str, str, int]]:
    """The plans of all tables; an index of PASSAGES, in weak scaling as many a device as 64 of them have."""
    sizes = [(size, machine, PASSAGES) for size in SIZES for machine in MACHINES]
    size, machines = SCALING
    for machine in machines:
        nodes, gpus = map(int, machine.split(":")[1].split("x"))
        sizes.append((size, machine, PASSAGES * nodes * gpus // 64))
    return [*sizes, ("xxl", "a100-80gb:8x8", 382_000_000)]


def table(plans: list[dict[str, Any]], name: str = "train step") -> str:
    """One program of each plan, in Markdown."""
    lines = [
        "| T5 | machine | passages, million | GB in all | of it temporary | TFLOP | all-gather, GB "
        "| reduce-scatter, GB | all-reduce, GB | seconds at best | bound by | compiled in, s |",
        "|---" * 12 + "|",
    ]
    for one in plans:
        head = f"| {one['size']} | {one['machine']} | {one['passages'] / 1e6:.3g} |"
        step = next((step for step in one.get("steps", ()) if step["name"] == name), None)
        if step is None or step["refused"]:
            lines.append(f"{head} {one.get('error') or (step or {}).get('refused', 'none')} " + "|" * 9)
            continue
        moved = [
            step["collectives"].get(kind, {}).get("bytes", 0) for kind in ("all-gather", "reduce-scatter", "all-reduce")
        ]
        figures = [
            f"{step['total'] / GB:.2f}" + ("" if step["fits"] else ", does not fit"),
            f"{step['memory']['activations and temporaries'] / GB:.2f}",
            f"{sum(step['flops'].values()) / 1e12:.4g}",
            *(f"{nbytes / GB:.3g}" for nbytes in moved),
            f"{step['seconds_at_least']:.3g}",
            step["bound"],
            f"{step['compile_seconds']:.0f}",
        ]
        lines.append(f"{head} {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Makes what is missing, then prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=SIZES, nargs="*", default=SIZES)
    parser.add_argument("--on", nargs="*", help="machines; all of the tables otherwise")
    given = parser.parse_args()
    done = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    there = {(one["size"], one["machine"], one["passages"]) for one in done}
    for size, machine, passages in wanted():
        key = size, machine, passages
        if key not in there and size in given.only and (not given.on or machine in given.on):
            there.add(key)
            done.append(plan(*key))
            with given.output.open("a") as out:
                out.write(json.dumps(done[-1]) + "\n")
            print(f"{size} {machine}: {done[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    order = {key: place_on_mesh for place_on_mesh, key in reversed(list(enumerate(wanted())))}
    done.sort(key=lambda one: order.get((one["size"], one["machine"], one["passages"]), len(order)))
    for name in ("train step", "reader", "search"):
        print(f"\n{name}\n\n{table(done, name)}")


if __name__ == "__main__":
    main()
