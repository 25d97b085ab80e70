"""Reporting: complete lines, exact means, and a resumed run's file equal to an uninterrupted run's."""

import contextlib
import json
import logging
import math
import os
import pty
import re
import struct
import sys
import termios

import pytest
from tensorboardX.proto.event_pb2 import Event

from atlas_jax.training.reporting import MetricsReporter


def metrics(step: int) -> dict[str, float]:
    """Metrics of a step: thirds, whose float sums depend on the order of addition."""
    always = {"loss/train_loss": step / 3, "lr": step / 7, "runtime/train_step": 0.1}
    return always | ({"grad_norm": step / 9} if step % 2 == 0 else {}) | ({"skipped_steps": 1.0} if step > 2 else {})


def lines(run) -> list[dict[str, float | None]]:
    """The lines of metrics.jsonl; NaN, which JSON does not have, is an error."""

    def fail(constant):
        raise ValueError(constant)

    text = (run / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=fail) for line in text.splitlines()]


def events(run) -> list[Event]:
    """The TensorBoard events in the folder, oldest file first."""
    found = []
    for path in sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(run) -> list[tuple[int, str, float]]:
    """Step, name and value of each scalar."""
    return [(event.step, value.tag, value.simple_value) for event in events(run) for value in event.summary.value]


def test_a_line_covers_the_steps_since_the_last_one(tmp_path):
    """Means over the steps that had the metric, the last learning rate and number of skipped steps; `step` is first."""
    with MetricsReporter(tmp_path, 7, 3, 0) as report:
        for step in range(1, 8):
            report.step(step, metrics(step))
            assert len(lines(tmp_path)) == step // 3  # at once, not when the file is closed
    first, second = lines(tmp_path)
    assert list(first.items()) == [
        ("step", 3),
        ("loss/train_loss", pytest.approx(2 / 3)),
        ("lr", 3 / 7),
        ("runtime/train_step", pytest.approx(0.1)),
        ("grad_norm", 2 / 9),
        ("skipped_steps", 1.0),
    ]
    assert (second["step"], second["loss/train_loss"], second["grad_norm"]) == (
        6,
        pytest.approx(5 / 3),
        (4 + 6) / 9 / 2,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(tmp_path, bad):
    """NaN or infinity is null in the line; other metrics stay, and the next line has numbers again."""
    with MetricsReporter(tmp_path, 4, 2, 0) as report:
        for step, loss in enumerate([1.0, bad, 3.0, 4.0], start=1):
            report.step(step, {"loss/train_loss": loss, "lr": 0.5})
    assert lines(tmp_path) == [
        {"step": 2, "loss/train_loss": None, "lr": 0.5},
        {"step": 4, "loss/train_loss": 3.5, "lr": 0.5},
    ]
    assert [event for event in scalars(tmp_path) if event[1] != "lr"] == [(4, "loss/train_loss", 3.5)]


@pytest.mark.parametrize("torn", ["", '{"step": 12, "loss/tr', "\0\0\0\n"])
@pytest.mark.parametrize("saved", [1, 4, 7, 8])
def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path, saved, torn):
    """Equal bytes, wherever the run was saved and stopped; not without the sums that are saved with the checkpoint."""

    def report_steps(run, start, stop, pending=None, saves=None):
        run.mkdir(exist_ok=True)
        sums = None
        with MetricsReporter(run, 12, 4, start, pending) as report:
            for step in range(start + 1, stop + 1):
                report.step(step, metrics(step))
                if step == saves:
                    sums = json.loads(json.dumps(report.pending(), allow_nan=False))
        return sums

    report_steps(tmp_path / "uninterrupted", 0, 12)
    expected = (tmp_path / "uninterrupted" / "metrics.jsonl").read_bytes()
    pending = report_steps(tmp_path / "resumed", 0, 11, saves=saved)
    path = tmp_path / "resumed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn.encode())
    before = path.read_bytes()
    report_steps(tmp_path / "resumed", saved, 12, pending)
    assert path.read_bytes() == expected
    path.write_bytes(before)
    report_steps(tmp_path / "resumed", saved, 12)
    assert (path.read_bytes() == expected) == (saved % 4 == 0)
    assert [path.name for path in (tmp_path / "resumed").glob(".*")] == []


def test_a_nan_survives_saving_and_resuming(tmp_path):
    """The saved sums are JSON, and a NaN in them is still one after resuming."""
    with MetricsReporter(tmp_path, 4, 2, 0) as report:
        report.step(1, {"loss/train_loss": math.nan})
        pending = json.loads(json.dumps(report.pending(), allow_nan=False))
    with MetricsReporter(tmp_path, 4, 2, 1, pending) as report:
        report.step(2, {"loss/train_loss": 1.0})
    assert lines(tmp_path) == [{"step": 2, "loss/train_loss": None}]


def test_a_fresh_start_drops_an_old_file(tmp_path):
    """A new run empties an old metrics.jsonl; a resumed run in a folder without the file creates it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with MetricsReporter(tmp_path, 2, 2, 0) as report:
        report.step(1, {"lr": 1.0})
    assert lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").unlink()
    with MetricsReporter(tmp_path, 2, 2, 1) as report:
        report.step(2, {"lr": 1.0})
    assert lines(tmp_path) == [{"step": 2, "lr": 1.0}]


def test_tensorboard_has_the_lines_and_the_scores(tmp_path):
    """A resumed run purges the steps that it repeats; a new run purges all."""
    with MetricsReporter(tmp_path, 4, 2, 0) as report:
        for step in (1, 2, 3, 4):
            report.step(step, {"loss/train_loss": float(step)})
        report.scores(4, "nq-dev", {"exact_match": 37.5, "f1": 50.0})
    expected = [(2, "loss/train_loss", 1.5), (4, "loss/train_loss", 3.5)]
    expected += [(4, "nq-dev/exact_match", 37.5), (4, "nq-dev/f1", 50.0)]
    assert scalars(tmp_path) == expected
    assert {event.step for event in events(tmp_path) if event.HasField("session_log")} == {0}
    with MetricsReporter(tmp_path, 4, 2, 3) as report:
        report.step(4, {"loss/train_loss": 5.0})
    assert scalars(tmp_path) == [*expected, (4, "loss/train_loss", 5.0)]
    assert {event.step for event in events(tmp_path) if event.HasField("session_log")} == {0, 4}


@pytest.fixture
def clock(monkeypatch):
    """A clock that advances two seconds a step."""
    import atlas_jax.training.reporting as module

    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def tick() -> None:
        now[0] += 2

    return tick


def test_log_lines(tmp_path, caplog, clock):
    """Step, metrics, and the pace since the last line, also after a resume; no bar."""
    caplog.set_level(logging.INFO, logger="atlas_jax")
    with MetricsReporter(tmp_path, 3600, 2, 4) as report:
        for step in range(5, 10):
            clock()
            report.step(step, {"loss/train_loss": step + 1 / 3, "lr": 4e-5})
    assert caplog.messages == [
        "6 / 3600 | loss/train_loss: 5.83 | lr: 4e-05 | 2 s/step | 1:59:48 left",
        "8 / 3600 | loss/train_loss: 7.83 | lr: 4e-05 | 2 s/step | 1:59:44 left",
    ]


def test_a_log_file_has_no_bar(tmp_path, capfd):
    """Without a terminal on stderr nothing is drawn."""
    with MetricsReporter(tmp_path, 2, 2, 0) as report:
        report.step(1, {"loss/train_loss": 1.0})
        report.step(2, {"loss/train_loss": 1.0})
    assert capfd.readouterr() == ("", "")


def test_a_terminal_shows_a_bar(tmp_path, monkeypatch, caplog):
    """The bar starts at the run's step and shows loss and seconds a step; log lines stand above it."""
    controller, terminal_fd = pty.openpty()
    termios.tcsetwinsize(terminal_fd, (25, 120))
    caplog.set_level(logging.INFO, logger="atlas_jax")
    with os.fdopen(terminal_fd, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        handler = logging.StreamHandler(terminal)
        logging.getLogger().addHandler(handler)
        try:
            with MetricsReporter(tmp_path, 8, 4, 6) as report:
                report.step(7, {"loss/train_loss": 1.2345})
                report.step(8, {"loss/train_loss": 2.3456})
        finally:
            logging.getLogger().removeHandler(handler)
    shown = b""
    with contextlib.suppress(OSError):  # Linux raises EIO at the end
        while more := os.read(controller, 4096):
            shown += more
    os.close(controller)
    shown_lines = [line.split("\r") for line in shown.decode().replace("\r\n", "\n").split("\n")]
    assert re.match(r" 75%.*\| 6/8 \[", shown_lines[0][1])
    assert shown_lines[0][-1].startswith("8 / 8 | loss/train_loss: 1.79 | ")
    assert re.fullmatch(r"100%.*\| 8/8 \[.* steps/s, loss 2\.35, [0-9.e-]+ s/step\]", shown_lines[1][-1])
