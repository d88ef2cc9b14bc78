"""Draws the steps of unrolled layers as SVG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unroll.core.errors import Problem, UnrollError
from unroll.core.options import Where
from unroll.core.plan import Plan, Preset
from unroll.core.signatures import told
from unroll.drawing.subjects import Subject, read_subjects
from unroll.drawing.turns import Step, stacked, steps_of
from unroll.extras import require

FIRST, LAST = 6, 5
"""Steps of a long sequence that are drawn, at its beginning and at its end"""

WIDTH, HEIGHT, PITCH, RISE = 1.0, 0.74, 1.36, 1.12
"""Of a box, and from one box to the next, in inches"""

LEFT, ABOVE, BELOW = 1.3, 0.9, 0.75
"""Room around the boxes of a layer, in inches"""

SIGMOID, CANDIDATE, PRODUCT, INK, FRAME = "#4c78a8", "#e07b39", "#6b7280", "#1f2937", "#b3261e"

LETTERS = {"cell": "g", "update": "z"}
"""Gates that are not known by their first letter"""

DRAWING: Any = {"svg.fonttype": "path", "svg.hashsalt": "unroll", "font.family": "DejaVu Sans"}


@told
def draw(
    model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    plan: Plan | Preset | None = None,
    where: Where = None,
    steps: int | None = None,
) -> str:
    """Draw the steps that unrolling makes of a model's recurrent layers, as SVG.

    Time goes from left to right; layers and directions are rows. A box is a step, with its gates (blue under a sigmoid,
    orange under another activation) and a bar for each product with the state, as long as the gates that share it. The
    number in a box, and its colour, is the turn in which it runs: steps of one number do not wait for each other, and
    those with a thick border are one batched product. A frame holds the steps of a block, and what a loop runs again is
    pale.

    Args:
        model: an `nn.Module`, unrolled or not; or an ONNX model with recurrent nodes: an `onnx.ModelProto`, an
            `onnx_ir.Model`, or the path of a file.
        path: where the picture goes; None to write no file.
        plan: as for `unroll`; layers that are unrolled are drawn with the plan that they have.
        where: which layers, as for `unroll`.
        steps: the number of time steps, where the model leaves them open; three if nothing is said. Of more than
            twelve the first and the last are drawn.

    Returns:
        The text of the SVG file.

    Raises:
        UnrollError: for a model without recurrent layers, a plan for layers that have one, steps other than those
            of a file, or a path that cannot be written.

    Example:
        >>> model = nn.Sequential(nn.LSTM(3, 5, num_layers=2))
        >>> picture = draw(model, plan="layers=wavefront", steps=4)
        >>> picture.rstrip().endswith("</svg>")
        True
    """
    require("matplotlib", extra="bench")
    import matplotlib as mpl

    subjects = read_subjects(model, where, None if plan is None else Plan.of(plan), steps)
    with mpl.rc_context(DRAWING):
        text = _svg(subjects)
    if path is not None:
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            finding = f"cannot be written ({error.strerror or error})"
            raise UnrollError(Problem(os.fspath(path), finding, "choose a place where you may write")) from error
    return text


def _svg(subjects: Sequence[Subject]) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width = max(LEFT + PITCH * (1 + max(_columns(subject.steps).values())) for subject in subjects) + 0.2
    heights = [ABOVE + RISE * subject.recurrence.passes + BELOW for subject in subjects]
    figure = Figure(figsize=(max(width, 5.6), sum(heights)), facecolor="white")
    FigureCanvasSVG(figure)
    top = sum(heights)
    for subject, height in zip(subjects, heights, strict=True):
        top -= height
        panel = figure.add_axes((0, top / sum(heights), 1, height / sum(heights)))
        panel.set(xlim=(0, figure.get_figwidth()), ylim=(0, height))
        panel.set_axis_off()
        _draw_layer(panel, subject, height)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": "unroll"})
    return file.getvalue()


def _columns(steps: int) -> dict[int, int]:
    """Return the column of each step that is drawn; a long sequence has an empty one after its first steps."""
    if steps <= FIRST + LAST + 1:
        return {time: time for time in range(steps)}
    return {t: t for t in range(FIRST)} | {steps - LAST + k: FIRST + 1 + k for k in range(LAST)}


def _place(step: Step, subject: Subject) -> tuple[float, float]:
    """Return the lower left corner of a step's box: layers upwards, and the forward direction over the reverse."""
    directions = len(subject.recurrence.directions)
    row = step.layer * directions + (directions - 1 - step.direction)
    return LEFT + PITCH * _columns(subject.steps)[step.time], BELOW + RISE * row


def _draw_layer(panel: Any, subject: Subject, height: float) -> None:
    """Draw all steps of a layer."""
    from matplotlib.patches import Rectangle

    recurrence, plan = subject.recurrence, subject.plan
    columns = _columns(subject.steps)
    width = PITCH * (1 + max(columns.values())) - (PITCH - WIDTH)
    steps = steps_of(recurrence, plan, subject.steps)
    title = f"{subject.name}: " if subject.name else ""
    kind = "Cell" if recurrence.is_cell else ""
    title += f"{recurrence.mode.replace('_', ' ')}{kind} {recurrence.input_size} → {recurrence.hidden_size}"
    turns = 1 + max(step.turn for step in steps)
    note = "any number of steps; drawn: " if subject.is_open else ""
    note += f"{turns} turn{'s' * (turns > 1)} for {len(steps)} step{'s' * (len(steps) > 1)}"
    if at_once := stacked(recurrence, plan):
        note += f"; {at_once} with thick borders and one number share a product"
    elif plan.block is not None and not recurrence.is_cell:
        note += f"; a loop over {'one step' if plan.block == 1 else f'blocks of {plan.block} steps'}"
    panel.text(0.15, height - 0.28, title, fontsize=11, weight="bold", color=INK)
    panel.text(0.15, height - 0.52, f"plan: {plan}", fontsize=9, color=INK)
    panel.text(0.15, height - 0.72, note, fontsize=9, color=INK)
    last = subject.steps - 1
    if recurrence.bidirectional:  # the next layer reads both directions
        for layer in range(recurrence.num_layers):
            corner = (LEFT - 0.16, BELOW + RISE * 2 * layer - 0.13)
            size = (width + 0.32, RISE + HEIGHT + 0.26)
            panel.add_patch(Rectangle(corner, *size, facecolor="#f1f3f5", edgecolor="none", zorder=0))
    for time, column in columns.items():
        middle = LEFT + PITCH * column + WIDTH / 2
        name = "" if recurrence.is_cell else f"$_{{{time}}}$"
        _arrow(panel, (middle, 0.36), (middle, BELOW - 0.02))
        panel.text(middle, 0.14, f"x{name}", ha="center", fontsize=10, color=INK)
        above = BELOW + RISE * recurrence.passes - (RISE - HEIGHT)
        _arrow(panel, (middle, above + 0.02), (middle, above + 0.28))
        panel.text(middle + 0.1, above + 0.16, f"h{name}", fontsize=10, color=INK)
    drawn = [step for step in steps if step.time in columns]
    for step in drawn:
        x, y = _place(step, subject)
        backwards = recurrence.directions[step.direction] == "reverse"
        _draw_step(panel, subject, step, turns)
        if step.time != (0 if backwards else last):  # the state goes on
            begin, end = (x, x - PITCH + WIDTH) if backwards else (x + WIDTH, x + PITCH)
            _arrow(panel, (begin, y + HEIGHT / 2), (end, y + HEIGHT / 2))
        if step.layer and step.direction == len(recurrence.directions) - 1:
            _arrow(panel, (x + WIDTH / 2, y - RISE + HEIGHT), (x + WIDTH / 2, y))
        if step.time == 0:
            row = f"layer {step.layer}\n" if recurrence.num_layers > 1 else ""
            row += "cell" if recurrence.is_cell else "← reverse" if backwards else "→ forward"
            panel.text(0.15, y + HEIGHT / 2, row, va="center", fontsize=9, color=INK)
            if len(columns) < subject.steps:
                panel.text(LEFT + PITCH * FIRST + WIDTH / 2, y + HEIGHT / 2, "· · ·", ha="center", va="center")
    _draw_blocks(panel, subject, drawn)


def _draw_step(panel: Any, subject: Subject, step: Step, turns: int) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import FancyBboxPatch, Rectangle

    cell = subject.recurrence.cell
    x, y = _place(step, subject)
    alpha = 1.0 if not step.block else 0.3
    shade = colormaps["YlGnBu"](0.03 + 0.4 * step.turn / max(turns - 1, 1))
    style = "round,pad=0,rounding_size=0.08"
    box = FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle=style, facecolor=shade, edgecolor=INK, alpha=alpha)
    box.set_linewidth(2.2 if step.batched else 0.8)
    panel.add_patch(box)
    panel.text(x + 0.07, y + HEIGHT - 0.06, f"{step.turn + 1}", va="top", fontsize=8, color=INK, alpha=alpha)
    groups = cell.products(subject.plan.layout)
    size, gap = 0.17, 0.03
    left = x + (WIDTH - len(cell.gates) * (size + gap) - gap * (len(groups) - 1)) / 2
    for group in groups:
        for gate in group:
            colour = SIGMOID if gate in cell.sigmoid else CANDIDATE
            panel.add_patch(Rectangle((left, y + 0.3), size, size, facecolor=colour, edgecolor="none", alpha=alpha))
            letter = LETTERS.get(gate, gate[0])
            panel.text(
                left + size / 2, y + 0.3 + size / 2 - 0.01, letter, ha="center", va="center", fontsize=8, color="white"
            )
            left += size + gap
        long = len(group) * (size + gap) - gap
        bar = Rectangle((left - gap - long, y + 0.14), long, 0.08, facecolor=PRODUCT, edgecolor="none", alpha=alpha)
        panel.add_patch(bar)
        left += gap


def _draw_blocks(panel: Any, subject: Subject, steps: Sequence[Step]) -> None:
    """Frame the steps of each turn of a loop."""
    from matplotlib.patches import FancyBboxPatch

    places: dict[tuple[int, int, int], list[tuple[float, float]]] = {}
    for step in steps:
        if step.block is not None:
            places.setdefault((step.layer, step.direction, step.block), []).append(_place(step, subject))
    for (_, _, block), corners in places.items():
        left, right = min(x for x, _ in corners) - 0.09, max(x for x, _ in corners) + WIDTH + 0.09
        style = "round,pad=0,rounding_size=0.1"
        size = (right - left, HEIGHT + 0.18)
        frame = FancyBboxPatch((left, corners[0][1] - 0.09), *size, boxstyle=style, facecolor="none", edgecolor=FRAME)
        frame.set(linewidth=1.6 if not block else 0.9, linestyle="-" if not block else (0, (3, 2)))
        panel.add_patch(frame)


def _arrow(panel: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    panel.annotate("", end, start, arrowprops=style)
