"""`python -m bench publish`: measure all that docs/benchmarks.md tells, and write it, with its plots, anew."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from bench import curves, host, paging, report, scale, serving
from bench.curves import Curve
from bench.errors import BenchError
from bench.options import Found, Options

_DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
_PLOTS: Final = "benchmarks"
_SECTIONS: Final[Mapping[str, tuple[str, Callable[[Options], Found]]]] = {
    "serving": ("Serving from RAM", serving.run),
    "paging": ("More data than RAM", paging.run),
    "scale": ("Size and number", scale.run),
}
_INTRODUCTION: Final = """\
# Benchmarks

Written by `make report`, which runs what is in a table side by side, in interleaved rounds, and takes
medians. Ratios compare rounds of the same run: they tell more than the figures themselves, which are of
the machine that each section begins with.

"""


def run(options: Options) -> Found:
    """Measure and write; sections that do not match `only` are kept as they are."""
    if not find_spec("matplotlib"):
        raise BenchError("plots take matplotlib: pip install 'nbdram[bench]', or use make report")
    path = _DOCS / "benchmarks.md"
    kept = _parts(path.read_text()) if path.exists() else {}
    everything = replace(options, only="")
    texts: dict[str, str] = {}
    found: dict[str, object] = {}
    facts = report.heading(host.facts([serving.OURS, *options.peers]))
    for name, (title, section) in _SECTIONS.items():
        if re.search(options.only, name, re.IGNORECASE):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                found[name] = section(everything)
            texts[title] = f"\n```\n{facts}\n\n{printed.getvalue().strip()}\n```\n"
        elif title in kept:
            texts[title] = kept[title]
    if re.search(options.only, "curves", re.IGNORECASE):
        drawn = curves.curves(everything)
        texts["Curves"] = f"\n```\n{facts}\n```\n" + "".join(_section(curve) for curve in drawn)
    elif "Curves" in kept:
        texts["Curves"] = kept["Curves"]
    parts = [f"## {title}\n{text}" for title, text in texts.items()]
    path.write_text(_INTRODUCTION + "\n".join(parts))
    print(f"wrote {path}")
    return found


def _parts(text: str) -> dict[str, str]:
    """The sections of a page that was written before, by title."""
    pieces = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], (piece.rstrip("\n") + "\n" for piece in pieces[2::2]), strict=True))


def _section(curve: Curve) -> str:
    draw(curve, _DOCS / _PLOTS / f"{curve.name}.svg")
    return f"\n![{curve.title}]({_PLOTS}/{curve.name}.svg)\n\n```\n{curve.table()}\n```\n"


def draw(curve: Curve, path: Path) -> None:
    """One plot, as SVG with its text as text."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "nbdram", "font.size": 9})
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in curve.y.items():
        dashes = "--" if name.endswith("p99") else "-"
        axes.plot(curve.x, values, dashes, marker="o", markersize=3, linewidth=1.2, label=name)
    if curve.is_logarithmic:
        axes.set_xscale("log", base=2)
        axes.set_xticks(curve.x, [f"{x:g}" for x in curve.x])
    if curve.y_label == "us":
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=curve.x_label, ylabel=curve.y_label, title=curve.title)
    axes.grid(visible=True, alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
