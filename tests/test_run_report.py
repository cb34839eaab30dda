"""The page of a run: what it shows, what it passes over, and that texts of a run stay texts."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tiny import make_config, make_records, write_jsonl
from una_fast.cli import main
from una_fast.report.charts import MOST_POINTS, draw, line_of
from una_fast.report.metric_table import METRICS, table_name
from una_fast.report.page import page_of
from una_fast.report.run_files import SAMPLES, read_runs
from una_fast.report.settings import MOST_RUNS
from una_fast.train.loop import train

ROOT = Path(__file__).resolve().parents[1]
LENGTH = f"{ROOT / 'tests' / 'reward_functions.py'}:length"
SCRIPT = "<script>document.title = 'bad'</script>"
HOSTILE = f"</script>{SCRIPT}<img src=x onerror=alert(1)>\x1b[2J\u202e"

VOID = {"meta", "wbr", "img", "br", "link", "input"}


class Page(HTMLParser):
    """The elements and texts of a page; asserts that every element is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append(" ")

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} is closed out of its place"
        self.texts.append(" ")

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.found if tag == name]

    def drawings(self) -> list[str]:
        """Return what the charts show, in words."""
        return [attrs["aria-label"] for attrs in self.tags("svg") if "aria-label" in attrs]


def metrics_of(steps: Iterable[int]) -> list[dict[str, float]]:
    return [
        {
            "step": step,
            "loss": 0.7 / step,
            "rewards/accuracies": 0.5,
            "kl": 0.1 * step,
            "reward": 0.2,
            "tokens": 100.0,
            "tok_per_sec": 50.0,
            "memory/peak_gib": 1.5,
        }
        for step in steps
    ]


def sample(step: int, text: str = "an answer", **more: Any) -> dict[str, Any]:
    return {"step": step, "prompt": "why?", "completion": text, "reward": 0.25 * step, **more}


@pytest.fixture
def make_run(tmp_path):
    """Write the files of a run; returns the directory."""

    def make(name="run", metrics=None, samples=(), config=None, **files):
        directory = tmp_path / name
        directory.mkdir(parents=True)
        write_jsonl(directory / "metrics.jsonl", metrics or metrics_of(range(1, 6)))
        if samples:
            write_jsonl(directory / "completions.jsonl", samples)
        if config is not None:
            (directory / "config.yaml").write_text(yaml.safe_dump(config))
        for stem, value in files.items():
            (directory / f"{stem}.json").write_text(json.dumps(value))
        return directory

    return make


def page(*directories: Path) -> Page:
    return Page(page_of(read_runs(directories)))


# --- what the page shows ---


def test_a_run_is_shown_whole(make_run, capsys):
    compared = {
        "title": "Before and after",
        "columns": ["before", "after"],
        "rows": [{"name": "Answers that end", "values": [None, 0.75], "note": "of 36"}],
        "texts": [{"prompt": "what?", "reference": "that", "answers": ["much", "little"]}],
    }
    source = {"path": "a.jsonl", "records": 9, "examples": 8, "units": {"pair": 8}, "skipped": 1}
    run = make_run(
        samples=[sample(step) for step in range(1, 6)],
        config={
            "model": "org/small",
            "mode": "online",
            "beta": 0.5,
            "lora": {"r": 4},
            "data": ["a"],
        },
        comparison=compared,
        data=[source, source],
        resolved={"compute": "float32", "workspace": 2**28, "sources": {"dtypes": "default"}},
        plan={"batch": "9 tokens", "peak": 2**30, "room": 2**31, "parts": {"weights": 2**30}},
    )
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{run / 'report.html'}\n" and not said.err
    shown = Page((run / "report.html").read_text(encoding="utf-8"))
    for text in (
        "aligned small",
        "beta 0.5; LoRA of rank 4",
        "9 records, 8 used (8 pair)",
        "5, 500 tokens",
        "10 s",
        "loss 0.14 from 0.7",
        "Answers that end of 36 – 0.75",
        "what? before much after little Reference that",
        "Step 1 why? 0.25 an answer",
        "Step 3 why? 0.75 an answer",
        "Step 5 why? 1.25 an answer",
        "8 pair 1 skipped",
        "8 pair for evaluation; 1 skipped",
        "compute float32 default",
        "Peak 1.00 GiB of 2.00 GiB that may be filled: it fits",
        "lora.r 4",
    ):
        assert text in shown.text, text
    assert "Step 2" not in shown.text
    drawings = shown.drawings()
    assert "Loss: loss from 0.7 to 0.14" in drawings and "KL: kl from 0.1 to 0.5" in drawings
    assert any(words.startswith("Reward against KL") for words in drawings)
    assert "The dashed line is the planned peak, 1 GiB" in shown.text


def test_every_chart_has_tooltips_and_colours_of_the_page(make_run):
    html = page_of(read_runs([make_run()]))
    assert "<title>loss: 0.14 at step 5</title>" in html
    assert "var(--s1)" in html and "#fe00" not in html and "DejaVu" not in html


def test_several_runs_share_charts_and_show_what_differs(make_run, tmp_path, capsys):
    runs = [
        make_run(f"{part}/out", config={"model": "m", "beta": beta, "output_dir": part})
        for part, beta in (("a", 0.1), ("b", 0.2))
    ]
    out = tmp_path / "both.html"
    assert main(["report", str(runs[0]), "--out", str(out), str(runs[1])]) == 0
    shown = Page(out.read_text(encoding="utf-8"))
    assert shown.text.startswith("a/out · b/out"), "equal names are told apart"
    assert "Loss: loss, a/out from 0.7 to 0.14; loss, b/out from 0.7 to 0.14" in shown.drawings()
    differing = shown.text.split("Settings that differ")[1].split("Settings ·")[0]
    assert differing.split() == ["a/out", "b/out", "beta", "0.1", "0.2"]
    assert "0.7 → 0.14 0.7 → 0.14" in shown.text
    assert "equal settings" in page(runs[0], runs[0]).text
    html = page_of(read_runs([runs[0]] * MOST_RUNS))
    for number in range(1, MOST_RUNS + 1):
        assert f"--s{number}:" in html and f'stroke k{number}"' in html
    assert main(["report", *map(str, runs * MOST_RUNS)]) == 1
    assert f"a page shows at most {MOST_RUNS}" in capsys.readouterr().err


def test_a_mean_log_ratio_of_older_runs_is_no_kl(make_run):
    offline = page(make_run("offline", config={"mode": "offline"}))
    assert any(words.startswith("Log-ratio: log_ratio") for words in offline.drawings())
    assert not any(words.startswith("KL") for words in offline.drawings())


# --- texts of others ---


def test_texts_of_a_run_stay_texts(make_run):
    turns = [{"role": HOSTILE, "content": HOSTILE}]
    run = make_run(
        "<b>bold</b>",
        metrics=[{"step": 1, "loss": 0.5, f"rewards/{HOSTILE}/mean": 1.0}],
        samples=[sample(1, HOSTILE), sample(1, HOSTILE, prompt=turns, rewards={HOSTILE: 1.0})],
        config={"model": HOSTILE, HOSTILE: HOSTILE, "url": "https://me:secret@h/?key=SECRET"},
        comparison={
            "title": HOSTILE,
            "columns": [HOSTILE],
            "rows": [{"name": HOSTILE, "values": [HOSTILE], "note": HOSTILE}],
            "texts": [{"prompt": HOSTILE, "reference": HOSTILE, "answers": [HOSTILE]}],
        },
        data=[{"path": HOSTILE, "skipped": 1, "skip_messages": [HOSTILE], "units": {HOSTILE: 1}}],
        resolved={HOSTILE: HOSTILE, "sources": {HOSTILE: HOSTILE}, "notes": [HOSTILE]},
        plan={"batch": HOSTILE, "peak": HOSTILE, "parts": {HOSTILE: 1}},
    )
    html = page_of(read_runs([run, run]))
    shown = Page(html)
    for name in ("script", "img", "b", "iframe", "object", "link", "a"):
        assert not shown.tags(name)
    assert shown.text.count(SCRIPT) > 10
    assert "\x1b" not in html and "\u202e" not in html and "\\x1b[2J\\u202e" in html
    assert "secret" not in html and "SECRET" not in html


def test_the_page_loads_nothing(make_run):
    html = page_of(read_runs([make_run(samples=[sample(1)])]))
    shown = Page(html)
    for tag, attrs in shown.found:
        assert not {"src", "srcset", "action", "data"} & set(attrs), tag
        assert all(value.startswith("#") for name, value in attrs.items() if "href" in name)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"url\((?!#)|@import", html)
    (policy,) = [attrs for attrs in shown.tags("meta") if "http-equiv" in attrs]
    assert policy["content"].startswith("default-src 'none'")


# --- runs that are not whole, or large ---


def test_a_half_written_last_line_is_passed_over_and_others_are_told(make_run):
    run = make_run(samples=[sample(1), sample(2)])
    for name in ("metrics.jsonl", "completions.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 6, "lo')
    shown = page(run)
    assert "Steps 5," in shown.text and "cannot be read" not in shown.text
    assert "Step 1" in shown.text and "Step 6" not in shown.text
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(["[]", "\x00", *lines]))
    (run / "data.json").write_text("[damaged")
    (run / "resolved.json").write_text("[]")
    shown = page(run)
    assert "metrics.jsonl: 2 lines cannot be read" in shown.text
    assert "data.json cannot be read" in shown.text and "resolved.json is left out" in shown.text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_told(make_run, bad):
    metrics = metrics_of(range(1, 6))
    metrics[2]["loss"] = bad
    metrics[1]["grad_norm"] = metrics[1]["reward"] = 1e308
    metrics[4] = {"step": 5} | dict.fromkeys(metrics[4].keys() - {"step"}, bad)
    shown = page(make_run(metrics=metrics))
    assert "loss: 2 values are not finite, the first at step 3." in shown.text
    assert "Loss: loss from 0.7 to 0.175" in shown.drawings()


def test_runs_of_one_step_and_of_none(make_run):
    one = page(make_run("one", metrics=metrics_of([1])))
    assert "at step 1 alone" in one.text and "Loss: loss from 0.7 to 0.7" in one.drawings()
    none = make_run("none")
    (none / "metrics.jsonl").write_text("")
    assert "No metric is written yet" in page(none).text


@pytest.mark.parametrize(
    ("steps", "ticks"), [([2], "2"), ([1, 3], "1 2 3"), ([0, 100_000], "0 25k 50k 75k 100k")]
)
def test_steps_below_a_chart_are_whole_numbers(steps, ticks):
    svg = draw([line_of("loss", dict.fromkeys(steps, 0.5))], label="Loss")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert texts[: texts.index("step")] == ticks.split()


def test_evaluations_stand_in_the_charts_of_training(make_run):
    evaluations = [{"step": step, "eval_loss": 0.5, "eval_kl": 0.1} for step in (0, 5)]
    shown = page(make_run(metrics=[*metrics_of(range(1, 6)), *evaluations]))
    assert "Loss: loss from 0.7 to 0.14; eval_loss from 0.5 to 0.5" in shown.drawings()
    assert "eval_loss 0.5 from 0.5" in shown.text


def test_a_long_line_is_thinned_and_keeps_its_spikes():
    values = np.ones(100_001)
    values[777] = 50.0
    values[5000:7000] = np.nan
    line = line_of("loss", dict(enumerate(values.tolist())))
    assert len(line.y) == MOST_POINTS
    assert np.nanmax(line.high) == 50.0 and np.nanmin(line.low) == 1.0
    assert np.isnan(line.y).any() and line.x[-1] == 100_000


def test_a_page_of_a_long_run_with_long_samples_is_small(make_run):
    samples = [sample(step, "words " * 20_000) for step in (1, 1, 1, 2, 3)]
    samples += [sample(4)] * (SAMPLES + 5)
    run = make_run(metrics=metrics_of(range(1, 4001)), samples=samples)
    html = page_of(read_runs([run]))
    assert len(html.encode()) < 500_000
    shown = Page(html)
    assert "more characters)" in shown.text
    assert shown.text.count("1 an answer") == SAMPLES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "is no directory; give the output_dir of a run"),
        ("empty", "holds no metrics.jsonl; give the output_dir of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, capsys, name, message):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / name)]) == 1
    said = capsys.readouterr().err
    assert f"RUN {tmp_path / name} {message}" in said and said.count("\n") == 1


# --- train writes it ---


def test_train_writes_the_page_and_its_metrics_are_in_the_table(llamas, mixed, tmp_path):
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": r["prompt"]} for r in make_records("pairs", 4)]
    )
    usual = {"max_steps": 2, "batch_size": 4, "write_report": True}
    offline = make_config(llamas["untied"], mixed, tmp_path / "a", eval_data=mixed, **usual)
    online = {"mode": "online", "rewards": [LENGTH], "max_new_tokens": 4}
    online = make_config(llamas["untied"], prompts, tmp_path / "b", **usual, **online)
    for config in (offline, online):
        train(config)
        run = Path(config.output_dir)
        shown = Page((run / "report.html").read_text(encoding="utf-8"))
        assert len(shown.drawings()) > 5
        for line in (run / "metrics.jsonl").read_text().splitlines():
            unknown = [name for name in json.loads(line) if not table_name(name)]
            assert unknown == ["step"]


def test_a_page_that_cannot_be_written_ends_no_run(llamas, mixed, tmp_path, caplog):
    config = make_config(llamas["untied"], mixed, tmp_path / "run", max_steps=1, write_report=True)
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    assert train(config).steps == 1
    (record,) = [r for r in caplog.records if "the report of the run is not written" in r.message]
    assert "report.html" in record.message


def test_the_page_of_the_metrics_is_the_table():
    lines = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines()
    rows = [re.fullmatch(r"\| `(.+)` \| (.+) \|", line) for line in lines]
    assert dict(row.groups() for row in rows if row) == METRICS
    assert all(text.endswith(".") for text in METRICS.values())


# --- in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HEADLESS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --enable-logging=stderr
    --window-size=390,844 --dump-dom
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")
def test_a_browser_shows_the_page_without_a_message(make_run, tmp_path):
    run = make_run(samples=[sample(1, HOSTILE), sample(2)], config={"mode": "online"})
    html = page_of(read_runs([run]))

    def opened(name: str, text: str) -> tuple[Page, str]:
        """Return the page as the browser holds it, and the lines of its console."""
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        words = [CHROMIUM, *HEADLESS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Page(done.stdout), "\n".join(console)

    shown, console = opened("page.html", html)
    assert not console
    drawings = shown.drawings()
    assert "Loss: loss from 0.7 to 0.14" in drawings and "KL: kl from 0.1 to 0.5" in drawings
    assert "Step 2 why? 0.5 an answer" in shown.text and not shown.tags("script")
    assert shown.text.startswith("run "), "no script has set the title"
    # The same browser tells of what the page's own policy keeps out.
    planted = html.replace("<main>", "<main><script>1</script><img src='http://127.0.0.1:9/x'>")
    _, console = opened("planted.html", planted)
    assert console.count("Content Security Policy") >= 2
