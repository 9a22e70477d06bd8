"""Three pictures of one run: training, win rates with their intervals, and the canary's timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from demo.story import RolloutPoint, Story

INK, ACCENT, BAD, MUTED = "#22303c", "#1f6feb", "#c9372c", "#8c99a5"


def draw_all(story: Story, folder: Path) -> list[Path]:
    """Writes the PNG files for which there is data and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for job, rows in story.training.items():
        if rows:
            drawn.append(training(job, rows, folder / f"training-{job}.png"))
    if story.win_rates:
        drawn.append(win_rates(story.win_rates, folder / "win-rate.png"))
    for name, points in story.timeline.items():
        if points:
            drawn.append(timeline(name, points, folder / f"rollout-{name}.png"))
    return drawn


def training(job: str, rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Reward and KL to the reference over the steps: reward should rise while KL stays near its target."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for axis, metric, label in ((axes[0], "reward", "reward"), (axes[1], "kl", "KL to reference (nats)")):
        pairs = [(row["step"], row[metric]) for row in rows if metric in row]
        axis.plot([p[0] for p in pairs], [p[1] for p in pairs], color=ACCENT, linewidth=1.6)
        tidy(axis, label)
    axes[1].set_xlabel("step")
    axes[0].set_title(f"{job}: policy optimisation", loc="left", color=INK)
    return save(figure, path)


def win_rates(rates: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Win rate against the base policy by judge, with 95% intervals; one half is no better than the base."""
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.6 * len(rates)), layout="constrained")
    judges = list(rates)[::-1]
    for row, rate in enumerate(rates[judge] for judge in judges):
        low, mid, high = float(rate["lower"]), float(rate["estimate"]), float(rate["upper"])
        axis.plot([low, high], [row, row], color=ACCENT, linewidth=3, solid_capstyle="butt")
        axis.plot(mid, row, "o", color=INK)
        axis.annotate(f"{mid:.2f}", (mid, row), xytext=(0, 8), textcoords="offset points", ha="center", color=INK)
    axis.axvline(0.5, color=MUTED, linestyle="--", linewidth=1)
    axis.set_yticks(range(len(judges)), judges)
    axis.set_ylim(-0.6, len(rates) - 0.3)
    axis.set_xlim(0, 1)
    axis.set_title("Win rate against the base policy", loc="left", color=INK)
    tidy(axis, "")
    return save(figure, path)


def timeline(name: str, points: Sequence[RolloutPoint], path: Path) -> Path:
    """The candidate's share of the traffic over time, with the phases it went through."""
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    start = points[0].at
    seconds = [p.at - start for p in points]
    end = seconds[-1] * 1.15 + 1  # room for the last label
    candidate = shares(points)
    axis.step([*seconds, end], [*candidate, candidate[-1]], where="post", color=ACCENT, linewidth=2)
    axis.set_ylim(-4, 124)
    axis.set_xlim(0, end)
    axis.set_yticks(range(0, 101, 25))
    shown, row = "", 0
    for point, at in zip(points, seconds, strict=True):
        if point.phase == shown:
            continue
        shown = point.phase
        colour = BAD if point.phase.startswith("RolledBack") or point.phase == "RollingBack" else MUTED
        axis.axvline(at, color=colour, linewidth=0.8, linestyle=":")
        # Two rows of labels: short phases follow each other within a second.
        axis.annotate(
            point.phase, (at, 106 + 9 * row), fontsize=8, color=colour, xytext=(3, 0), textcoords="offset points"
        )
        row = 1 - row
    axis.set_xlabel("seconds")
    axis.set_title(f"{name}: share of users' traffic on the candidate", loc="left", color=INK)
    tidy(axis, "percent")
    return save(figure, path)


def shares(points: Sequence[RolloutPoint]) -> list[float]:
    """Percent of users' traffic on the candidate. A promotion makes it the stable revision, so that the canary's weight
    falls to 0 as it takes all."""
    found, promoting = [], False
    for point in points:
        promoting = promoting or point.phase == "Promoting"
        taken = promoting and point.phase in ("Promoting", "Healthy") and point.weight == 0.0
        found.append(100.0 if taken else point.weight)
    return found


def tidy(axis: Axes, label: str) -> None:
    axis.set_ylabel(label, color=INK)
    axis.grid(axis="y", color="#e6eaee", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
