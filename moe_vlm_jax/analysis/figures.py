"""Figures of routing.

Functions take parts of the JSON value of summary.py and return a figure; drawing.py turns one into bytes. Where two
runs are given, they share axes: the first one's marks are full or solid, the second one's hatched or dashed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_vlm_jax.analysis import drawing


@drawing.styled
def load(runs: Mapping[str, Sequence[Mapping]], *, counting: str) -> Any:
    """Expert load: the share of each expert in the choices of a layer, one bar a run.

    Args:
      runs: name -> layers with 'layer' and 'load'.
      counting: which choices count, for the axis.
    """
    figure, axes = drawing.canvas(3.9)
    names = list(runs)
    width = 0.8 / len(names)
    layers = runs[names[0]]
    num_experts = max(len(layer["load"]) for layer in layers)
    for n, name in enumerate(names):
        x = np.arange(len(layers)) + (n - (len(names) - 1) / 2) * width
        bottom = np.zeros(len(layers))
        for e in range(num_experts):
            values = np.array([_at(layer["load"], e) for layer in runs[name]])
            color, hatch = drawing.expert_color(e), "//" if n else None
            label = None if n else f"expert {e}"
            axes.bar(x, values, width * 0.94, bottom, color=color, edgecolor="white", hatch=hatch, label=label)
            if len(layers) * len(names) <= 16 and num_experts <= 8:
                _write_shares(axes, x, values, bottom, color)
            bottom += values
    for e in range(1, num_experts):
        axes.axhline(e / num_experts, color=drawing.BLACK, linewidth=0.7, linestyle=":")
    drawing.layer_axis(axes, [layer["layer"] for layer in layers])
    axes.set(ylabel=f"share of choices ({counting})", ylim=(0, 1))
    axes.yaxis.set_major_formatter("{x:.1f}")
    both = f"; left: {names[0]}, right, hatched: {names[1]}" if len(names) > 1 else ""
    axes.set_title(f"Expert load; dotted: an even load{both}")
    drawing.legend_right(axes)
    return figure


@drawing.styled
def modality_shares(layers: Sequence[Mapping], *, counting: str) -> Any:
    """Text and image in each expert's tokens, as if there were as much text as image."""
    figure, axes = drawing.canvas(3.6)
    place, ticks, names, starts = 0.0, [], [], []
    for layer in layers:
        starts.append((place, len(layer["text_share"]), layer["layer"]))
        for e, share in enumerate(layer["text_share"]):
            if share is None:
                axes.text(
                    place, 0.5, "never chosen", rotation=90, ha="center", va="center", color=drawing.GREY, fontsize=9
                )
            else:
                axes.bar(place, share, 0.86, color=drawing.TEXT)
                axes.bar(place, 1 - share, 0.86, bottom=share, color=drawing.IMAGE)
            ticks.append(place)
            names.append(str(e))
            place += 1
        place += 0.8
    axes.bar([0], [0], color=drawing.TEXT, label="text")
    axes.bar([0], [0], color=drawing.IMAGE, label="image")
    axes.axhline(0.5, color=drawing.BLACK, linewidth=0.9, linestyle=":")
    for start, count, layer in starts:
        axes.text(
            start + (count - 1) / 2, 1.02, f"layer {layer}" if len(layers) <= 8 else layer, ha="center", va="bottom"
        )
    axes.set_xticks(ticks, names if len(names) <= 80 else [""] * len(names))
    axes.tick_params(axis="x", labelsize=11 if len(names) <= 40 else 9)
    axes.set(
        ylabel=f"share of tokens\n(equal lengths, {counting})", xlabel="expert", ylim=(0, 1), xlim=(-0.8, place - 1)
    )
    drawing.legend_right(axes)
    return figure


@drawing.styled
def preferences(layers: Sequence[Mapping], *, counting: str) -> Any:
    """P(expert | text) beside P(expert | image) for each layer, and how far apart they are."""
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, grid = drawing.grid(0.7 + 2.1 * rows, rows, columns)
    for i, axes in enumerate(grid.flat):
        if i >= len(layers):
            axes.set_visible(False)
            continue
        layer, x = layers[i], np.arange(len(layers[i]["load"]))
        axes.bar(x - 0.2, _numbers(layer["p_text"]), 0.38, color=drawing.TEXT, label="text")
        axes.bar(x + 0.2, _numbers(layer["p_image"]), 0.38, color=drawing.IMAGE, label="image")
        axes.axhline(1 / len(x), color=drawing.BLACK, linewidth=0.7, linestyle=":")
        bits = layer["divergence_bits"]
        axes.set_title(f"layer {layer['layer']}: " + ("one modality only" if bits is None else f"{bits:.3f} bit apart"))
        axes.set(ylim=(0, 1), xticks=x if len(x) <= 16 else [])
        if i % columns == 0:
            axes.set_ylabel(f"P(expert), {counting}")
        if i + columns >= len(layers):
            axes.set_xlabel("expert")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@drawing.styled
def layer_figures(runs: Mapping[str, Sequence[Mapping]]) -> Any:
    """Evenness of the load, rule of one expert, and divergence of text and image, over the layers."""
    figure, grid = drawing.grid(3.5, 1, 3)
    panels = (
        ("load_entropy", "load entropy (1 = even)", 1.0),
        ("dominance", "dominance of one expert (0 = even)", 1.0),
        ("divergence_bits", "text against image (bit)", None),
    )
    for axes, (key, label, top) in zip(grid.flat, panels, strict=True):
        for n, (name, layers) in enumerate(runs.items()):
            x, y = [layer["layer"] for layer in layers], _numbers([layer[key] for layer in layers])
            axes.plot(
                x, y, "s--" if n else "o-", color=drawing.VERMILION if n else drawing.BLUE, label=name, clip_on=False
            )
        axes.set(title=label, xlabel="decoder layer", ylim=(0, top))
        axes.set_ylim(bottom=0)
        if top is None:
            axes.set_ylim(top=max(0.05, 1.15 * axes.get_ylim()[1]))
        axes.set_xticks(_thinned([layer["layer"] for layer in next(iter(runs.values()))]))
        axes.grid(axis="y", color="#d9dee7", linewidth=0.7)
    if len(runs) > 1:
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    return figure


@drawing.styled
def information(layers: Sequence[Mapping], *, names: Mapping[str, str], counting: str) -> Any:
    """Mutual information of the expert and each kind of class, with the level that chance alone would give.

    Args:
      layers: of the summary.
      names: key of a kind of class -> words for the legend.
      counting: which choices count.
    """
    figure, axes = drawing.canvas(3.4)
    width = 0.8 / len(names)
    for n, (key, label) in enumerate(names.items()):
        x = np.arange(len(layers)) + (n - (len(names) - 1) / 2) * width
        found = [layer["information"][key] for layer in layers]
        axes.bar(x, [row["bits"] for row in found], width * 0.9, color=drawing.EXPERTS[n], label=label)
        chance = [row["chance"] for row in found]
        axes.hlines(
            chance,
            x - width * 0.45,
            x + width * 0.45,
            color=drawing.BLACK,
            linewidth=1.4,
            label=None if n else "chance",
        )
    drawing.layer_axis(axes, [layer["layer"] for layer in layers])
    axes.set(ylabel=f"mutual information (bit)\nwith the expert, {counting}")
    axes.set_ylim(0, max(0.02, 1.1 * axes.get_ylim()[1]))
    drawing.legend_right(axes)
    return figure


@drawing.styled
def classes(layers: Sequence[Mapping], *, names: Mapping[str, Sequence[str]]) -> Any:
    """P(expert | class) of every class that has tokens, all layers side by side.

    Args:
      layers: of the summary.
      names: key of a kind of class -> names of the classes.
    """
    rows, labels, ends = [], [], []
    for key, words in names.items():
        for c, word in enumerate(words):
            tokens = layers[0]["class_tokens"][key][c]
            if tokens:
                rows.append(np.concatenate([_numbers(layer["classes"][key][c]) for layer in layers]))
                labels.append(f"{word} ({tokens})")
        ends.append(len(rows))
    values = np.stack(rows)
    figure, axes = drawing.canvas(1.2 + 0.27 * len(rows))
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    if values.shape[1] <= 24:
        for (r, c), value in np.ndenumerate(values):
            axes.text(
                c, r, f"{value:.2f}", ha="center", va="center", fontsize=9, color="white" if value < 0.55 else "black"
            )
    edges = np.cumsum([len(layer["load"]) for layer in layers])
    for edge in edges[:-1]:
        axes.axvline(edge - 0.5, color="white", linewidth=3)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(len(labels)), labels)
    experts = [str(e) for layer in layers for e in range(len(layer["load"]))]
    axes.set_xticks(range(len(experts)), experts if len(experts) <= 80 else [""] * len(experts))
    for edge, layer in zip(edges, layers, strict=True):
        middle = edge - len(layer["load"]) / 2 - 0.5
        axes.text(
            middle, -0.7, f"layer {layer['layer']}" if len(layers) <= 10 else layer["layer"], ha="center", va="bottom"
        )
    axes.set(xlabel="expert", ylabel="class (tokens)")
    figure.colorbar(image, ax=axes, label="P(expert | class)", pad=0.01)
    return figure


@drawing.styled
def paths(found: Mapping[str, Any], layers: Sequence[int], num_experts: int) -> Any:
    """The most frequent paths through the layers, the wider the more tokens take them."""
    lines = [np.asarray(path) for path in found["paths"]]
    counts = np.add(found["text"], found["image"])
    labels = [
        f"{rank}.  {count:,} of {found['tokens']:,} tokens ({image / count:.0%} image)"
        for rank, (count, image) in enumerate(zip(counts, found["image"], strict=True), start=1)
    ]
    first = [line if line.ndim == 1 else line[:, 0] for line in lines]
    others = [[] if line.ndim == 1 else line[:, 1:].T for line in lines]
    figure, axes = _bump(layers, num_experts)
    for rank in reversed(range(len(lines))):
        shift = (rank - (len(lines) - 1) / 2) * 0.045  # equal steps of several paths stay visible
        width = 1.2 + 4 * np.sqrt(counts[rank] / counts[0])
        color, style = drawing.EXPERTS[rank % len(drawing.EXPERTS)], "-" if rank < len(drawing.EXPERTS) else "--"
        for line in (first[rank], *others[rank]):
            axes.plot(range(len(layers)), line + shift, f"o{style}", color=color, linewidth=width, markersize=width + 2)
        axes.plot([], [], style, color=color, linewidth=width, label=labels[rank])
    drawing.legend_right(axes, reverse=True)
    return figure


@drawing.styled
def pca_paths(found: Sequence[Sequence[int]], layers: Sequence[int], num_experts: int) -> Any:
    """The published view: components of a PCA over expert numbers, the first two in colour; no paths of tokens."""
    figure, axes = _bump(layers, num_experts)
    for n, line in reversed(list(enumerate(found[:10]))):
        shift = (n - (min(10, len(found)) - 1) / 2) * 0.045
        color, width = ((drawing.BLUE, 4.5), (drawing.ORANGE, 4.5))[n] if n < 2 else ("#9aa4b5", 1.8)
        label = f"component {n + 1}" if n < 2 else ("further components" if n == 2 else None)
        axes.plot(range(len(layers)), np.asarray(line) + shift, "o-", color=color, linewidth=width, label=label)
    drawing.legend_right(axes, reverse=True)
    return figure


@drawing.styled
def drift(rows: Sequence[Mapping]) -> Any:
    """How far each expert is from the dense feed-forward that it was copied from."""
    figure, axes = drawing.canvas(3.2)
    for e in range(max(len(row["drift"]) for row in rows)):
        shift = 0.12 * (e - (len(rows[0]["drift"]) - 1) / 2)
        values = [_at(row["drift"], e) for row in rows]
        marks = "osD^vP*X"[e % 8]
        axes.plot(
            np.arange(len(rows)) + shift,
            values,
            marks,
            color=drawing.expert_color(e),
            markersize=9,
            label=f"expert {e}",
        )
    drawing.layer_axis(axes, [row["layer"] for row in rows])
    axes.set(ylabel="distance from the dense parent\n‖expert − parent‖ / ‖parent‖")
    axes.set_ylim(0, max(1e-3, 1.15 * axes.get_ylim()[1]))
    axes.grid(axis="y", color="#d9dee7", linewidth=0.7)
    drawing.legend_right(axes)
    return figure


@drawing.styled
def distances(rows: Sequence[Mapping]) -> Any:
    """How far the experts of a layer are from each other."""
    columns = 4  # one layer alone is no larger than one of many
    lines = math.ceil(len(rows) / columns)
    figure, grid = drawing.grid(0.4 + 2.5 * lines, lines, columns)
    top = max(1e-6, max(float(np.max(row["distances"])) for row in rows))
    image = None
    for i, axes in enumerate(grid.flat):
        if i >= len(rows):
            axes.set_visible(False)
            continue
        values = np.array(rows[i]["distances"])
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=top)
        if len(values) <= 8:
            for (a, b), value in np.ndenumerate(values):
                color = "white" if value < 0.55 * top else "black"
                axes.text(b, a, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
        axes.set(title=f"layer {rows[i]['layer']}", xlabel="expert", ylabel="expert")
        axes.set_xticks(range(len(values)))
        axes.set_yticks(range(len(values)))
    figure.colorbar(image, ax=grid, label="relative distance", pad=0.01)
    return figure


@drawing.styled
def curves(found: Mapping[str, Mapping]) -> Any:
    """What a run logged about its tokens' gradients, over the steps."""
    figure, axes = drawing.canvas(3.4)
    for n, (name, curve) in enumerate(sorted(found.items())):
        style = ("-", "--", ":", "-.")[n // len(drawing.EXPERTS) % 4]
        axes.plot(curve["steps"], curve["values"], style, color=drawing.EXPERTS[n % len(drawing.EXPERTS)], label=name)
    axes.set(xlabel="training step", ylabel="value")
    drawing.legend_right(axes)
    return figure


def _write_shares(axes: Any, x: np.ndarray, values: np.ndarray, bottom: np.ndarray, color: str) -> None:
    """Writes shares into stacked bars, where there is room for them."""
    light = color in (drawing.ORANGE, drawing.SKY, drawing.YELLOW, drawing.PURPLE)
    style = {"ha": "center", "va": "center", "fontsize": 9, "color": "black" if light else "white"}
    box = {"facecolor": color, "edgecolor": "none", "pad": 1.0}  # over a hatch
    for place, value, low in zip(x, values, bottom, strict=True):
        if value >= 0.06:
            axes.text(place, low + value / 2, f"{value:.0%}", bbox=box, **style)


def _bump(layers: Sequence[int], num_experts: int) -> tuple[Any, Any]:
    figure, axes = drawing.canvas(1.2 + 0.75 * num_experts if num_experts <= 8 else 7.5)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(num_experts) if num_experts <= 16 else range(0, num_experts, 8))
    axes.set(xlabel="decoder layer", ylabel="expert", ylim=(-0.5, num_experts - 0.5))
    axes.grid(axis="x", color="#d9dee7", linewidth=0.7)
    return figure, axes


def _thinned(layers: Sequence[int]) -> Sequence[int]:
    return layers[:: math.ceil(len(layers) / 8)]


def _at(values: Sequence[float | None], e: int) -> float:
    return float(values[e] or 0.0) if e < len(values) else 0.0


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)
