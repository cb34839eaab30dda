"""The charts of a run's page and the metrics in every chart, in the order of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from una_fast.report.charts import LARGEST, MOST_POINTS, Line, dash_array, draw, line_of, path_of
from una_fast.report.metric_table import EVAL, OF_REWARD, sentence_of, table_name
from una_fast.report.render import visible
from una_fast.report.run_files import RunFiles, Series
from una_fast.report.settings import MOST_RUNS

LEARNING, SAMPLING, MACHINE = "Learning", "Rewards and KL", "Machine"


@dataclass(frozen=True)
class ChartKind:
    """A chart of the page.

    section: heading above the chart
    title: of the chart
    metrics: to draw, with metrics of the evaluation; a chart without any metric is left out
    against: metric of the horizontal axis instead of steps
    """

    section: str
    title: str
    metrics: tuple[str, ...]
    against: str | None = None


CHARTS = (
    ChartKind(LEARNING, "Loss", ("loss",)),
    ChartKind(LEARNING, "Accuracy of pairs", ("rewards/accuracies",)),
    ChartKind(LEARNING, "Margin of pairs", ("rewards/margins",)),
    ChartKind(LEARNING, "Implicit rewards of pairs", ("rewards/chosen", "rewards/rejected")),
    ChartKind(LEARNING, "Labels and scores", ("una/implicit_mean", "una/target_mean")),
    ChartKind(LEARNING, "Calibration error", ("una/calibration_error",)),
    ChartKind(LEARNING, "Log-ratio", ("log_ratio",)),
    ChartKind(SAMPLING, "Reward", ("reward",)),
    ChartKind(SAMPLING, "KL", ("kl",)),
    ChartKind(SAMPLING, "Reward against KL", ("reward",), against="kl"),
    ChartKind(SAMPLING, "Rewards by name", (OF_REWARD,)),
    ChartKind(SAMPLING, "Length of samples", ("completions/mean_length",)),
    ChartKind(SAMPLING, "Samples cut", ("completions/clipped_ratio",)),
    ChartKind(MACHINE, "Gradient norm", ("grad_norm",)),
    ChartKind(MACHINE, "Learning rate", ("learning_rate",)),
    ChartKind(MACHINE, "Tokens per second", ("tok_per_sec",)),
    ChartKind(MACHINE, "Time", ("time/generate", "time/reward", "time/train")),
    ChartKind(MACHINE, "Memory", ("memory/peak_gib",)),
    ChartKind(MACHINE, "Use of the GPU", ("mfu",)),
)


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    text: a metric, or a run
    colour: number of the colour, from 1; 0: the colour of the text
    dash: lengths of strokes and gaps for SVG; empty: a whole line
    """

    text: str
    colour: int
    dash: str


@dataclass
class Chart:
    """A drawn chart.

    section, title: of the kind of chart
    svg: the drawing
    keys: the legend
    captions: sentences of the metrics
    notes: on values without a place in the drawing
    """

    section: str
    title: str
    svg: Markup
    keys: list[Key]
    captions: list[str]
    notes: list[str]


def charts_of(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts of runs; several runs share a chart."""
    charts = [_chart(kind, runs) for kind in CHARTS]
    return [chart for chart in charts if chart is not None]


def _chart(kind: ChartKind, runs: Sequence[RunFiles]) -> Chart | None:
    """Draw a chart; None if no run has a metric for the chart."""
    curves = _curves(kind, runs)
    if not curves:
        return None
    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    lines: list[Line] = []
    notes: list[str] = []
    for curve in curves:
        line = _line(curve, points=max(MOST_POINTS // len(curves), 2))
        colour, dash = _look(curve, metrics, len(runs))
        lines.append(replace(line, colour=colour, dash=dash))
        notes += _notes(curve)
    captions = list(dict.fromkeys(filter(None, map(sentence_of, metrics))))
    limit = _planned_gib(kind, runs)
    if limit is not None:
        captions.append(f"The dashed line is the planned peak, {limit:.3g} GiB.")
    label = f"{kind.title}: {'; '.join(map(_spoken, lines))}"
    svg = draw(lines, label=label, x_label=kind.against or "step", limit=limit)
    keys = _keys_of_metrics(lines) if len(runs) == 1 else _keys_of_runs(curves, runs, metrics)
    return Chart(kind.section, kind.title, Markup(svg), keys, captions, notes)


# ---- curves -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """A metric of a run.

    run: number of the run, from 0
    metric: name of the metric
    label: metric, and the run if the page shows several
    series: values over the steps
    across: values of the horizontal axis; None: the steps themselves
    """

    run: int
    metric: str
    label: str
    series: Series
    across: Series | None


def _curves(kind: ChartKind, runs: Sequence[RunFiles]) -> list[_Curve]:
    """Return the curves of a chart, run by run."""
    curves = []
    for number, run in enumerate(runs):
        for metric in _metrics_of(kind, run):
            label = visible(metric if len(runs) == 1 else f"{metric}, {run.name}")
            series = run.series[metric]
            across = None
            if kind.against is not None:
                prefix = EVAL if metric.startswith(EVAL) else ""
                across = run.series.get(prefix + kind.against, {})
                series = {step: value for step, value in series.items() if step in across}
            if series:
                curves.append(_Curve(number, metric, label, series, across))
    return curves


def _metrics_of(kind: ChartKind, run: RunFiles) -> list[str]:
    """Return the metrics of a run for a chart, evaluations too."""
    wanted: list[str] = []
    for metric in kind.metrics:
        if metric == OF_REWARD:
            wanted += filter(_is_of_reward, run.series)
            continue
        wanted.append(metric)
        if kind.section != MACHINE:  # times and speeds of the evaluation tell little
            wanted.append(EVAL + metric)
    return [metric for metric in wanted if metric in run.series]


def _is_of_reward(metric: str) -> bool:
    return table_name(metric) == OF_REWARD and not metric.startswith(EVAL)


def _line(curve: _Curve, *, points: int) -> Line:
    if curve.across is None:
        return line_of(curve.label, curve.series, points=points)
    return path_of(curve.label, curve.across, curve.series, points=points)


def _look(curve: _Curve, metrics: Sequence[str], runs: int) -> tuple[int, int]:
    """Return the numbers of the colour and of the dash of a curve.

    Of a single run the colour tells the metric, and a dashed line the evaluation. Of several runs
    the colour tells the run, and the dash the metric.

    curve: to draw
    metrics: of the chart
    runs: count of the runs of the page
    """
    colour, dash = curve.run, metrics.index(curve.metric)
    if runs == 1:
        plain = list(dict.fromkeys(metric.removeprefix(EVAL) for metric in metrics))
        colour = plain.index(curve.metric.removeprefix(EVAL))
        dash = int(curve.metric.startswith(EVAL))
    return colour, dash


def _notes(curve: _Curve) -> list[str]:
    """Return a note on values without a place in a chart."""
    bad = [step for step, value in curve.series.items() if not abs(value) < LARGEST]
    if not bad:
        return []
    values = "1 value is" if len(bad) == 1 else f"{len(bad)} values are"
    return [f"{curve.label}: {values} not finite, the first at step {min(bad)}."]


# ---- legends ------------------------------------------------------------------------------------


def _keys_of_metrics(lines: Sequence[Line]) -> list[Key]:
    """Return the legend of a single run; a single line needs none."""
    if len(lines) == 1:
        return []
    return [Key(line.name, line.colour % MOST_RUNS + 1, dash_array(line.dash)) for line in lines]


def _keys_of_runs(
    curves: Sequence[_Curve], runs: Sequence[RunFiles], metrics: Sequence[str]
) -> list[Key]:
    """Return the legend of several runs: runs by colour, then metrics by dash."""
    shown = sorted({curve.run for curve in curves})
    keys = [Key(runs[number].name, number % MOST_RUNS + 1, "") for number in shown]
    if len(metrics) > 1:
        keys += [Key(metric, 0, dash_array(dash)) for dash, metric in enumerate(metrics)]
    return keys


def _planned_gib(kind: ChartKind, runs: Sequence[RunFiles]) -> float | None:
    """Return the planned peak of a single run, for the chart of the memory."""
    peak = runs[0].plan.get("peak")
    is_known = isinstance(peak, (int, float)) and math.isfinite(peak)
    if kind.metrics != ("memory/peak_gib",) or len(runs) > 1 or not is_known:
        return None
    return peak / 2**30


def _spoken(line: Line) -> str:
    """Return a line of a chart in words."""
    known = line.y[np.isfinite(line.y)]
    if not known.size:
        return f"{line.name} has no finite value"
    return f"{line.name} from {known[0]:.4g} to {known[-1]:.4g}"
