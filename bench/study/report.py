"""docs/STUDY.md and the plots of the study, from bench/results/study.json alone.

    python bench/study/report.py           # write them
    python bench/study/report.py --check   # exit status 1 if docs/STUDY.md is not what the results give

The prose is in template.md; every number and every verdict is put there by this file.
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
    """claim: what somebody says of it, None where nobody does; expected: the verdict that the claim asks for."""

    ours: str
    theirs: str
    claim: str | None = None
    expected: str = "better"


COMPARISONS = {
    "E1": (
        Comparison("una_pair", "trl_dpo", "with pairs UNA is DPO (paper, eq. 10)", "equivalent"),
        Comparison(
            "una_score",
            "una_bce",
            "scores are worth more than labels (paper, as it stands: f = c = 0)",
        ),
        Comparison(
            "una_centred", "una_bce", "scores are worth more than labels, with scores centred"
        ),
        Comparison("una_mse", "trl_kto", "with labels UNA (mse) beats KTO (paper)"),
        Comparison("una_bce", "trl_kto", "with labels UNA (bce) beats KTO (paper)"),
        Comparison(
            "una_score",
            "trl_dpo",
            "UNA on scores beats DPO on pairs (paper, as it stands: f = c = 0)",
        ),
        Comparison(
            "una_centred", "trl_dpo", "UNA on scores beats DPO on pairs, with scores centred"
        ),
        Comparison("una_centred", "una_score", "centring the scores helps (ours)"),
    ),
    "E3": (
        Comparison(
            "una_group",
            "ppo_1",
            "online UNA (reward form, group) reaches PPO of 1 epoch",
            "equivalent",
        ),
        Comparison(
            "una_group",
            "ppo_4",
            "online UNA (reward form, group) reaches PPO of 4 epochs",
            "equivalent",
        ),
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

# ------------------------------------------------------------------------------------------------------------- numbers


def bins_of(report: Report, part: str) -> list[stats.Bin]:
    return [tuple(b) for b in report["plan"]["bins"][part]]


def runs_of(report: Report, part: str, what: str | None = None) -> list[dict[str, Any]]:
    return [r for r in report["runs"] if r["part"] == part and what in (None, r["what"])]


def frontiers(report: Report, part: str) -> dict[str, Line]:
    """method -> frontier, in the order of LABELS."""
    runs = [run for run in runs_of(report, part) if run["what"] != "time"]
    by_method = {name: [run for run in runs if run["method"] == name] for name in LABELS}
    return {
        name: stats.frontier(own, bins_of(report, part)) for name, own in by_method.items() if own
    }


class Cell(NamedTuple):
    """A comparison in one bin, as found and at equal KL."""

    difference: stats.Interval
    word: str
    corrected: stats.Interval
    corrected_word: str


def compare(lines: dict[str, Line], comparison: Comparison) -> dict[stats.Bin, Cell]:
    ours, theirs = lines.get(comparison.ours, {}), lines.get(comparison.theirs, {})
    found = {}
    for b in ours:
        raw = stats.paired(ours[b], theirs.get(b, {}))
        if raw:
            corrected = stats.at_equal_kl(ours[b], theirs[b], stats.slope(theirs, b))
            found[b] = Cell(
                stats.interval(raw),
                stats.verdict(raw),
                stats.interval(corrected),
                stats.verdict(corrected),
            )
    return found


def outcome(comparison: Comparison, word: str) -> str:
    return OUTCOMES.get(
        (comparison.expected, word), {"mixed": "mixed", "inconclusive": "open"}.get(word, word)
    )


def timed(report: Report) -> dict[str, list[dict[str, Any]]]:
    """method -> the runs that count: round 0 warms up."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs_of(report, "E3", "time"):
        if run["seed"] > 0 and "failed" not in run:
            found.setdefault(run["method"], []).append(run)
    return {name: found[name] for name in LABELS if name in found}


def seconds(runs: Sequence[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)


# --------------------------------------------------------------------------------------------------------------- text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def band(found: stats.Interval, sign: str = "") -> str:
    if found.count == 1:
        return f"{found.mean:{sign}.3f}"
    return f"{found.mean:{sign}.3f} ± {(found.high - found.low) / 2:.3f}"


def bin_name(b: stats.Bin) -> str:
    return f"KL {b[0]:g} to {b[1]:g}"


def settings(report: Report) -> str:
    size, plan, base, made = report["size"], report["plan"], report["base"], report["environment"]
    changed = "with uncommitted changes" if made["uncommitted_changes"] else "clean"
    rows = [
        (
            "model",
            f"Llama, 2 layers, d 64, {base['parameters']:,} weights, tied head; {size['base_steps']} steps",
        ),
        ("base model", f"gold {base['gold']:.3f}, {base['tokens']:.1f} tokens an answer"),
        ("evaluation", f"one answer to each of {size['held_out']} held-out prompts, temperature 1"),
        (
            "offline",
            f"{size['prompts']} prompts x 2 answers, seen {size['epochs']}x, {size['offline_batch']} per step",
        ),
        (
            "online",
            f"{size['online_steps']} steps of {size['online_batch']} prompts x {size['samples']} samples",
        ),
        (
            "seeds",
            f"selection {listed(plan['select_seeds'])}; reporting {listed(plan['report_seeds'])}",
        ),
    ]
    for part in ("E1", "E3"):
        grid = f"lr {listed(plan['lrs'][part])}; beta {listed(plan['betas'][part])}"
        rows.append((f"grid of {part}", grid))
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "transformers", "trl"))
    rows += [
        ("versions", f"{versions}, Python {made['python']}"),
        ("machine", f"CPU ({made['cpu']}), {made['cores']} cores, one thread per process"),
        (
            "made by",
            f"`{made['command']}` on {made['date'][:10]}, commit {str(made['commit'])[:12]}, {changed}",
        ),
    ]
    if len(report["sources"]) > 1:
        rows.append(("note", f"the runs are of {len(report['sources'])} versions of una_fast"))
    return table(("what", "value"), rows)


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def exact_table(report: Report) -> str:
    found = report["exact"]
    if not found:
        return NOT_RUN

    def row(what: str, value: float, limit: float) -> tuple[str, str, str, str]:
        return (
            what,
            f"{value:.1e}",
            f"{limit:.0e}",
            "holds" if value <= limit else "**does not hold**",
        )

    rows = [row("pair loss: gradient of DPO", found["pair_is_dpo"], 1e-10)]
    for offset, value in found["policy_gradient"].items():
        what = f"reward_mse on-policy: gradient -2 beta grad J, constant offset {float(offset):g}"
        rows.append(row(what, value, 1e-10))
    rows += [
        row(
            "reward_mse on samples: mean gradient over all draws, offset none and group",
            found["mean_gradient"],
            1e-10,
        ),
        row("binary bce: gradient of BCO with shift 0", found["bce_is_bco"], 1e-10),
        row(
            "score mse on scores 0 and 1: gradient of binary mse", found["scores_are_labels"], 1e-10
        ),
        row(
            "reward_mse: total variation of its end from the RLHF optimum",
            max(found["fixed_point_tv"]),
            1e-2,
        ),
    ]
    text = table(("claim", "largest difference", "allowed", "verdict"), rows)
    rows = []
    for place, own in found["variance"].items():
        ratios = [g / n for g, n in zip(own["group"], own["none"], strict=True)]
        rows.append(
            (place, f"{statistics.fmean(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
        )
    head = ("the policy is", "variance with group / with none, mean", "over policies")
    return f"{text}\n\nVariance of the gradient on one draw of four answers:\n\n{table(head, rows)}"


def frontier_table(report: Report, part: str) -> str:
    lines, bins = frontiers(report, part), bins_of(report, part)
    if not any(lines.values()):
        return NOT_RUN

    def cell(line: Line, b: stats.Bin) -> str:
        if b not in line:
            return "-"
        points = line[b].values()
        gold, kl = stats.interval([p.gold for p in points]), statistics.fmean(p.kl for p in points)
        return f"{band(gold)} @ {kl:.2f}"

    rows = [(LABELS[name], *(cell(line, b) for b in bins)) for name, line in lines.items()]
    return table(("gold ± half of its 90 % interval @ mean KL", *map(bin_name, bins)), rows)


def comparison_table(report: Report, part: str) -> str:
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
        rows.append((names, *(cell(b) for b in bins)))
    return table(("difference in gold", *map(bin_name, bins)), rows)


def chosen_table(report: Report, part: str) -> str:
    bins = bins_of(report, part)
    rows = []
    for name in LABELS:
        runs = [run for run in runs_of(report, part) if run["method"] == name]
        chosen = stats.select(runs, bins) if runs else {}
        if chosen:
            cells = (
                f"{c.lr:g}, {c.beta:g}, {c.step}" if (c := chosen.get(b)) else "-" for b in bins
            )
            rows.append((LABELS[name], *cells))
    return table(("lr, beta, step", *map(bin_name, bins)), rows) if rows else NOT_RUN


def means_table(report: Report) -> str:
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
            rows.append(
                (f"{mean:g}", f"{beta:g}", state(own["una_score"]), state(own["una_centred"]), word)
            )
    head = (
        "mean score",
        "beta",
        "as they are: gold @ KL",
        "centred: gold @ KL",
        "difference in gold",
    )
    return table(head, rows)


def cost_table(report: Report) -> str:
    runs = timed(report)
    if not runs:
        return NOT_RUN
    rows = []
    for name, own in runs.items():
        parts = [run["parts"] for run in own if run.get("parts")]
        split = (
            ", ".join(f"{key} {statistics.median(p[key] for p in parts):.2f}" for key in parts[0])
            if parts
            else "-"
        )
        spread = f"{min(r['seconds'] for r in own):.2f} to {max(r['seconds'] for r in own):.2f}"
        ratios = (
            f"{seconds(own) / seconds(runs[ppo]):.2f}" if ppo in runs else "-"
            for ppo in TIME_LIMITS
        )
        state = sum(own[0]["bytes"].values())
        against = (
            f"{state / sum(runs['ppo_1'][0]['bytes'].values()):.2f}" if "ppo_1" in runs else "-"
        )
        rows.append(
            (
                LABELS[name],
                f"{seconds(own):.2f}",
                spread,
                split,
                *ratios,
                f"{state / 1e6:.2f}",
                against,
            )
        )
    head = ("method", "s", "range", "of it", "/ PPO 1", "/ PPO 4", "train state, MB", "/ PPO")
    return table(head, rows)


def cost_verdicts(report: Report) -> list[tuple[str, str, str]]:
    """(claim, found, verdict) of time and memory."""
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
        before = statistics.median(run["parts"]["before"] for run in runs[name])
        what = (
            f"the same, PPO without the pass before its epochs ({before / theirs:.0%} of its time)"
        )
        rows.append(judged(what, ours / (theirs - before), limit))
    if "ppo_1" in runs:
        state = [sum(runs[name][0]["bytes"].values()) for name in ("una_group", "ppo_1")]
        rows.append(judged("train state of online UNA / PPO", state[0] / state[1], STATE_LIMIT))
    return rows


def judged(what: str, ratio: float, limit: float) -> tuple[str, str, str]:
    return f"{what}: at most {limit:g}", f"{ratio:.2f}", "found" if ratio <= limit else "not found"


def decided_in(words: Sequence[str]) -> str:
    """In how many of the bins anything was decided, where it is not all or none."""
    decided = len(words) - words.count("inconclusive")
    return "" if decided in (0, len(words)) else f" (in {decided} of {len(words)} bins)"


def claims_table(report: Report) -> str:
    rows = []
    for part, comparisons in COMPARISONS.items():
        lines = frontiers(report, part)
        for comparison in comparisons:
            if comparison.claim is None:
                continue
            cells = compare(lines, comparison)
            if not cells:
                why = (
                    "no bin in common"
                    if lines.keys() >= {comparison.ours, comparison.theirs}
                    else "not run"
                )
                rows.append((comparison.claim, why, why, "-"))
                continue
            words = [c.word for c in cells.values()], [c.corrected_word for c in cells.values()]
            counts = ", ".join(f"{words[0].count(w)} {w}" for w in dict.fromkeys(words[0]))
            raw, corrected = (
                f"{outcome(comparison, stats.overall(w))}{decided_in(w)}" for w in words
            )
            rows.append((comparison.claim, f"**{raw}**", corrected, counts))
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
    """The text of docs/STUDY.md; every section reads "Not run." where there are no results."""
    text = (HERE / "template.md").read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        return SECTIONS[match[1]](report) if report else NOT_RUN

    text = re.sub(r"\{\{(\w+)\}\}", fill, text)
    return re.sub(r"\n{3,}", "\n\n", text)


# -------------------------------------------------------------------------------------------------------------- plots


def plotted(report: Report) -> dict[str, bool]:
    """Which plots the results give."""
    drawn = {part: any(frontiers(report, part).values()) for part in COMPARISONS}
    return {**drawn, "cost": bool(timed(report))}


def image(report: Report, name: str) -> str:
    return f"![{name}](../bench/results/study_{name.lower()}.png)" if plotted(report)[name] else ""


def draw(report: Report, folder: Path) -> None:
    """The PNG files of the results, into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.savefig(folder / f"study_{name.lower()}.png", dpi=130, metadata={"Software": None})
        plt.close(figure)

    wanted = plotted(report)
    for part in COMPARISONS:
        if not wanted[part]:
            continue
        figure, axes = plt.subplots(figsize=(7.2, 4.8), layout="constrained")
        for k, (name, line) in enumerate(frontiers(report, part).items()):
            if not line:
                continue
            golds = [stats.interval([p.gold for p in points.values()]) for points in line.values()]
            kls = [statistics.fmean(p.kl for p in points.values()) for points in line.values()]
            style = {"color": f"C{k}", "linestyle": "-" if name.startswith("una") else "--"}
            axes.plot(
                kls, [g.mean for g in golds], marker="o", markersize=4, label=LABELS[name], **style
            )
            if golds[0].count > 1:
                axes.fill_between(
                    kls, [g.low for g in golds], [g.high for g in golds], color=f"C{k}", alpha=0.13
                )
        axes.plot(0, report["base"]["gold"], "k*", label="base model")
        axes.set_xlabel("KL to the base model, nats per answer")
        axes.set_ylabel("gold reward, held-out prompts")
        seeds = len(report["plan"]["report_seeds"])
        axes.set_title(
            f"{part}: best settings per KL bin, {seeds} reporting seeds, 90 % intervals",
            fontsize=10,
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        save(figure, part)
    if wanted["cost"]:
        runs = timed(report)
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(9.6, 3.6), layout="constrained", sharey=True
        )
        names = list(runs)[::-1]
        labels = [LABELS[name] for name in names]
        for key, color in (("generate", "C0"), ("reward", "C2"), ("before", "C1"), ("train", "C3")):
            start = [0.0] * len(names)
            for k, name in enumerate(names):
                parts = [run.get("parts") or {} for run in runs[name]]
                order = list(parts[0])
                mean = {p: statistics.median(part[p] for part in parts) for p in order}
                start[k] = sum(mean[p] for p in order[: order.index(key)]) if key in order else 0.0
                left.barh(
                    labels[k],
                    mean.get(key, 0.0),
                    left=start[k],
                    color=color,
                    label=key if not k else None,
                )
        for name, label in zip(names, labels, strict=True):
            if not runs[name][0].get("parts"):
                left.barh(label, seconds(runs[name]), color="0.6")
        left.set_xlabel("seconds of a run (grey: not told apart)")
        handles, keys = left.get_legend_handles_labels()
        left.legend(handles, keys, fontsize=8)
        for key, color in (
            ("weights", "C0"),
            ("gradients", "C1"),
            ("optimizer", "C2"),
            ("frozen", "0.6"),
        ):
            parts = [runs[name][0]["bytes"] for name in names]
            order = list(parts[0])
            start = [sum(part[p] for p in order[: order.index(key)]) / 1e6 for part in parts]
            right.barh(
                labels, [part[key] / 1e6 for part in parts], left=start, color=color, label=key
            )
        right.set_xlabel("train state, MB")
        right.legend(fontsize=8)
        save(figure, "cost")


def read(path: Path) -> Report | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(results: Path, to: Path) -> None:
    report = read(results)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page(report), encoding="utf-8")
    if report:
        draw(report, results.parent)


def main() -> int:
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
