"""One self-contained HTML page on one or several runs: no script, nothing from the network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from src.runs.run_folder import has_top5
from src.utils.log import shortened

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 30, 34
COLOURS = 6

Line = tuple[str, Sequence[tuple[float, float]]]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_title: str = "epoch",
    dashed: Sequence[str] = (),
    mark: float | None = None,
    most: float = math.inf,
) -> str:
    """An SVG of ``lines``, [(name, [(x, y)])], each with its own colour.

    Lines whose names are in ``dashed`` are dashed. Each point has its name and figures as a
    tooltip. Points that are not finite are left out. Points above ``most`` are drawn at the top,
    and the title says how many. There is a vertical line at x = ``mark``.
    """
    lines = [(name, [(x, y) for x, y in points if math.isfinite(y)]) for name, points in lines]
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    if not xs:
        return ""
    if above := sum(y > most for y in ys):
        title += f"; {above} higher, up to {max(ys):.4g}"
        ys = [min(y, most) for y in ys]
    across = _Scale(xs, _LEFT, _WIDTH - _RIGHT, min_step=1)
    up = _Scale(ys, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="16">{escape(title)}</text>',
    ]
    for tick in up.ticks:
        y = up(tick)
        parts += [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>',
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    for tick in across.ticks:
        parts.append(
            f'<text x="{across(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_title)}</text>'
    )
    if mark is not None:
        parts.append(
            f'<line class="mark" x1="{across(mark):.1f}" x2="{across(mark):.1f}" y1="{_TOP}" '
            f'y2="{_HEIGHT - _BOTTOM}"/>'
        )
    for number, (name, points) in enumerate(lines):
        style = f"c{number % COLOURS}" + (" dashed" if name in dashed else "")
        path = " ".join(f"{across(x):.1f},{up(min(y, most)):.1f}" for x, y in points)
        parts.append(f'<polyline class="{style}" points="{path}"/>')
        parts += [
            f'<circle class="{style}" cx="{across(x):.1f}" cy="{up(min(y, most)):.1f}" '
            f'r="{2.2 if len(points) < 80 else 1}">'
            f"<title>{escape(name)}, {escape(x_title)} {x:g}: {y:g}</title></circle>"
            for x, y in points
        ]
    return "".join([*parts, "</svg>"])


def most_shown(lines: Sequence[Line]) -> float:
    """The largest y to show: all, unless some are more than ten times the 90th percentile."""
    ys = sorted(y for _, points in lines for _, y in points if math.isfinite(y))
    if not ys or ys[0] < 0:
        return math.inf
    usual = ys[int(0.9 * (len(ys) - 1))]
    return 2 * usual if ys[-1] > 10 * usual > 0 else math.inf


class _Scale:
    """Numbers to places between ``begin`` and ``end``, and ticks at round numbers."""

    def __init__(
        self, values: Sequence[float], begin: float, end: float, min_step: float = 0
    ) -> None:
        low, high = min(values), max(values)
        if high == low:
            low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
        step = 10 ** math.floor(math.log10(high - low))
        step = next(
            step * factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 6
        )
        step = max(step, min_step)
        first = math.ceil(low / step - 1e-9)
        self.ticks = [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]
        self._low, self._high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        return self._begin + (value - self._low) / (self._high - self._low) * (
            self._end - self._begin
        )


_CONFUSION_CLASSES = 25
_NAME_LENGTH = 28
# Keys about a machine or process, which do not affect the results.
_PLACES = ("output_path", "resume", "log_interval", "device_id")

_STYLE = """
:root { --back: #fdfdfc; --text: #1d2126; --dim: #68707a; --line: #dcdfe3; --panel: #f3f4f6;
        --good: 33, 120, 200;
        --c0: #1f6fb5; --c1: #c4501b; --c2: #2a8a4a; --c3: #8a4bb0; --c4: #a98207; --c5: #b8336a; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181c; --text: #e4e7ea; --dim: #98a1ab; --line: #343a42; --panel: #1e2329;
          --good: 90, 165, 235;
          --c0: #6db2ee; --c1: #f08b5b; --c2: #6ccb8b; --c3: #c79be6; --c4: #dcb94a;
          --c5: #ee7fac; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1rem 4rem;
       background: var(--back); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p, figcaption, .dim { color: var(--dim); } p { margin: .3rem 0; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
td:first-child code { white-space: nowrap; }
.wide { overflow-x: auto;
        /* A shadow on the side where more of the table is hidden. */
        background: linear-gradient(to right, var(--back), transparent) left / 2rem 100% local,
                    linear-gradient(to left, var(--back), transparent) right / 2rem 100% local,
                    linear-gradient(to right, var(--line), transparent) left / .8rem 100% scroll,
                    linear-gradient(to left, var(--line), transparent) right / .8rem 100% scroll;
        background-repeat: no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top;
         border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; }
.charts, .sheet { display: grid; gap: 1rem;
                  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.alone { max-width: 30rem; }
.sheet { gap: .7rem; margin-bottom: .9rem;
         grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
figure { margin: 0; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.shown { display: flex; gap: 3px; align-items: flex-start; }
.shown img { flex: 1; min-width: 0; border-radius: 4px; background: var(--panel); }
figcaption { font-size: .82rem; line-height: 1.3; margin-top: .25rem; overflow-wrap: anywhere; }
.chart { width: 100%; height: auto; background: var(--panel); border-radius: 6px; }
.chart text { fill: var(--dim); font-size: 12px; }
.chart .title { fill: var(--text); font-size: 13px; }
.chart .mark { stroke: var(--dim); stroke-dasharray: 2 3; }
.chart .grid { stroke: var(--line); } .chart polyline { fill: none; stroke-width: 1.8; }
.dashed { stroke-dasharray: 5 4; }
.key::before { content: ""; display: inline-block; width: .8em; height: .8em;
               border-radius: 2px; margin-right: .4em;
               background: currentColor; }
.confusion td { text-align: center; padding: .2rem .45rem; min-width: 2.1rem;
                border: 1px solid var(--line); }
.confusion th { font-weight: normal; font-size: .82rem; padding: .2rem .5rem; }
.confusion thead th { writing-mode: vertical-rl; transform: rotate(180deg);
                      text-align: left; vertical-align: bottom; }
.bar { display: flex; height: 1rem; min-width: 9rem; border-radius: 3px; overflow: hidden;
       background: var(--panel); }
.side { display: flex; flex-wrap: wrap; gap: .5rem 3rem; align-items: flex-start; }
.file { display: block; color: var(--text); }
details { margin: .6rem 0; } summary { cursor: pointer; }
details.part > summary { font-size: 1.15rem; font-weight: 600; margin: 1.4rem 0 .6rem; }
""" + "".join(
    f".c{n} {{ stroke: var(--c{n}); }} circle.c{n} {{ fill: var(--c{n}); stroke: none; }} "
    f".k{n} {{ color: var(--c{n}); }} .b{n} {{ background: var(--c{n}); }}\n"
    for n in range(COLOURS)
)


@dataclass(frozen=True)
class Picture:
    """An image as a data: URL, the words below it, its file and its heat map if they are shown."""

    source: str
    words: str
    file: str = ""
    heat_map: str = ""


@dataclass(frozen=True)
class RunReport:
    """The data of one run on the page.

    Attributes:
        name: what to call it.
        config, environment, metrics: contents of config.yaml, environment.json, metrics.jsonl.
        best_step: the step that best.ckpt records, or None.
        interval: 95 % interval of the best accuracy in percent, or None.
        classes: names in the order of labels.
        class_figures: images, precision, recall and F1 of each class, of the best network.
        confusion: images by label and likeliest class, (classes, classes), or None.
        confused: (label, what it was taken for, how often), the most frequent first.
        mistakes, samples: the worst mistakes, and augmented training images.
        calibration_error: expected calibration error in percent, or None.
        calibration: (mean top-1 probability, accuracy) of each non-empty bin, in percent.
        note: a remark above the class table, such as why there are no images.
        defaults: {key: default}, to show which keys differ.
    """

    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    best_step: int | None = None
    interval: tuple[float, float] | None = None
    classes: Sequence[str] = ()
    class_figures: Sequence[Mapping[str, Any]] = ()
    confusion: Sequence[Sequence[int]] | None = None
    confused: Sequence[tuple[int, int, int]] = ()
    mistakes: Sequence[Picture] = ()
    samples: Sequence[Picture] = ()
    calibration_error: float | None = None
    calibration: Sequence[tuple[float, float]] = ()
    note: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The line of the best epoch in the metrics; None if no epoch was evaluated."""
        evaluated = [line for line in self.metrics if "top1" in line]
        recorded = [line for line in evaluated if line["step"] == self.best_step]
        return max(recorded or evaluated, key=_goodness, default=None)

    def with_note(self, note: str) -> "RunReport":
        """The report with one more remark."""
        return replace(self, note=f"{self.note} {note}".strip())


def render(runs: Sequence[RunReport]) -> str:
    """The page as HTML text."""
    title = _headline(runs[0]) if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [_subtitle(runs), _summary(runs)]
    for run in runs:
        of_run = _of(run, runs)
        mistakes = _pictures(f"Most confident mistakes{of_run}", run.mistakes)
        sections += [_classes(run, of_run), mistakes, _calibration(run, of_run)]
    sections.append(_curves(runs))
    for run in runs:
        samples = _pictures("", run.samples)
        sections.append(_folded(f"Augmented training images{_of(run, runs)}", samples))
    sections.append(_folded("Configuration", _configuration(runs)))
    sections.append(_folded("Where the time went", _time(runs)))
    sections += [_folded(f"Every epoch{_of(run, runs)}", _epochs(run)) for run in runs]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _headline(run: RunReport) -> str:
    best = run.best
    if best is None:
        return f"{run.config['network']}, not evaluated on validation images"
    if "correct" not in best:
        return f"{best['top1']:.2f} % of the validation images are right"
    return f"{best['correct']} of {best['val_images']} validation images are right"


def _subtitle(runs: Sequence[RunReport]) -> str:
    if len(runs) > 1:
        return ""
    (run,) = runs
    facts = []
    if run.best is not None:
        low, high = run.interval or (None, None)
        between = f" (95 % interval {low:.1f} to {high:.1f} %)" if run.interval else ""
        facts.append(f"{run.best['top1']:.2f} %{between}, in epoch {run.best['epoch']}.")
    facts.append(f"{run.config['network']} on {run.config['data_path']}, run {run.name}.")
    return f"<p>{escape(' '.join(facts))}</p>"


def _folded(title: str, content: str) -> str:
    if not content:
        return ""
    return f'<details class="part"><summary>{title}</summary>{content}</details>'


def _summary(runs: Sequence[RunReport]) -> str:
    shows_top5 = any(has_top5(line) for run in runs for line in run.metrics)
    rows = []
    for number, run in enumerate(runs):
        best, last = run.best, run.metrics[-1]
        rows.append(
            [
                f'<span class="key k{number % COLOURS}"></span>{escape(run.name)}',
                f"{escape(run.config['network'])} {escape(run.config['block'])}",
                f"{last['epoch']} of {run.config['max_epoch']}",
                f"{best['top1']:.2f} %" if best else "",
                f"{best['correct']} of {best['val_images']}" if best and "correct" in best else "",
                str(best["epoch"]) if best else "",
                *([f"{best['top5']:.2f} %" if best else ""] * shows_top5),
                f"{last['loss']:.4f}",
                f"{last['val_loss']:.4f}" if "val_loss" in last else "",
                f"{last['images_per_second']:.1f}",
            ]
        )
    head = (
        "run",
        "network",
        "epochs",
        "best top-1",
        "images right",
        "in epoch",
        *(["top-5 then"] * shows_top5),
        "last loss",
        "validation loss",
        "images/s",
    )
    return _table(head, rows, numbers=range(2, len(head)), name="summary")


def _curves(runs: Sequence[RunReport]) -> str:
    def lines(key: str, label: str = "") -> list[tuple[str, list[tuple[float, float]]]]:
        return [
            (
                f"{run.name}{label}",
                [(line["epoch"], line[key]) for line in run.metrics if _shows(line, key)],
            )
            for run in runs
        ]

    both = [
        line
        for pair in zip(lines("loss", " training"), lines("val_loss", " validation"))
        for line in pair
    ]
    mark = runs[0].best["epoch"] if len(runs) == 1 and runs[0].best else None
    charts = [
        line_chart("training loss", lines("loss"), most=most_shown(lines("loss"))),
        line_chart("validation top-1 (%)", lines("top1"), mark=mark),
        line_chart("validation loss", lines("val_loss"), most=most_shown(lines("val_loss"))),
        line_chart("validation top-5 (%)", lines("top5")),
        line_chart("learning rate", lines("lr")),
        line_chart("images/s", lines("images_per_second")),
    ]
    if len(runs) == 1:
        charts[0] = line_chart(
            "loss, dashed in validation",
            both,
            dashed=[both[1][0]],
            mark=mark,
            most=most_shown(both),
        )
        charts[2] = ""
    about = "<p>The dotted line is the best epoch.</p>" if mark is not None else ""
    shown = "".join(f"<div>{chart}</div>" for chart in charts if chart)
    return f'<h2>Curves</h2>{about}<div class="charts">{shown}</div>'


def _configuration(runs: Sequence[RunReport]) -> str:
    # The global batch size wins over the one per rank.
    left_out = (
        (*_PLACES, "per_batch_size")
        if all(run.config.get("global_batch_size") for run in runs)
        else _PLACES
    )
    keys = [key for key in runs[0].config if key not in left_out]
    values = {key: [_value(run.config.get(key)) for run in runs] for key in keys}
    differing = [key for key in keys if len(set(values[key])) > 1]
    parts = []
    if len(runs) > 1:
        parts.append(
            "<p>Differences between the runs:</p>"
            + _table(
                ("key", *(run.name for run in runs)),
                [[_code(key), *map(_code, values[key])] for key in differing],
                name="differing",
            )
            if differing
            else "<p>The runs have the same configuration.</p>"
        )
    changed = [
        key
        for key in keys
        if key not in differing and values[key][0] != _value(runs[0].defaults.get(key))
    ]
    parts.append(
        "<p>Values that differ from default_config.yaml:</p>"
        + _table(
            ("key", "value", "default"),
            [
                [_code(key), _code(values[key][0]), _code(_value(runs[0].defaults.get(key)))]
                for key in changed
            ],
        )
    )
    rows = [[_code(key), *map(_code, values[key])] for key in keys]
    parts.append(
        "<details><summary>Every key</summary>"
        + _table(("key", *(run.name for run in runs)), rows)
        + "</details>"
    )
    return "".join(parts)


def _time(runs: Sequence[RunReport]) -> str:
    rows = []
    for run in runs:
        hosts = run.environment.get("hosts", [])
        per_epoch = [line["rank_seconds"] for line in run.metrics if line.get("rank_seconds")]
        for rank in range(min(map(len, per_epoch), default=0)):
            parts = [sum(epoch[rank][part] for epoch in per_epoch) for part in range(3)]
            whole = sum(parts) or 1.0
            bar = "".join(
                f'<span class="b{number}" style="width:{100 * part / whole:.1f}%"></span>'
                for number, part in enumerate(parts)
            )
            rows.append(
                [
                    escape(run.name),
                    str(rank),
                    escape(hosts[rank]) if rank < len(hosts) else "",
                    *(f"{part:.1f} s" for part in parts),
                    f'<div class="bar">{bar}</div>',
                ]
            )
    text = (
        "<p>Seconds per rank over the steps of all epochs: waiting for "
        "input, computing, and waiting for other ranks and the network.</p>"
    )
    keys = (
        "run",
        "rank",
        "host",
        '<span class="key k0"></span>input',
        '<span class="key k1"></span>computing',
        '<span class="key k2"></span>waiting',
        "",
    )
    facts = ""
    for run in runs:
        versions = ", ".join(
            f"{key} {value}" for key, value in run.environment.items() if key != "hosts"
        )
        facts += f"<p>{escape(run.name)}: {escape(versions)}</p>" if versions else ""
    return text + _table(keys, rows, numbers=(1, 3, 4, 5), name="time") + facts


def _of(run: RunReport, runs: Sequence[RunReport]) -> str:
    """ " of NAME", or "" for the only run."""
    return f" of {escape(run.name)}" if len(runs) > 1 else ""


def _classes(run: RunReport, of_run: str) -> str:
    heading = f"<h2>Classes{of_run}</h2>"
    best = run.best
    if best is None and run.confusion is None:
        return heading + f"<p>{escape(run.note or 'The run was not evaluated.')}</p>"
    parts = [heading]
    if run.note:
        parts.append(f"<p>{escape(run.note)}</p>")
    counted = sum(figures["images"] for figures in run.class_figures)
    if best and run.class_figures and counted != best.get("val_images", counted):
        parts.append(
            f"<p>{counted} images are counted here, of {best['val_images']} in training: others "
            "cannot be decoded, or the data is not that of training.</p>"
        )
    table = _class_table(run)
    known = run.class_figures or (best or {}).get("class_top1", ())
    many = len(known) > _CONFUSION_CLASSES
    if run.confusion is None or many:
        summary = "<summary>Every class, the worst first</summary>"
        parts.append(f"<details>{summary}{table}</details>" if many else table)
    else:
        about = "<p>Rows: the true class. Columns: what was predicted.</p>"
        parts.append(f'<div class="side">{table}<div>{about}{_confusion(run)}</div></div>')
    if run.confused and many:
        rows = [
            [escape(run.classes[label]), escape(run.classes[other]), str(count)]
            for label, other, count in run.confused
        ]
        parts.append(
            "<p>Most confused:</p>"
            + _table(("class", "predicted as", "images"), rows, numbers=(2,), name="confused")
        )
    return "".join(parts)


def _class_table(run: RunReport) -> str:
    """The classes, the lowest accuracy first.

    Without the images, only what metrics.jsonl says.
    """
    if run.class_figures:
        keys = ("precision", "recall", "f1")
        known = enumerate(run.class_figures)
        order = sorted(known, key=lambda item: (item[1]["recall"] is None, item[1]["recall"]))
        rows = [
            [
                escape(_name(run, label)),
                str(figures["images"]) if figures["images"] else "no image",
                *(f"{figures[key]:.1f} %" if figures[key] is not None else "" for key in keys),
            ]
            for label, figures in order
        ]
        head = ("class", "images", "precision", "recall", "F1")
        return _table(head, rows, numbers=range(1, len(head)), name="classes")
    best = run.best
    if best is None or not best.get("class_top1"):
        return ""
    pairs = [(value, label) for label, value in enumerate(best["class_top1"]) if value is not None]
    rows = [[escape(_name(run, label)), f"{accuracy:.2f} %"] for accuracy, label in sorted(pairs)]
    return _table(("class", f"top-1 in epoch {best['epoch']}"), rows, numbers=(1,), name="classes")


def _confusion(run: RunReport) -> str:
    head = "".join(
        f"<th>{escape(_name(run, label))}</th>" for label in range(len(run.confusion or ()))
    )
    lines = []
    for label, counts in enumerate(run.confusion or ()):
        whole = max(sum(counts), 1)
        cells = "".join(
            f'<td style="background: rgba(var(--good), {0.75 * count / whole:.2f})">'
            f"{count or ''}</td>"
            for count in counts
        )
        lines.append(f"<tr><th>{escape(_name(run, label))}</th>{cells}</tr>")
    body = "".join(lines)
    return (
        f'<div class="wide"><table class="confusion"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _calibration(run: RunReport, of_run: str) -> str:
    """How well calibrated the probabilities are."""
    if run.calibration_error is None:
        return ""
    exact = [(percent, percent) for percent in (0.0, 100.0)]
    lines = [("measured", run.calibration), ("perfect calibration", exact)]
    chart = line_chart(
        "images right (%); dashed: perfect calibration",
        lines,
        "probability (%)",
        dashed=[lines[1][0]],
    )
    return (
        f"<h2>Probabilities{of_run}</h2><p>They are off by {run.calibration_error:.1f} percentage "
        "points on average (expected calibration error). Of 100 images whose class gets 80 %, 80 "
        "should be right. <code>python3 export.py --temperature=auto</code> can correct them.</p>"
        f'<div class="alone">{chart}</div>'
    )


def _pictures(title: str, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    explained = "".join(_figure(picture) for picture in pictures if picture.heat_map)
    others = "".join(_figure(picture) for picture in pictures if not picture.heat_map)
    parts = [f"<h2>{title}</h2>" if title else ""]
    if explained:
        parts.append(
            "<p>On the right, a heat map: covering the warm regions makes the predicted class less "
            f'likely.</p><div class="sheet pairs">'
            f"{explained}</div>"
        )
    if others:
        parts.append(f'<div class="sheet">{others}</div>')
    return "".join(parts)


def _figure(picture: Picture) -> str:
    file = ""
    if picture.file:
        name = shortened("/".join(picture.file.split("/")[-2:]), _NAME_LENGTH)
        file = f'<span class="file" title="{escape(picture.file)}">{escape(name)}</span>'
    caption = f"<figcaption>{file}{escape(picture.words)}</figcaption>"
    sources = filter(None, (picture.source, picture.heat_map))
    shown = "".join(f'<img src="{source}" alt="">' for source in sources)
    return f'<figure><div class="shown">{shown}</div>{caption}</figure>'


def _shows(line: Mapping[str, Any], key: str) -> bool:
    return key in line and (key != "top5" or has_top5(line))


def _epochs(run: RunReport) -> str:
    every = ("epoch", "loss", "val_loss", "top1", "top5", "lr", "images_per_second")
    keys = [key for key in every if any(_shows(line, key) for line in run.metrics)]
    rows = [[str(line.get(key, "")) for key in keys] for line in run.metrics]
    return _table(keys, rows, numbers=range(len(keys)), name="epochs")


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), name: str = ""
) -> str:
    """A table of HTML texts; columns ``numbers`` are aligned to the right."""
    if not rows:
        return ""
    kind = [' class="number"' if column in numbers else "" for column in range(len(head))]
    titles = "".join(f"<th{kind[column]}>{text}</th>" for column, text in enumerate(head))
    lines = "".join(
        "<tr>"
        + "".join(f"<td{kind[column]}>{text}</td>" for column, text in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table id="{name}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _goodness(line: Mapping[str, Any]) -> tuple[float, float]:
    """The sort key for the best epoch: top-1, then the lower loss."""
    return line["top1"], -line.get("val_loss", 0.0)


def _name(run: RunReport, label: int) -> str:
    return run.classes[label] if label < len(run.classes) else str(label)


def _value(value: Any) -> str:
    """As default_config.yaml writes it."""
    if isinstance(value, (bool, int, float)):
        return f"{float(value):g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return "null" if value is None else str(value)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
