"""Draws docs/*.svg from benchmarks/out/bench.json and soak.json, as far as they are there.

python benchmarks/charts.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

HERE: Final = Path(__file__).resolve().parent
DOCS: Final = HERE.parent / "docs"
COLORS: Final = {"grpcio": "#7f8c9b", "h2": "#1f77b4", "grpcio, 4 executors": "#b5bec8", "h2, 4 executors": "#7fb2d9"}


def ratios(found: dict[str, Any]) -> None:
    """Each measure beside the floor: bars of ratios, with the goal as a tick."""
    rows = [row for row in found["rows"] if row["ratio"] is not None][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.2))
    for place, row in enumerate(rows):
        axes.barh(place, row["ratio"], color=COLORS[row["subject"]])
        axes.text(row["ratio"] * 1.03, place, f"{row['ratio']:.2f}", va="center", fontsize=7)
        if row["goal"] is not None:
            axes.plot([row["goal"]] * 2, [place - 0.42, place + 0.42], color="#c0392b", linewidth=1.6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row['measure']} ({row['subject']})" for row in rows], fontsize=7)
    axes.set_xlabel("ratio to the floor, logarithmic; red: the goal")
    axes.set_title(
        f"{found['machine']}, {found['date']}, load {found['load_before']} to {found['load_after']}", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(DOCS / "benchmarks-ratios.svg", metadata={"Date": None})


def rounds(found: dict[str, Any]) -> None:
    """How much the rounds of the rates differ: what a single figure hides."""
    rows = [row for row in found["rows"] if row["ratio"] is not None and row["more_is_better"]]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(rows) + 1.2))
    for place, row in enumerate(rows[::-1]):
        values = [value / row["floor"] for value in row["rounds"]]
        axes.plot(values, [place] * len(values), "o", color=COLORS[row["subject"]], markersize=4)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [f"{row['measure']} ({row['subject']})" for row in rows[::-1]], fontsize=7)
    axes.set_xlabel("each round beside the floor's median, logarithmic")
    figure.tight_layout()
    figure.savefig(DOCS / "benchmarks-rounds.svg", metadata={"Date": None})


def soak(found: dict[str, Any]) -> None:
    """Memory, descriptors and threads, and what the load saw, over the minutes of a soak."""
    samples = found["samples"]
    minutes = [sample["at_s"] / 60 for sample in samples]
    figure, (memory, counts, load) = plt.subplots(3, 1, figsize=(9, 7), sharex=True)

    def line(axes: Any, name: str, label: str, color: str, scale: float = 1.0) -> None:
        axes.plot(minutes, [sample[name] * scale for sample in samples], label=label, color=color, linewidth=1)

    line(memory, "supervisor_bytes", "supervisor, with the shared memory of payloads", "#7fb2d9", 2**-20)
    line(memory, "supervisor_own_bytes", "supervisor, its own", "#1f77b4", 2**-20)
    per_executor = [sample["executor_bytes"] / max(1, sample["executors"]) / 2**20 for sample in samples]
    memory.plot(minutes, per_executor, label="one executor, on average", color="#7f8c9b", linewidth=1)
    memory.set_ylabel("MiB")
    line(counts, "supervisor_files", "descriptors of the supervisor", "#1f77b4")
    line(counts, "supervisor_threads", "threads of the supervisor", "#7fb2d9")
    line(counts, "executor_files", "descriptors of the executor with most", "#7f8c9b")
    line(counts, "executor_threads", "threads of the executor with most", "#b5bec8")
    line(load, "runs_s", "runs that succeeded, a second", "#1f77b4")
    line(load, "p50_s", "median latency, ms", "#7f8c9b", 1e3)
    load.set_xlabel(f"minutes; every 5 s one of {found['executors']} executors is killed, {found['killed']} in all")
    for axes in (memory, counts, load):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, loc="center right")
    memory.set_title(f"{found['machine']}, {found['date']}, {found['transport']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "benchmarks-soak.svg", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "gen-worker"
    for name, draws in (("bench", (ratios, rounds)), ("soak", (soak,))):
        path = HERE / "out" / f"{name}.json"
        if path.exists():
            made = json.loads(path.read_text())
            for draw in draws:
                draw(made)
