"""Write README's tables and plot from one stored set of runs, so that pages can't disagree: `make readme-numbers`.

    python scripts/readme_numbers.py                  README.md and docs/img/results.svg from benchmarks/results/readme
    python scripts/readme_numbers.py --check          exit code 1 where README.md says something else
    python scripts/readme_numbers.py --store ROOT     take finished runs below ROOT into the stored set first

README.md has `<!-- NAME -->` and `<!-- /NAME -->` around what is written here. A run in the set is a row with the
numbers that are shown and the marks of its tests; levels and peers are rows of their own benchmarks.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import levels
import plot_results

from gptq_awq.report import make_report, records
from gptq_awq.report.text import difference, number
from gptq_awq.results import Result, load

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "benchmarks" / "results" / "readme"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "img" / "results.svg"
PPL, KL, TOP1 = "wikitext2/ppl@2048", "wikitext2/kl", "wikitext2/top1_agreement"
KEPT = (PPL, f"{PPL}/delta", f"{PPL}/delta_ci95", KL, TOP1)
Key = tuple[str, str | None, float]
"""Method, grid and bits of a run."""
SHOWN_BITS = (16, 4, 3)
"""Bits that README's table has; the plot has all."""


def stored(name: str) -> Any:
    """Content of a file of the stored set."""
    return json.loads((STORED / name).read_text(encoding="utf-8"))


def results_table(found: Mapping[str, Any]) -> str:
    """The table of methods at 16, 4 and 3 bits."""
    rows = [run for run in found["runs"] if run["bits"] in SHOWN_BITS and KL in run["metrics"]]
    rows.sort(key=lambda run: (-run["bits"], run["metrics"][PPL]))
    return levels.table([_cells(run) for run in rows])


def _cells(run: Mapping[str, Any]) -> dict[str, str]:
    metrics = run["metrics"]
    marked = {name: _marked(number(metrics[name]), run["marks"].get(name)) for name in (PPL, KL, TOP1)}
    return {
        "method": run["method"] + ("" if run["grid"] in (None, "int") else f", {run['grid']}"),
        "bits": f"{run['bits']:g}",
        "bits/weight": number(run["bits_per_weight"]),
        "size": f"{run['size_mb']:.1f} MB",
        PPL: marked[PPL],
        f"Δ {PPL} [95%]": difference(metrics, PPL) or "0",
        KL: marked[KL],
        TOP1: marked[TOP1],
    }


def speed_line(found: Mapping[str, Any]) -> str:
    """A sentence with the seconds of GPTQ here and elsewhere."""
    seconds = dict(found["speed"]["seconds"])
    ours = seconds.pop("ours")
    others = ", ".join(f"{name} {value:g} s ({value / ours:.1f}×)" for name, value in seconds.items())
    return f"Speed of {found['speed']['what']}: {ours:g} s; {others}."


def protocol_line(found: Mapping[str, Any]) -> str:
    """A sentence with the model, the protocol and the dates of the runs."""
    dates = sorted({run["date"] for run in found["runs"]})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{found['model']}, {found['protocol']}. Runs of {span}."


def parts() -> dict[str, str]:
    """Text between README's marks, by their names."""
    found = stored("runs.json")
    return {
        "protocol": protocol_line(found),
        "results": results_table(found),
        "speed": speed_line(found),
        "levels": levels.table(stored("levels.json")),
    }


def written(text: str, made: Mapping[str, str]) -> str:
    """README's text with its marked parts written anew; raises ValueError for a part that it has no marks for."""
    for name, content in made.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda found, c=content: f"{found[1]}{c}\n{found[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md has no <!-- {name} --> … <!-- /{name} -->")
    return text


def draw() -> None:
    """Draw the plot of all stored runs, with peers' points."""
    found = stored("runs.json")
    runs = [{"act": None, "kv": None, **run} for run in found["runs"] if run["method"] != "fp"]
    lines = plot_results.points(runs, PPL)
    peers = [(peer["name"], peer["bits_per_weight"], peer[PPL]) for peer in found["peers"]]
    plot_results.save(plot_results.draw(lines, PPL, found["model"], peers), PICTURE)


def store(root: Path) -> None:
    """Put the finished runs below `root` into the stored set, in place of those of the same method, grid and bits."""
    report = make_report(records(load(root)))
    found = stored("runs.json")
    kept: dict[Key, dict[str, Any]] = {(run["method"], run["grid"], run["bits"]): run for run in found["runs"]}
    taken: set[Key] = set()
    for table in report.tables:
        for run in table.runs:
            verdicts = {name: report.verdicts.get((run["path"], name)) for name in (PPL, KL, TOP1)}
            marks = {n: "best" if v.best else "ties" for n, v in verdicts.items() if v and (v.best or v.ties)}
            metrics = {name: run["metrics"][name] for name in KEPT if name in run["metrics"]}
            key = (run["method"], grid_name(run), run["bits"])
            kept[key] = {
                "method": run["method"],
                "grid": key[1],
                "bits": run["bits"],
                "bits_per_weight": run["bits_per_weight"],
                "size_mb": run["size_bytes"] / 1e6,
                "metrics": metrics,
                "marks": marks,
                "date": run["manifest"]["provenance"]["date"][:10],
            }
            taken.add(key)
    keep_marks_of_the_best(kept, taken)
    write("runs.json", found | {"runs": list(kept.values())})
    write("levels.json", list(renewed_levels(root)))


def grid_name(run: Mapping[str, Any]) -> str | None:
    """Name of a run's grid: `mixed` where bits and group sizes were both allocated, as configs/grid calls it."""
    both = run["grid"] == "allocated" and run["config"]["grid"].get("group_sizes")
    return "mixed" if both else run["grid"]


def keep_marks_of_the_best(runs: Mapping[Key, dict[str, Any]], taken: Set[Key]) -> None:
    """Mark the best of every size, and drop marks of runs that weren't tested beside it: taken just now, or before."""
    for bits in {run["bits"] for run in runs.values()}:
        of_size = {key: run for key, run in runs.items() if run["bits"] == bits}
        for name, sign in ((PPL, 1), (KL, 1), (TOP1, -1)):
            known = [key for key, run in of_size.items() if name in run["metrics"]]
            best = min(known, key=lambda key: sign * of_size[key]["metrics"][name], default=None)
            for key in known:
                if (key in taken) != (best in taken):
                    of_size[key]["marks"].pop(name, None)
            if len(known) > 1:
                of_size[best]["marks"][name] = "best"  # pyright: ignore[reportArgumentType]


def renewed_levels(root: Path) -> Iterator[Mapping[str, str]]:
    """The rows of levels.py: of its runs below `root`, or else as they are stored."""
    known = {level["name"]: level for level in stored("levels.json")}
    for row in levels.ROWS:
        results = row.folder(root) / "results.json"
        if results.is_file():
            yield levels.level(row, Result.read(results))
        elif row.name in known:
            yield known[row.name]


def write(name: str, content: Any) -> None:
    """Write a file of the stored set."""
    (STORED / name).write_text(f"{json.dumps(content, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def _marked(text: str, mark: str | None) -> str:
    return f"**{text}**" if mark == "best" else f"{text} ≈" if mark == "ties" else text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, or 1 where --check finds other numbers."""
    parser = argparse.ArgumentParser(description="README's tables and plot, from one stored set of runs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where README.md differs")
    parser.add_argument("--store", type=Path, metavar="ROOT", help="take finished runs below ROOT into the set first")
    options = parser.parse_args(argv)
    if options.store is not None:
        store(options.store)
    before = README.read_text(encoding="utf-8")
    after = written(before, parts())
    if options.check:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
