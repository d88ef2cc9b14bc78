"""Pictures of measurements."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unroll.bench.contenders import FUSED
from unroll.bench.options import SWEPT
from unroll.bench.results import Measurements, Row, by_subject, ratio
from unroll.bench.subjects import Subject
from unroll.core.errors import Problem, UnrollError
from unroll.extras import require

AXES = {"steps": "time steps", "batch": "batch", "hidden_size": "hidden features"}


@dataclass(frozen=True)
class Picture:
    """A kind of picture: its file, the label at its side, and the figure of a row among those of its subject."""

    file: str
    label: str
    figure: Callable[[Row, Sequence[Row]], float | None]


PICTURES = (
    Picture("latency.png", "median of a call, ms", lambda row, rows: row.median and row.median * 1e3),
    Picture("build.png", "build and first call, s", lambda row, rows: row.first_call),
    Picture("ratio.png", "median, relative to the fused layer", ratio),
)


def draw(files: Sequence[str | os.PathLike[str]] | Measurements, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw latency, building time and the ratio to the fused layer as PNG files.

    Each shape of layer has a panel and each form a line. They run over the number of time steps; over the batch or
    the hidden size where only those were swept. Where nothing was, and for models of your own, forms have bars.

    Args:
        files: JSON files of `unroll bench --save`, or measurements.
        folder: where the pictures go; made if it is not there.

    Returns:
        The files that were written.

    Raises:
        UnrollError: if nothing can be read, drawn or written.
    """
    require("matplotlib", extra="bench")
    found = files if isinstance(files, Measurements) else Measurements.joined(map(Measurements.load, files))
    rows = found.rows
    if not any(row.median for row in rows):
        raise UnrollError(Problem("plots", "have nothing to show: no contender ran", "measure again"))
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_drawn(picture, rows, folder) for picture in PICTURES]
    except OSError as error:
        finding = f"cannot be written to ({error.strerror or error})"
        raise UnrollError(Problem(str(folder), finding, "choose a place where you may write")) from error


def axis_of(rows: Sequence[Row]) -> str:
    """Return the option that the pictures run over: the first of steps, batch and hidden size with several values."""
    for name in SWEPT:
        if len({getattr(row.subject, name) for row in rows}) > 1:
            return name
    return SWEPT[0]


def panels(rows: Sequence[Row], axis: str) -> dict[Subject, dict[str, list[tuple[float, Row]]]]:
    """Return for each subject without its axis the points of each form by name."""
    found: dict[Subject, dict[str, list[tuple[float, Row]]]] = {}
    for row in rows:
        if row.median:
            lines = found.setdefault(replace(row.subject, **{axis: None}), {})
            lines.setdefault(row.name, []).append((getattr(row.subject, axis) or 0, row))
    return found


def _drawn(picture: Picture, rows: Sequence[Row], folder: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axis, groups = axis_of(rows), by_subject(rows)
    found = panels(rows, axis)
    swept = len({getattr(row.subject, axis) for row in rows}) > 1
    # The fused layer comes first. A form has the same style in every panel, by its place among all names.
    names = sorted({name for lines in found.values() for name in lines}, key=lambda name: (name != FUSED, name))
    columns = min(2 if swept else 1, len(found))  # to be read where a page is 800 pixels wide
    lines_of_panels = -(-len(found) // columns)
    height = 3.2 * lines_of_panels + 0.1 * len(names) if swept else (0.3 * len(names) + 1.1) * lines_of_panels
    size = (4 * max(columns, 1.5) if swept else 8, height)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subplots(lines_of_panels, columns, squeeze=False).flatten()
    for part, (subject, lines) in zip(parts, found.items(), strict=False):
        shown: dict[str, list[tuple[float, float]]] = {}
        for name in (name for name in names if name in lines):
            points = [(x, picture.figure(row, groups[row.subject])) for x, row in lines[name]]
            shown[name] = sorted((x, y) for x, y in points if y is not None)
        shown = {name: points for name, points in shown.items() if points}
        styles = {name: _style(names.index(name)) for name in shown}
        if swept:
            _lines(part, shown, styles)
            part.set(xlabel=AXES[axis], ylabel=picture.label)
        else:
            _bars(part, {name: points[0][1] for name, points in shown.items()}, styles)
            part.set(xlabel=picture.label)
        part.set_title(str(subject if swept else next(iter(lines.values()))[0][1].subject), fontsize=8)
    for part in parts[len(found) :]:
        part.set_axis_off()
    # One legend for all panels, as a form may be absent from some.
    known = {label: handle for part in parts for handle, label in zip(*part.get_legend_handles_labels(), strict=True)}
    order = [name for name in names if name in known]
    if swept:
        figure.legend([known[name] for name in order], order, loc="outside lower center", ncols=2, fontsize=8)
    path = folder / picture.file
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _lines(part: Any, shown: Mapping[str, list[tuple[float, float]]], styles: Mapping[str, dict[str, Any]]) -> None:
    """Draw a line for each form over what was swept."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for name, points in shown.items():
        part.plot(*zip(*points, strict=True), **styles[name], label=name)
    part.set(xscale="log", yscale="log")
    ticks = sorted({x for points in shown.values() for x, _ in points})
    part.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    part.set_xticks([], minor=True)
    part.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    part.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    part.yaxis.set_minor_locator(NullLocator())
    part.grid(alpha=0.3)


def _bars(part: Any, values: Mapping[str, float], styles: Mapping[str, dict[str, Any]]) -> None:
    """Draw a bar for each form, with its figure, the first one on top."""
    names = list(values)
    bars = part.barh(
        names, [values[name] for name in names], color=[styles[name]["color"] for name in names], height=0.6
    )
    part.bar_label(bars, [f"{values[name]:.3g}" for name in names], padding=3, fontsize=8)
    part.margins(x=0.12)
    part.invert_yaxis()
    part.tick_params(axis="y", labelsize=8)
    part.grid(axis="x", alpha=0.3)


def _style(number: int) -> dict[str, Any]:
    """Return colour and marker of a form, the same in every panel; black for the fused layer, which comes first."""
    colours = ("black", *(f"C{k}" for k in range(10)))
    return {"color": colours[number % len(colours)], "marker": "osD^vP*Xh<>"[number % 11], "markersize": 4, "lw": 1.2}
