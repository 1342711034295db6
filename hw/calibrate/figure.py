"""The graph of a calibration: measured points, the fit, and iterations that were not fitted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hw.calibrate import measurements as m
from hw.calibrate.engine_runs import Iterations
from sim.cost.latency import LatencyModel
from sim.results.plots import figure_file
from sim.types import Floats


def plot(path: Path, terms: m.Terms, latency: LatencyModel, held_out: Iterations, title: str) -> None:
    """Write one PNG: measured points and fit of every term, and measured against predicted iterations."""
    with figure_file(path, 2, 3, size=(14, 8), title=title) as (_, axes):
        for axis, kind in zip(axes[0], ("mha", "ffn"), strict=False):
            for bits, kinds in terms.linear.items():
                measured = kinds[kind]
                points = axis.plot(measured.x, measured.us / 1e3, "o", markersize=4, label=f"{bits} bits, measured")
                x = np.arange(1, int(measured.x[-1]) + 1)
                fitted = [latency.linear_s(kind, bits, int(t)) * 1e3 for t in x]
                axis.plot(x, fitted, color=points[0].get_color(), linewidth=0.8)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="tokens",
                ylabel="time [ms]",
                title=f"{kind.upper()} block without attention",
            )
            axis.legend()
        head = axes[0][2].plot(terms.head.x, terms.head.us / 1e3, "o", markersize=4, label="head, measured")
        x = np.arange(1, int(terms.head.x[-1]) + 1)
        axes[0][2].plot(x, [latency.head_s(int(s)) * 1e3 for s in x], color=head[0].get_color(), linewidth=0.8)
        axes[0][2].set(xlabel="sequences", ylabel="time [ms]", title="LM head and choice of a token")
        for batch in _a_few(terms.decode.x):
            here = terms.decode.x == batch
            line = axes[1][0].plot(
                terms.decode.y[here], terms.decode.us[here] / 1e3, "o", markersize=4, label=f"batch {batch:.0f}"
            )
            x = np.geomspace(8, terms.decode.y.max(), 50)
            fitted = [latency.decode_attention_s(int(batch), int(batch * c)) * 1e3 for c in x]
            axes[1][0].plot(x, fitted, color=line[0].get_color(), linewidth=0.8)
        axes[1][0].set(xlabel="context [tokens]", ylabel="time [ms]", title="decode attention, one layer")
        axes[1][0].legend()
        for tokens in _a_few(terms.prefill.x):
            here = terms.prefill.x == tokens
            prefix = terms.prefill.y[here] - (tokens + 1) / 2
            line = axes[1][1].plot(
                prefix, terms.prefill.us[here] / 1e3, "o", markersize=4, label=f"{tokens:.0f} tokens"
            )
            fitted = [latency.prefill_attention_s(int(tokens), int(p)) * 1e3 for p in prefix]
            axes[1][1].plot(prefix, fitted, color=line[0].get_color(), linewidth=0.8)
        axes[1][1].set(xlabel="tokens before the chunk", ylabel="time [ms]", title="prefill attention, one layer")
        axes[1][1].legend()
        both = (held_out.priced_s(latency) * 1e3, held_out.measured_s * 1e3)
        axes[1][2].plot(*both, ".", markersize=4)
        most = float(max(map(np.max, both)))
        axes[1][2].plot([0, most], [0, most], color="black", linewidth=0.8)
        axes[1][2].set(xlabel="priced [ms]", ylabel="measured [ms]", title="iterations, held out")


def _a_few(values: Floats, count: int = 4) -> Floats:
    """Return a few of the values, spread over their range."""
    unique = np.unique(values)
    chosen: Floats = unique[np.unique(np.linspace(0, len(unique) - 1, count).round().astype(int))]
    return chosen
