"""The curves of a report, which show their values under the pointer, as HTML by Bokeh."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from disco_jax.display.terminal import printable
from disco_jax.reporting.run import Run

if TYPE_CHECKING:
    from bokeh.plotting import figure

MOST_POINTS = 2_000  # of a curve; a page with more grows large and slow
# Okabe and Ito's colors (2008), which color-blind readers can tell apart, on light and on dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("solid", "dashed", "dotted", "dotdash")
GREY = "#888888"  # readable on light and on dark


class Chart(NamedTuple):
    """A panel: its title, the metrics it shows, and how."""

    title: str
    metrics: tuple[str, ...]
    format: str  # of values, in Bokeh's notation
    log: bool = False


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Returns the panels that the runs have finite values for."""
    rows = [row for run in runs for row in run.rows]
    found = sorted({name for row in rows for name, value in row.items() if np.isfinite(value)})
    accuracies = [n for n in found if n.count("/") == 1 and n.endswith(("/top1", "/mean"))]
    recalls = [n for n in found if n.count("/") == 1 and n.endswith("recall@1")]
    charts = [
        Chart("Training loss", ("train/loss",), "0.0000"),
        Chart("Zero-shot accuracy", tuple(accuracies), "0.00%"),
        Chart("Retrieval, recall@1", tuple(recalls), "0.00%"),
        Chart("Learning rate", ("train/learning_rate",), "0.00e+0"),
        Chart("Images per second", ("train/images_per_second",), "0,0"),
        Chart("Logit scale", ("train/logit_scale",), "0.00"),
        Chart("Gradient norm", ("train/grad_norm",), "0.000", log=True),
    ]
    return [chart for chart in charts if set(chart.metrics) & set(found)]


def curves(runs: Sequence[Run]) -> tuple[str, list[tuple[str, str]]]:
    """Returns the scripts of a page, Bokeh's own among them, and each chart's title and HTML."""
    from bokeh.embed import components  # lazy: takes a second to import
    from bokeh.resources import Resources

    charts = charts_of(runs)
    if not charts:
        return "", []
    script, parts = components([_panel(chart, runs) for chart in charts])
    library = Resources(mode="inline", components=["bokeh"]).render_js()
    titles = [chart.title for chart in charts]
    return library + script, list(zip(titles, parts, strict=True))


def _panel(chart: Chart, runs: Sequence[Run]) -> "figure":
    from bokeh.models import HoverTool
    from bokeh.plotting import figure

    panel = figure(
        height=300,
        sizing_mode="stretch_width",
        y_axis_type="log" if chart.log else "linear",
        x_axis_label="epochs",
        tools="pan,box_zoom,xwheel_zoom,reset,save",
        active_scroll=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    for i, run in enumerate(runs):
        for k, metric in enumerate(chart.metrics):
            steps, values = (np.array(x) for x in run.series(metric))
            kept = thinned(values, chart.log)
            if not len(kept):
                continue
            label = _label(run.name, metric if len(chart.metrics) > 1 else "", len(runs) > 1)
            source = {
                "epoch": [run.epochs(int(step)) for step in steps[kept]],
                "step": steps[kept].tolist(),
                "value": values[kept].tolist(),
                "of": [label or run.name] * len(kept),
            }
            style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "source": source}
            legend = {"legend_label": label} if label else {}
            line = panel.line(
                "epoch", "value", line_width=2, line_dash=DASHES[k % len(DASHES)], **style, **legend
            )
            if len(kept) < 40:
                panel.scatter("epoch", "value", size=6, **style, **legend)
            panel.add_tools(
                HoverTool(
                    renderers=[line],
                    mode="vline",
                    visible=False,
                    tooltips=[
                        ("", "@of"),
                        ("step", "@step{0,0} (epoch @epoch{0.00})"),
                        (chart.title.lower(), f"@value{{{chart.format}}}"),
                    ],
                )
            )
    _plain(panel, chart)
    return panel


def thinned(values: np.ndarray, positive: bool = False) -> np.ndarray:
    """Returns the indices of the points to draw, at most `MOST_POINTS`; spikes are among them.

    Args:
      values: float `[n]`, of which those that are not finite are left out.
      positive: Leaves out zero and what is below, for a logarithmic axis.
    """
    finite = np.isfinite(values.astype(float))
    kept = np.flatnonzero(finite & (values > 0) if positive else finite)
    if len(kept) <= MOST_POINTS:
        return kept
    bins = np.array_split(kept, MOST_POINTS // 2)
    ends = [(part[values[part].argmin()], part[values[part].argmax()]) for part in bins]
    return np.unique(ends)


def _label(run: str, metric: str, several: bool) -> str:
    metric = metric.removesuffix("/top1")
    return printable(", ".join(part for part in (run if several else "", metric) if part))[:60]


def _plain(panel: "figure", chart: Chart) -> None:
    """Sets the colors, which suit a light and a dark page, and the axes' formats."""
    from bokeh.models import NumeralTickFormatter

    panel.toolbar.logo = None
    panel.toolbar.autohide = True
    for axis in panel.axis:
        axis.axis_label_text_color = axis.major_label_text_color = GREY
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = GREY
        axis.axis_label_text_font_style = "normal"
    panel.grid.grid_line_color = GREY
    panel.grid.grid_line_alpha = 0.25
    if chart.format.endswith("%"):
        panel.yaxis.formatter = NumeralTickFormatter(format="0%")
    elif chart.format == "0,0":
        panel.yaxis.formatter = NumeralTickFormatter(format="0,0")
    if panel.legend:
        panel.legend.click_policy = "hide"
        panel.legend.background_fill_alpha = 0
        panel.legend.border_line_color = None
        panel.legend.label_text_color = GREY
        panel.legend.label_text_font_size = "12px"
        panel.add_layout(panel.legend[0], "below")
        panel.legend.orientation = "horizontal"
        panel.legend.location = "left"
        panel.legend.ncols = 3
        panel.legend.padding = panel.legend.margin = 0
