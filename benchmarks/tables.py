"""A bench.json as a table in Markdown, for docs/performance.md.

    python benchmarks/tables.py results/bench/methods.json [--vary blocks]

One line per method, or with --vary one line per method and size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLUMNS = {
    "s": ("seconds_per_step", 3),
    "/ forward": ("ratio_to_forward", 2),
    "/ `bp`": ("ratio_to_bp", 2),
    "temporary MiB": ("temp_mib", 1),
    "peak MiB": ("peak_mib", 0),
    "GFLOP": ("gflop", 1),
    "by hand": ("gflop_by_hand", 1),
    "compile s": ("compile_seconds", 1),
}


def table(rows: list[dict], vary: list[str]) -> str:
    columns = {name: key for name, key in COLUMNS.items() if any(row[key[0]] is not None for row in rows)}
    head = ["method", *vary, *columns, "microbatch", "executor"]
    lines = ["| " + " | ".join(head) + " |", "|---" * (1 + len(vary)) + "|---:" * len(columns) + "|---:|---|"]
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.{digits}f}" for key, digits in columns.values()]
        cells = [f"`{row['method']}`", *(str(row[name]) for name in vary), *numbers]
        lines.append("| " + " | ".join([*cells, str(row["microbatch"] or "all"), row["executor"]]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--vary", nargs="*", default=[])
    arguments = parser.parse_args()
    print(table(json.loads(arguments.file.read_text()), arguments.vary))


if __name__ == "__main__":
    main()
