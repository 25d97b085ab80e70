"""Rows are checked before anything long runs, by all processes together."""

import json
from pathlib import Path

from tests.runtime.processes import exit_lines


def test_processes_share_the_rows_that_are_checked(processes):
    """Each of three processes checks every third row; all report the first bad row, whichever process found it."""
    rows = Path(processes.folder.name, "rows.jsonl")
    lines = [json.dumps({"question": str(number), "answers": ["a"]}) for number in range(7)]
    rows.write_text("\n".join(lines))
    for index, process in processes.start("rows", range(3), 3, timeout=20).items():
        status, output = process.end()
        assert status == 0
        assert [line for line in output if line.startswith("question")] == [f"question {n}" for n in range(index, 7, 3)]
    lines[6], lines[4], lines[5] = '{"question": "6", "answers": []}', "{", '{"question": "5"}'
    rows.write_text("\n".join(lines))
    results = exit_lines(processes.start("rows", range(3), 3, timeout=20))
    assert {status for status, _ in results.values()} == {2}
    assert {line[: len("atlas: rows.jsonl:5: not valid JSON")] for _, line in results.values()} == {
        "atlas: rows.jsonl:5: not valid JSON"
    }
