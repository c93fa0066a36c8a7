"""Plots of the equifinality paper's experiments, in one HTML file."""

from __future__ import annotations

from pathlib import Path

from ecomoe.ecology.alignment import pareto_front
from examples.experiments.equifinality_figures import groups, halting_cost
from examples.experiments.measure import Record
from examples.experiments.report import write_page


def write_plot(content: Record, path: Path, *, light: bool = True) -> Path:
    """Write the training curves and the Pareto curve of halting into one HTML file.

    ``light`` leaves the plotting library out (5 MB); the file then needs a network to be read.
    """
    import plotly.graph_objects as go

    curves, pareto = go.Figure(), go.Figure()
    for name, runs in groups(content).items():
        for run in runs:
            percents, losses = zip(*run["history"], strict=True)
            label = f"{name}, seed {run['seed']}"
            curves.add_scatter(x=percents, y=losses, name=label, legendgroup=name)
            if "halting" not in run:
                continue
            points = [(0.0, 0.0)] + [
                (100 * point["saved"], 100 * halting_cost(run, point))
                for point in (*run["halting"]["curve"], run["halting"]["at_goal"])
            ]
            points.sort()
            x, y = zip(*points, strict=True)
            pareto.add_scatter(x=x, y=y, name=label, legendgroup=name)
            front = pareto_front((100 - saved, cost) for saved, cost in points)
            x, y = zip(*((100 - cost, rise) for cost, rise in front), strict=True)
            pareto.add_scatter(x=x, y=y, mode="markers", showlegend=False, legendgroup=name)
    curves.update_layout(xaxis_title="training, %", yaxis_title="loss, nats")
    pareto.update_layout(xaxis_title="FLOPs saved, %", yaxis_title="rise in perplexity, %")
    figures = (("Training", curves), ("Halting", pareto))
    return write_page("Equifinality", figures, path, light=light)
