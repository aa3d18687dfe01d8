"""report.html of SFT, a reward or a cost model: the curves of its journal, and the answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncflow.observe.charts import ChartLine
from asyncflow.observe.curves import Row, points_of
from asyncflow.observe.journal import read_lines, replace_file
from asyncflow.observe.markup import Markup, tag
from asyncflow.observe.page import figure, page, section

_CHARTS = {  # name in the journal -> title and note
    "loss": ("Loss", "of each step's batch"),
    "heldout_loss": ("Held-out loss", "mean negative log-likelihood of a response token, nats"),
    "heldout_pair_accuracy": ("Held-out pair accuracy", "share of pairs in the right order"),
    "heldout_sign_accuracy": ("Held-out sign accuracy", "share of responses whose cost has the right sign"),
    "gradient_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "of each optimizer step"),
}
_ANSWERS = ("prompt", "demonstrated", "before", "after")


def write_training_report(folder: Path, what: str) -> Path:
    """Write `folder`/report.html from the journal and the samples of a training, and return its path."""
    page = training_page(what, read_lines(folder / "metrics.jsonl"), read_lines(folder / "samples.jsonl"))
    return replace_file(folder / "report.html", page.encode())


def training_page(what: str, steps: Sequence[Row], samples: Sequence[Row]) -> Markup:
    """The page, from the lines of the journal and the sampled answers."""
    lines = {name: ChartLine(title, points_of(steps, name)) for name, (title, _) in _CHARTS.items()}
    charts = [figure(title, note, [lines[name]]) for name, (title, note) in _CHARTS.items()]
    main = [tag("h1", what), section("Learning", tag("div", *charts, class_="figures"))]
    if samples:
        rows = [tag("tr", *(tag("td", str(row[name])) for name in _ANSWERS)) for row in samples]
        header = tag("tr", *(tag("th", name) for name in _ANSWERS))
        main.append(section("Answers", tag("table", header, *rows)))
    return page(f"{what}: training report", main)
