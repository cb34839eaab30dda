"""Regenerate the tables of README.md from the results in bench/results/.

python bench/tables.py            # write them
python bench/tables.py --check    # exit status 1 if README.md does not match the results
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def head_table(result: Path) -> str:
    """The CPU comparison of bench_head.py."""
    report = json.loads(result.read_text(encoding="utf-8"))
    where = report["environment"]
    lines = [
        "| rows, hidden, vocabulary | | seconds | × bare GEMMs | head passes | extra memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for entry in report["results"]:
        for k, row in enumerate(entry["table"]):
            shape = f"{row['rows']}, {row['dim']}, {row['vocab']}" if k == 0 else ""
            extra = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
            name = f"**{row['name']}**" if row["name"] == "una_fast" else row["name"]
            cells = (shape, name, f"{row['seconds']:.2f}", f"{row['times bare mm']:.2f}", f"{row['passes']:.0f}", extra)
            lines.append(f"| {' | '.join(cells)} |")
    return (
        f"One pair, policy + reference, forward + backward, fp32 on {where['threads']} CPU threads (torch "
        f"{where['torch']}, TRL {where['trl']}; the minimum of alternating "
        "runs; TRL in tiles of 32768 vocabulary entries, as its trainers call it; "
        f"`{result.relative_to(ROOT)}`, made by `{where['command']}`):\n\n" + "\n".join(lines)
    )


TABLES = {"head": lambda: head_table(ROOT / "bench/results/head_cpu.json")}


def regenerate(text: str) -> str:
    for name, make in TABLES.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- end bench:{name} -->"
        assert begin in text and end in text, f"README.md has no {begin} ... {end}"
        body = f"{begin}\n\n{make()}\n\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, body=body: body, text, flags=re.DOTALL)
    return text


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = regenerate(text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
