"""How good and how various networks are with other settings of refining: a table of reports.

    python benchmarks/refining.py configs/digits.yaml refine.variety=0 refine.variety=0.95,refine.states=16

Each argument after the preset is one row: changes of the preset, with commas between. All rows have one
collection and one fitted generator, unless a change is of these. Networks are for the validation tasks, and
measured on validation data, by which settings may be chosen.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from rpg.storage.files import read_json

ROOT = Path(__file__).parents[1]


def report_of(preset: Path, output: Path, changes: list[str], shared: list[str]) -> dict[str, Any]:
    """The report of a run with these changes of the preset."""
    command = [sys.executable, "-m", "ray_jobs.pipeline", str(preset), *shared, *changes]
    subprocess.run([*command, "generate.split=validation", f"output={output}"], cwd=ROOT, check=True)
    report: dict[str, Any] = read_json(output / "report.json", "a report")
    return report


def row(name: str, report: dict[str, Any], seconds: float) -> str:
    """One line of the table."""
    score, similar = report["score"], report["similarity"]["unseen"]
    gains = report["ensembles"] or {}
    values = [
        f"{score['originals']['mean']:.4f}",
        f"{score['generated_unseen']['mean']:.4f}",
        f"{score['generated_unseen']['min']:.4f}",
        f"{similar['original_original']:.2f}",
        f"{similar['generated_generated']:.2f}",
        *(f"{gains[kind]['gain']:.4f}" if gains else "" for kind in ("originals", "generated")),
        f"{seconds:.0f}",
    ]
    return f"| {name} | " + " | ".join(values) + " |"


def main() -> None:
    """Run every row, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", type=Path)
    parser.add_argument("rows", nargs="+", metavar="key=value,…")
    parser.add_argument("--output", type=Path, default=Path("runs/refining"))
    parser.add_argument("--shared", nargs="*", default=[], metavar="key=value", help="changes of all rows")
    given = parser.parse_args()
    output = given.output.absolute()
    rows = []
    for name in given.rows:
        report = report_of(given.preset.absolute(), output, name.split(","), given.shared)
        rows.append(row(name, report, report["timing_seconds"]["refine"]))
    heads = ["settings", "originals", "generated", "least", "similarity, originals", "generated"]
    heads += ["gain, originals", "generated", "seconds"]
    print("| " + " | ".join(heads) + " |")
    print("| --- |" + " ---: |" * (len(heads) - 1))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
