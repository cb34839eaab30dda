"""docs/STUDY.md and the plots of the study, from bench/results/study.json alone.

    python bench/study/report.py           # write the page and the plots
    python bench/study/report.py --check   # exit status 1 if the results give another docs/STUDY.md

The prose is in template.md; every number and every verdict is filled in by this file.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import stats

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

RESULTS, PAGE = ROOT / "bench/results/study.json", ROOT / "docs/STUDY.md"
NOT_RUN = "Not run."

LABELS = {
    "una_pair": "UNA pair",
    "una_bce": "UNA binary, bce",
    "una_mse": "UNA binary, mse",
    "una_score": "UNA score, mse",
    "una_centred": "UNA score, mse, centred",
    "trl_dpo": "TRL DPOTrainer",
    "trl_kto": "TRL KTOTrainer",
    "una_group": "UNA reward_mse, offset group",
    "una_ema": "UNA reward_mse, offset ema",
    "una_none": "UNA reward_mse, no offset",
    "una_sigmoid": "UNA score (sigmoid) form",
    "ppo_1": "PPO, 1 epoch",
    "ppo_4": "PPO, 4 epochs",
    "trl_rloo": "TRL RLOOTrainer",
    "trl_grpo": "TRL GRPOTrainer",
}


class Comparison(NamedTuple):
    """Two methods, compared.

    claim: a statement from the paper or from us, None without a statement
    expected: the verdict that the claim asks for
    """

    ours: str
    theirs: str
    claim: str | None = None
    expected: str = "better"


_AS_IT_STANDS = "as it stands: f = c = 0"
_SCORES = "scores are worth more than labels"
_ON_PAIRS = "UNA on scores beats DPO on pairs"
_GROUP = "online UNA (reward form, group)"
COMPARISONS = {
    "E1": (
        Comparison("una_pair", "trl_dpo", "with pairs UNA is DPO (paper, eq. 10)", "equivalent"),
        Comparison("una_score", "una_bce", f"{_SCORES} (paper, {_AS_IT_STANDS})"),
        Comparison("una_centred", "una_bce", f"{_SCORES}, with scores centred"),
        Comparison("una_mse", "trl_kto", "with labels UNA (mse) beats KTO (paper)"),
        Comparison("una_bce", "trl_kto", "with labels UNA (bce) beats KTO (paper)"),
        Comparison("una_score", "trl_dpo", f"{_ON_PAIRS} (paper, {_AS_IT_STANDS})"),
        Comparison("una_centred", "trl_dpo", f"{_ON_PAIRS}, with scores centred"),
        Comparison("una_centred", "una_score", "centring the scores helps (ours)"),
    ),
    "E3": (
        Comparison("una_group", "ppo_1", f"{_GROUP} reaches PPO of 1 epoch", "equivalent"),
        Comparison("una_group", "ppo_4", f"{_GROUP} reaches PPO of 4 epochs", "equivalent"),
        Comparison(
            "una_sigmoid", "ppo_1", "the paper's score form reaches PPO of 1 epoch", "equivalent"
        ),
        Comparison(
            "una_group", "una_sigmoid", "the reward form is worth more than the score form (ours)"
        ),
        Comparison("una_group", "una_none", "the group offset is worth more than none (ours)"),
        Comparison("una_group", "una_ema"),
        Comparison("una_group", "trl_rloo"),
        Comparison("una_group", "trl_grpo"),
    ),
}
TIME_LIMITS = {"ppo_1": 0.6, "ppo_4": 0.3}
STATE_LIMIT = 0.6
OUTCOMES = {  # (expected, overall verdict) -> what it means for the claim
    ("better", "better"): "reproduces",
    ("better", "equivalent"): "ties",
    ("better", "worse"): "does not reproduce: worse",
    ("equivalent", "equivalent"): "reproduces",
    ("equivalent", "better"): "reproduces: better",
    ("equivalent", "worse"): "does not reproduce: worse",
}

Report = dict[str, Any]
Line = dict[stats.Bin, dict[int, stats.Point]]

# ------------------------------------------------------------------------------------------ numbers


def bins_of(report: Report, part: str) -> list[stats.Bin]:
    return [tuple(b) for b in report["plan"]["bins"][part]]


def runs_of(report: Report, part: str, what: str | None = None) -> list[dict[str, Any]]:
    return [r for r in report["runs"] if r["part"] == part and what in (None, r["what"])]


def frontiers(report: Report, part: str) -> dict[str, Line]:
    """Return {method: frontier}, in the order of LABELS."""
    runs = [run for run in runs_of(report, part) if run["what"] != "time"]
    found = {}
    for name in LABELS:
        own = [run for run in runs if run["method"] == name]
        if own:
            found[name] = stats.frontier(own, bins_of(report, part))
    return found


class Cell(NamedTuple):
    """A comparison in one bin, as found and at equal KL."""

    difference: stats.Interval
    word: str
    corrected: stats.Interval
    corrected_word: str


def compare(lines: dict[str, Line], comparison: Comparison) -> dict[stats.Bin, Cell]:
    """Return the comparison of two methods in every bin that both methods have."""
    ours, theirs = lines.get(comparison.ours, {}), lines.get(comparison.theirs, {})
    found = {}
    for b in ours:
        raw = stats.paired(ours[b], theirs.get(b, {}))
        if raw:
            corrected = stats.at_equal_kl(ours[b], theirs[b], stats.slope(theirs, b))
            as_found = (stats.interval(raw), stats.verdict(raw))
            found[b] = Cell(*as_found, stats.interval(corrected), stats.verdict(corrected))
    return found


def outcome(comparison: Comparison, word: str) -> str:
    """Return the meaning of a verdict for the claim of a comparison."""
    undecided = "open" if word == "inconclusive" else word
    return OUTCOMES.get((comparison.expected, word), undecided)


def timed(report: Report) -> dict[str, list[dict[str, Any]]]:
    """Return {method: runs that count}: round 0 warms up."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs_of(report, "E3", "time"):
        if run["seed"] > 0 and "failed" not in run:
            found.setdefault(run["method"], []).append(run)
    return {name: found[name] for name in LABELS if name in found}


def seconds(runs: Sequence[dict[str, Any]]) -> float:
    """Return the median time of the runs."""
    return statistics.median(run["seconds"] for run in runs)


def phase_seconds(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the median time of every phase; {} for runs whose phases were not told apart."""
    phases = [run["parts"] for run in runs if run.get("parts")]
    if not phases:
        return {}
    found = {}
    for name in phases[0]:
        found[name] = statistics.median(own[name] for own in phases)
    return found


def state_bytes(runs: Sequence[dict[str, Any]]) -> int:
    """Return the bytes of the train state."""
    return sum(runs[0]["bytes"].values())


# --------------------------------------------------------------------------------------------- text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def band(found: stats.Interval, sign: str = "") -> str:
    """Return a mean with half of the interval."""
    if found.count == 1:
        return f"{found.mean:{sign}.3f}"
    return f"{found.mean:{sign}.3f} ± {(found.high - found.low) / 2:.3f}"


def bin_name(b: stats.Bin) -> str:
    return f"KL {b[0]:g} to {b[1]:g}"


def settings(report: Report) -> str:
    """Return the table of sizes, grids, seeds and versions."""
    size, plan = report["size"], report["plan"]
    base, made = report["base"], report["environment"]
    changed = "with uncommitted changes" if made["uncommitted_changes"] else "clean"
    model = f"Llama, 2 layers, d 64, {base['parameters']:,} weights, tied head"
    offline = f"{size['prompts']} prompts x 2 answers, seen {size['epochs']}x"
    online = f"{size['online_batch']} prompts x {size['samples']} samples"
    selection, reporting = listed(plan["select_seeds"]), listed(plan["report_seeds"])
    rows = [
        ("model", f"{model}; {size['base_steps']} steps"),
        ("base model", f"gold {base['gold']:.3f}, {base['tokens']:.1f} tokens an answer"),
        ("evaluation", f"one answer to each of {size['held_out']} held-out prompts, temperature 1"),
        ("offline", f"{offline}, {size['offline_batch']} per step"),
        ("online", f"{size['online_steps']} steps of {online}"),
        ("seeds", f"selection {selection}; reporting {reporting}"),
    ]
    for part in ("E1", "E3"):
        grid = f"lr {listed(plan['lrs'][part])}; beta {listed(plan['betas'][part])}"
        rows.append((f"grid of {part}", grid))
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "trl"))
    commit = f"commit {str(made['commit'])[:12]}, {changed}"
    rows += [
        ("versions", f"{versions}, Python {made['python']}"),
        ("machine", f"CPU ({made['cpu']}), {made['cores']} cores, one thread per process"),
        ("made by", f"`{made['command']}` on {made['date'][:10]}, {commit}"),
    ]
    if len(report["sources"]) > 1:
        rows.append(("note", f"the runs are of {len(report['sources'])} versions of una_fast"))
    return table(("what", "value"), rows)


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def exact_table(report: Report) -> str:
    """Return the tables of E0."""
    found = report["exact"]
    if not found:
        return NOT_RUN

    def row(claim: str, value: float, limit: float) -> tuple[str, str, str, str]:
        verdict = "holds" if value <= limit else "**does not hold**"
        return claim, f"{value:.1e}", f"{limit:.0e}", verdict

    rows = [row("pair loss: gradient of DPO", found["pair_is_dpo"], 1e-10)]
    for offset, value in found["policy_gradient"].items():
        claim = f"reward_mse on-policy: gradient -2 beta grad J, constant offset {float(offset):g}"
        rows.append(row(claim, value, 1e-10))
    on_samples = "reward_mse on samples: mean gradient over all draws, offset none and group"
    rows.append(row(on_samples, found["mean_gradient"], 1e-10))
    rows.append(row("binary bce: gradient of BCO with shift 0", found["bce_is_bco"], 1e-10))
    labels = "score mse on scores 0 and 1: gradient of binary mse"
    rows.append(row(labels, found["scores_are_labels"], 1e-10))
    end = "reward_mse: total variation of its end from the RLHF optimum"
    rows.append(row(end, max(found["fixed_point_tv"]), 1e-2))
    text = table(("claim", "largest difference", "allowed", "verdict"), rows)
    rows = []
    for place, own in found["variance"].items():
        ratios = [g / n for g, n in zip(own["group"], own["none"], strict=True)]
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((place, f"{statistics.fmean(ratios):.2f}", span))
    head = ("the policy is", "variance with group / with none, mean", "over policies")
    return f"{text}\n\nVariance of the gradient on one draw of four answers:\n\n{table(head, rows)}"


def frontier_table(report: Report, part: str) -> str:
    """Return gold and KL of every method in every bin."""
    lines, bins = frontiers(report, part), bins_of(report, part)
    if not any(lines.values()):
        return NOT_RUN

    def cell(line: Line, b: stats.Bin) -> str:
        if b not in line:
            return "-"
        points = line[b].values()
        gold = stats.interval([p.gold for p in points])
        return f"{band(gold)} @ {stats.mean_point(points).kl:.2f}"

    rows = []
    for name, line in lines.items():
        cells = [cell(line, b) for b in bins]
        rows.append((LABELS[name], *cells))
    return table(("gold ± half of its 90 % interval @ mean KL", *map(bin_name, bins)), rows)


def comparison_table(report: Report, part: str) -> str:
    """Return the comparisons of a part in every bin."""
    lines, bins = frontiers(report, part), bins_of(report, part)
    if not any(lines.values()):
        return NOT_RUN
    rows = []
    for comparison in COMPARISONS[part]:
        found = compare(lines, comparison)

        def cell(b: stats.Bin, found: dict = found) -> str:
            if b not in found:
                return "-"
            c = found[b]
            again = f"at equal KL {band(c.corrected, '+')} {c.corrected_word}"
            return f"**{c.word}** {band(c.difference, '+')}; {again}"

        names = f"{LABELS[comparison.ours]} against {LABELS[comparison.theirs]}"
        rows.append((names, *map(cell, bins)))
    return table(("difference in gold", *map(bin_name, bins)), rows)


def chosen_table(report: Report, part: str) -> str:
    """Return the chosen settings of every method in every bin."""
    bins = bins_of(report, part)
    rows = []
    for name in LABELS:
        runs = [run for run in runs_of(report, part) if run["method"] == name]
        chosen = stats.select(runs, bins) if runs else {}
        if chosen:
            cells = dict.fromkeys(bins, "-")
            for b, candidate in chosen.items():
                cells[b] = f"{candidate.lr:g}, {candidate.beta:g}, {candidate.step}"
            rows.append((LABELS[name], *cells.values()))
    return table(("lr, beta, step", *map(bin_name, bins)), rows) if rows else NOT_RUN


def means_table(report: Report) -> str:
    """Return the table of E2."""
    runs = [run for run in runs_of(report, "E2") if "failed" not in run]
    if not runs:
        return NOT_RUN
    base = report["base"]["gold"]
    final: dict[tuple[float, float], dict[str, dict[int, stats.Point]]] = {}
    for run in runs:
        own = final.setdefault((run["mean"], run["beta"]), {}).setdefault(run["method"], {})
        own[run["seed"]] = stats.Point(run["points"][-1]["gold"], run["points"][-1]["kl"])

    def state(points: dict[int, stats.Point]) -> str:
        gold = stats.interval([p.gold for p in points.values()])
        kl = stats.interval([p.kl for p in points.values()])
        note = ", **below the base model**" if gold.high < base else ""
        return f"{band(gold)} @ {kl.mean:.2f} ± {(kl.high - kl.low) / 2:.2f}{note}"

    rows = []
    for (mean, beta), own in sorted(final.items()):
        if len(own) == 2:
            difference = stats.paired(own["una_centred"], own["una_score"])
            word = f"{stats.verdict(difference)} {band(stats.interval(difference), '+')}"
            states = (state(own["una_score"]), state(own["una_centred"]))
            rows.append((f"{mean:g}", f"{beta:g}", *states, word))
    head = (
        "mean score",
        "beta",
        "as they are: gold @ KL",
        "centred: gold @ KL",
        "difference in gold",
    )
    return table(head, rows)


def cost_table(report: Report) -> str:
    """Return time and train state of the methods."""
    runs = timed(report)
    if not runs:
        return NOT_RUN
    rows = []
    for name, own in runs.items():
        phases = [f"{phase} {value:.2f}" for phase, value in phase_seconds(own).items()]
        times = [run["seconds"] for run in own]
        ratios = dict.fromkeys(TIME_LIMITS, "-")
        for ppo in TIME_LIMITS.keys() & runs.keys():
            ratios[ppo] = f"{seconds(own) / seconds(runs[ppo]):.2f}"
        state = state_bytes(own)
        against = f"{state / state_bytes(runs['ppo_1']):.2f}" if "ppo_1" in runs else "-"
        time_cells = (f"{seconds(own):.2f}", f"{min(times):.2f} to {max(times):.2f}")
        split = ", ".join(phases) or "-"
        state_cells = (f"{state / 1e6:.2f}", against)
        rows.append((LABELS[name], *time_cells, split, *ratios.values(), *state_cells))
    head = ("method", "s", "range", "of it", "/ PPO 1", "/ PPO 4", "train state, MB", "/ PPO")
    return table(head, rows)


def cost_verdicts(report: Report) -> list[tuple[str, str, str]]:
    """Return (claim, ratio, verdict) of time and memory."""
    runs = timed(report)
    if "una_group" not in runs:
        return []
    ours, rows = seconds(runs["una_group"]), []
    for name, limit in TIME_LIMITS.items():
        if name not in runs:
            continue
        theirs = seconds(runs[name])
        rows.append(
            judged(f"wall time of online UNA (group) / {LABELS[name]}", ours / theirs, limit)
        )
        before = phase_seconds(runs[name])["before"]
        share = f"{before / theirs:.0%} of its time"
        without = f"the same, PPO without the pass before its epochs ({share})"
        rows.append(judged(without, ours / (theirs - before), limit))
    if "ppo_1" in runs:
        ratio = state_bytes(runs["una_group"]) / state_bytes(runs["ppo_1"])
        rows.append(judged("train state of online UNA / PPO", ratio, STATE_LIMIT))
    return rows


def judged(claim: str, ratio: float, limit: float) -> tuple[str, str, str]:
    """Return the line of a ratio that should be at most `limit`."""
    verdict = "found" if ratio <= limit else "not found"
    return f"{claim}: at most {limit:g}", f"{ratio:.2f}", verdict


def decided_in(words: Sequence[str]) -> str:
    """Return how many bins have a verdict, in words; empty for all bins or no bin."""
    decided = len(words) - words.count("inconclusive")
    return "" if decided in (0, len(words)) else f" (in {decided} of {len(words)} bins)"


def outcome_of(comparison: Comparison, words: Sequence[str]) -> str:
    """Return the outcome of a comparison over all bins, from a verdict per bin."""
    return f"{outcome(comparison, stats.overall(words))}{decided_in(words)}"


def claims_table(report: Report) -> str:
    """Return the claims with verdicts over all bins."""
    rows = []
    for part, comparisons in COMPARISONS.items():
        lines = frontiers(report, part)
        for comparison in comparisons:
            if comparison.claim is None:
                continue
            cells = compare(lines, comparison)
            if not cells:
                both = lines.keys() >= {comparison.ours, comparison.theirs}
                reason = "no bin in common" if both else "not run"
                rows.append((comparison.claim, reason, reason, "-"))
                continue
            words = [cell.word for cell in cells.values()]
            corrected_words = [cell.corrected_word for cell in cells.values()]
            counts = [f"{words.count(word)} {word}" for word in dict.fromkeys(words)]
            found = f"**{outcome_of(comparison, words)}**"
            corrected = outcome_of(comparison, corrected_words)
            rows.append((comparison.claim, found, corrected, ", ".join(counts)))
    text = table(("claim", "found", "at equal KL", "KL bins"), rows)
    costs = cost_verdicts(report)
    if not costs:
        return f"{text}\n\nTime and memory: not run."
    return f"{text}\n\n{table(('expected', 'ratio', 'verdict'), costs)}"


SECTIONS: dict[str, Callable[[Report], str]] = {
    "claims": claims_table,
    "settings": settings,
    "exact": exact_table,
    "frontier_E1": lambda report: frontier_table(report, "E1"),
    "comparison_E1": lambda report: comparison_table(report, "E1"),
    "chosen_E1": lambda report: chosen_table(report, "E1"),
    "means": means_table,
    "frontier_E3": lambda report: frontier_table(report, "E3"),
    "comparison_E3": lambda report: comparison_table(report, "E3"),
    "chosen_E3": lambda report: chosen_table(report, "E3"),
    "cost": cost_table,
    "plot_E1": lambda report: image(report, "E1"),
    "plot_E3": lambda report: image(report, "E3"),
    "plot_cost": lambda report: image(report, "cost"),
}


def page(report: Report | None) -> str:
    """Return the text of docs/STUDY.md; every section reads "Not run." without results."""
    text = (HERE / "template.md").read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        return SECTIONS[match[1]](report) if report else NOT_RUN

    text = re.sub(r"\{\{(\w+)\}\}", fill, text)
    return re.sub(r"\n{3,}", "\n\n", text)


# -------------------------------------------------------------------------------------------- plots


def plotted(report: Report) -> dict[str, bool]:
    """Return which plots the results give."""
    drawn = {part: any(frontiers(report, part).values()) for part in COMPARISONS}
    return {**drawn, "cost": bool(timed(report))}


def image(report: Report, name: str) -> str:
    """Return a link to a plot, empty without the plot."""
    return f"![{name}](../bench/results/study_{name.lower()}.png)" if plotted(report)[name] else ""


def draw(report: Report, folder: Path) -> None:
    """Write the PNG files of the results into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / f"study_{name.lower()}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)

    wanted = plotted(report)
    for part in COMPARISONS:
        if wanted[part]:
            figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
            draw_frontiers(report, part, axes)
            save(figure, part)
    if wanted["cost"]:
        layout = {"figsize": (9.6, 3.6), "layout": "constrained", "sharey": True}
        figure, (left, right) = plt.subplots(1, 2, **layout)
        draw_seconds(timed(report), left)
        draw_bytes(timed(report), right)
        save(figure, "cost")


def draw_frontiers(report: Report, part: str, axes: Any) -> None:
    """Draw gold against KL, a line with its intervals for every method."""
    for k, (name, line) in enumerate(frontiers(report, part).items()):
        if not line:
            continue
        golds, kls = [], []
        for points in line.values():
            golds.append(stats.interval([p.gold for p in points.values()]))
            kls.append(stats.mean_point(points.values()).kl)
        means, lows, highs, counts = zip(*golds, strict=True)
        style = {"color": f"C{k}", "linestyle": "-" if name.startswith("una") else "--"}
        axes.plot(kls, means, marker="o", markersize=4, label=LABELS[name], **style)
        if counts[0] > 1:
            axes.fill_between(kls, lows, highs, color=f"C{k}", alpha=0.13)
    axes.plot(0, report["base"]["gold"], "k*", label="base model")
    axes.set_xlabel("KL to the base model, nats per answer")
    axes.set_ylabel("gold reward, held-out prompts")
    seeds = len(report["plan"]["report_seeds"])
    title = f"{part}: best settings per KL bin, {seeds} reporting seeds, 90 % intervals"
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


PHASES = {"generate": "C0", "reward": "C2", "before": "C1", "train": "C3"}  # -> color
STATE = {"weights": "C0", "gradients": "C1", "optimizer": "C2", "frozen": "0.6"}


def stack(axes: Any, labels: list[str], bars: list[dict[str, float]], colors: dict) -> None:
    """Draw horizontal bars of pieces: {name: length} of every bar, in the order of the pieces."""
    for key, color in colors.items():
        for k, (label, pieces) in enumerate(zip(labels, bars, strict=True)):
            order = list(pieces)
            before = order[: order.index(key)] if key in pieces else []
            start = sum(pieces[name] for name in before)
            own = {"color": color, "label": key if k == 0 else None}
            axes.barh(label, pieces.get(key, 0.0), left=start, **own)


def draw_seconds(runs: dict[str, list[dict[str, Any]]], axes: Any) -> None:
    """Draw the seconds of a run of every method, by phase where phases were told apart."""
    names = list(runs)[::-1]
    labels = [LABELS[name] for name in names]
    phases = [phase_seconds(runs[name]) for name in names]
    stack(axes, labels, phases, PHASES)
    for name, label, own in zip(names, labels, phases, strict=True):
        if not own:
            axes.barh(label, seconds(runs[name]), color="0.6")
    axes.set_xlabel("seconds of a run (grey: not told apart)")
    axes.legend(fontsize=8)


def draw_bytes(runs: dict[str, list[dict[str, Any]]], axes: Any) -> None:
    """Draw the train state of every method."""
    names = list(runs)[::-1]
    state = []
    for name in names:
        state.append({key: value / 1e6 for key, value in runs[name][0]["bytes"].items()})
    stack(axes, [LABELS[name] for name in names], state, STATE)
    axes.set_xlabel("train state, MB")
    axes.legend(fontsize=8)


def read(path: Path) -> Report | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(results: Path, to: Path) -> None:
    """Write the page of some results, and the plots beside the results."""
    report = read(results)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page(report), encoding="utf-8")
    if report:
        draw(report, results.parent)


def main() -> int:
    """Write or check the page, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page(read(RESULTS)))
    write(RESULTS, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
