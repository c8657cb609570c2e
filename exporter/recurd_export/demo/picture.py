"""One stream as a picture: what the model said above what the sensor saw."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from recurd_export.demo.data import Array, Dataset, Sensor
from recurd_export.demo.streaming import Outcome

#: Recordings shown.
SHOWN = 5
#: Colours of the classes: Okabe and Ito's, which the colour-blind can tell apart, the yellow darker, and two more.
_CLASSES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A39A00", "#7A5195", "#999999")
_INCHES_WIDE, _DPI = 12.5, 130


class _Timeline(NamedTuple):
    """Where the recordings stand on the x axis: ``ends`` are steps, rising from 0, one more than recordings."""

    ends: Array
    rate: float

    def pieces(self) -> list[tuple[slice, Array]]:
        """Per recording the steps, and where they are drawn."""
        return [(slice(start, end), np.arange(start, end) / self.rate) for start, end in pairwise(self.ends)]

    def between(self, steps: Array) -> Array:
        """Where the border before each of the steps is drawn."""
        return (steps - 0.5) / self.rate


def draw(data: Dataset, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a PNG of the stream whose first recordings are of the most classes."""
    outcome = max(outcomes, key=lambda o: len({data.test[index].label for index in o.script.order[:SHOWN]}))
    answers = outcome.answers[:SHOWN]
    shown = [data.test[index] for index in outcome.script.order[:SHOWN]]
    timeline = _Timeline(np.cumsum([0, *map(len, answers)]), data.sample_rate_hz or 1.0)
    height = 3.6 + 2.0 * len(data.sensors)
    figure = Figure(figsize=(_INCHES_WIDE, height), layout="constrained")
    top, *below = axes = figure.subplots(
        1 + len(data.sensors), sharex=True, height_ratios=[1.5, *[1] * len(data.sensors)]
    )
    _draw_answers(top, data.labels, timeline, np.concatenate(answers))
    _draw_truth(top, [series.label for series in shown], data.labels, timeline)
    values = np.concatenate([series.values for series in shown])
    for axis, sensor in zip(below, data.sensors, strict=True):
        first = data.features.index(sensor.channels[0])
        _draw_sensor(axis, sensor, timeline, values[:, first : first + len(sensor.channels)])
    for axis in axes:
        for border in timeline.between(timeline.ends[1:-1]):
            axis.axvline(border, color="black", linewidth=1.0, linestyle=(0, (4, 3)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0)
    _draw_cuts(axes[-1], outcome.script.cuts[:SHOWN], timeline)
    unit = "step" if data.sample_rate_hz is None else "time [s]"
    axes[-1].set_xlabel(f"{unit}     (small marks: where chunks ended; dashed lines: resets)")
    figure.align_ylabels(axes)
    figure.suptitle(f"{data.title}: stream '{outcome.script.stream}' through the daemon, an answer a step", fontsize=14)
    figure.savefig(path, dpi=_DPI, format="png")


def _draw_answers(axis: Any, labels: Sequence[str], timeline: _Timeline, probability: Array) -> None:
    for number, label in enumerate(labels):
        for steps, x in timeline.pieces():
            name = label if steps.start == 0 else None
            axis.plot(x, probability[steps, number], color=_CLASSES[number], linewidth=2.0, label=name)
    axis.set_ylabel("class probability")
    axis.set_ylim(-0.02, 1.02)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="the model says")


def _draw_truth(axis: Any, truth: Sequence[int], labels: Sequence[str], timeline: _Timeline) -> None:
    """The true class of each recording, above the axis."""
    place = {"y": 1.03, "va": "bottom", "fontweight": "bold"}
    axis.text(-0.01, s="truth:", ha="right", transform=axis.transAxes, **place)
    for label, (_, x) in zip(truth, timeline.pieces(), strict=True):
        color, transform = _CLASSES[label], axis.get_xaxis_transform()
        axis.text(x.mean(), s=labels[label], ha="center", color=color, transform=transform, **place)


def _draw_sensor(axis: Any, sensor: Sensor, timeline: _Timeline, values: Array) -> None:
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(sensor.channels)))
    for number, channel in enumerate(sensor.channels):
        for steps, x in timeline.pieces():
            name = channel if steps.start == 0 else None
            axis.plot(x, values[steps, number], color=colors[number], linewidth=1.0, label=name)
    axis.set_ylabel(sensor.title)
    columns = 1 if len(sensor.channels) <= 6 else 2
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, ncols=columns)


def _draw_cuts(axis: Any, cuts: Sequence[Sequence[int]], timeline: _Timeline) -> None:
    """A mark on the x axis where each chunk ended."""
    steps = np.concatenate([start + np.array(cut[1:]) for start, cut in zip(timeline.ends, cuts, strict=False)])
    marks = {"color": "black", "markersize": 9, "clip_on": False, "transform": axis.get_xaxis_transform()}
    axis.plot(timeline.between(steps), np.zeros(len(steps)), "|", **marks)
