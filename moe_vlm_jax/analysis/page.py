"""The images of a routing analysis, and one self-contained HTML page of them and of the figures behind them."""

import base64
import html
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_vlm_jax.analysis import drawing, figures, summary
from moe_vlm_jax.evaluation import markup, outputs

_KINDS_OF_CLASS = {
    "modality": "modality, all tokens",
    "part": "part of the answer, text",
    "kind": "kind of word, text",
    "region": "image region, image",
}


class Image(NamedTuple):
    """Attributes: name of the file without '.png', title, what it shows (a text), the PNG file."""

    name: str
    title: str
    text: str
    png: bytes


def draw(found: Mapping[str, Any], *, counting: str, other: Mapping[str, Any] | None) -> list[Image]:
    """Returns the images of a summary.

    Args:
      found: from `summary.summarize`, with 'weights' and 'gradient_consistency'.
      counting: one of summary.COUNTINGS.
      other: the summary of a run to compare with, or None; of the same MoE layers.
    """
    counted = found["counting"][counting]
    layers, numbers = counted["layers"], [layer["layer"] for layer in counted["layers"]]
    num_experts = max(len(layer["load"]) for layer in layers)
    runs = {found["about"]["name"]: layers}
    if other is not None:
        if numbers != [layer["layer"] for layer in other["counting"][counting]["layers"]]:
            raise ValueError(
                "the two runs have MoE layers in different places, so they have no common axis; compare runs of one "
                "architecture."
            )
        name = other["about"]["name"]
        runs[name if name not in runs else f"{name} (2)"] = other["counting"][counting]["layers"]
    drawn = {
        "load": figures.load(runs, counting=counting),
        "layers": figures.layer_figures(runs),
        "modality": figures.modality_shares(layers, counting=counting),
        "preference": figures.preferences(layers, counting=counting),
        "information": figures.information(layers, names=_KINDS_OF_CLASS, counting=counting),
        "classes": figures.classes(layers, names={key: names for key, (names, _) in summary.CLASSES.items()}),
        "paths": figures.paths(counted["paths"], numbers, num_experts),
    }
    if found["pca_paths"]:
        drawn["paths_pca"] = figures.pca_paths(found["pca_paths"], numbers, num_experts)
    if found["weights"]:
        drawn["distances"] = figures.distances(found["weights"])
        if all(row["drift"] is not None for row in found["weights"]):
            drawn["drift"] = figures.drift(found["weights"])
    if found["gradient_consistency"]:
        drawn["gradients"] = figures.curves(found["gradient_consistency"])
    return [Image(name, *_TEXTS[name], drawing.png(figure)) for name, figure in drawn.items()]


def write(
    folder: str | os.PathLike,
    found: Mapping[str, Any],
    images: list[Image],
    *,
    counting: str,
    other: Mapping[str, Any] | None,
) -> pathlib.Path:
    """Writes the images and the page, and returns the page's path.

    Args:
      folder: where; it exists.
      found: the summary.
      images: of it, from `draw`.
      counting: one of summary.COUNTINGS.
      other: the summary of a run that was compared with, or None.
    """
    folder = pathlib.Path(folder)
    for image in images:
        (folder / f"{image.name}.png").write_bytes(image.png)
    tables = _layer_table(found, counting)
    if other is not None:
        tables += _layer_table(other, counting)
    absent = _absent(found)
    body = f'<div class="tables">{_verdict(found)}</div>' + "".join(_figure(image) for image in images)
    body += f'<h2>Figures by layer</h2><div class="tables">{tables}{_path_table(found, counting)}</div>'
    if absent:
        body += "<h2>Not measured</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in absent) + "</ul>"
    about = found["about"]
    note = (
        f"{found['samples']} samples of {about['data']}, {found['tokens']['text']} text and {found['tokens']['image']} "
        f"image tokens, with the accepted answers behind the questions. Counted are {counting} choices of "
        "experts; routing.json has the others too."
    )
    path = folder / "routing.html"
    text = markup.document(title=f"Routing of {about['name']}", note=note, style=_STYLE, body=body)
    outputs.write_atomically(path, text)
    return path


def _figure(image: Image) -> str:
    data = base64.b64encode(image.png).decode("ascii")
    return (
        f'<section><h2>{html.escape(image.title)}</h2><p class="note">{html.escape(image.text)}</p>'
        f'<img alt="{html.escape(image.title)}" src="data:image/png;base64,{data}"></section>'
    )


def _verdict(found: Mapping[str, Any]) -> str:
    verdict, limits = found["verdict"], found["thresholds"]

    def named(layers: list[int]) -> str:
        return ", ".join(map(str, layers)) or "none"

    rows = [
        ("mean load entropy (1 = even)", _number(verdict["mean_load_entropy"])),
        ("mean coefficient of variation of the load", _number(verdict["mean_load_variation"])),
        ("mean divergence of text and image (bit)", _number(verdict["mean_divergence_bits"])),
        (f"layers ruled by one expert (dominance ≥ {limits['dominated']})", named(verdict["dominated_layers"])),
        (f"layers that route text and image alike (< {limits['alike_bits']} bit)", named(verdict["layers_alike"])),
        (f"layers that tell them apart (≥ {limits['apart_bits']} bit)", named(verdict["layers_apart"])),
    ]
    cells = "".join(f'<tr><th scope="row">{html.escape(k)}</th><td>{html.escape(v)}</td></tr>' for k, v in rows)
    heads = ['<th scope="col">first choices</th>', '<th scope="col">value</th>']
    return markup.table(caption="In short", heads=heads, bodies=[cells])


def _layer_table(found: Mapping[str, Any], counting: str) -> str:
    keys = ("load_entropy", "load_variation", "dominance", "divergence_bits")
    names = ["layer", "load entropy", "variation", "dominance", "text / image (bit)"]
    names += [f"{key} (bit)" for key in summary.CLASSES]
    rows = ""
    for layer in found["counting"][counting]["layers"]:
        cells = [_number(layer[key]) for key in keys]
        cells += [_number(layer["information"][key]["bits"]) for key in summary.CLASSES]
        rows += f'<tr><th scope="row">{layer["layer"]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = [f'<th scope="col">{name}</th>' for name in names]
    return markup.table(caption=f"{found['about']['name']}, {counting}", heads=heads, bodies=[rows])


def _path_table(found: Mapping[str, Any], counting: str) -> str:
    paths = found["counting"][counting]["paths"]
    rows = "".join(
        f'<tr><th scope="row">{_path(path)}</th><td>{text + image}</td><td>{(text + image) / paths["tokens"]:.2%}</td>'
        f"<td>{text}</td><td>{image}</td></tr>"
        for path, text, image in zip(paths["paths"], paths["text"], paths["image"], strict=True)
    )
    heads = [f'<th scope="col">{name}</th>' for name in ("experts by layer", "tokens", "share", "text", "image")]
    caption = f"Most frequent of {paths['distinct']} different paths"
    return markup.table(caption=caption, heads=heads, bodies=[rows])


def _path(path: list) -> str:
    return " → ".join("+".join(map(str, step)) if isinstance(step, list) else str(step) for step in path)


def _absent(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if not found["weights"]:
        lines.append("Distances between experts' weights: this analysis read a routing log only.")
    elif found["weights"][0]["drift"] is None:
        lines.append("Drift from the dense parent: name its folder with --dense.")
    if not found["gradient_consistency"]:
        lines.append("Gradient consistency: no run with figures 'stgc/...' in its metrics.jsonl was given.")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# Image -> its title, and what it shows.
_TEXTS = {
    "load": (
        "Expert load",
        "Share of each expert in what a layer's tokens choose, text and image together.",
    ),
    "layers": (
        "Evenness, dominance, divergence",
        "Load entropy is over its greatest value. Dominance is how far the most chosen expert stands above an"
        " even load: 1 means that every token chooses it. Text against image is the Jensen-Shannon divergence"
        " of their experts: 0 means alike, 1 bit means that they share no expert.",
    ),
    "modality": (
        "Text and image in each expert",
        "Of the tokens of each expert, how many would be text and how many image if a sample had as many of "
        "one as of the other. At the dotted line an expert prefers neither.",
    ),
    "preference": (
        "Experts of text, experts of images",
        "Where a token of each modality goes, layer by layer; dotted: an even load.",
    ),
    "information": (
        "What experts specialise in",
        "How many bits the expert of a token tells about its class. Black lines are what independent draws of"
        " as many tokens would show; tokens of one sample are not independent, so bars near them mean "
        "nothing.",
    ),
    "classes": (
        "Experts by class of token",
        "Where the tokens of each class go. A class belongs to the token that enters the layer.",
    ),
    "paths": (
        "Activated pathways",
        "The ten most frequent sequences of experts through the MoE layers, counted exactly; equal steps lie "
        "side by side.",
    ),
    "paths_pca": (
        "Pathways as published",
        "The view of the MoE-LLaVA paper: a PCA of experts' numbers, components scaled and cut into experts. "
        "Numbers of experts are no quantities, so lines are directions of variation and not paths that tokens"
        " take.",
    ),
    "distances": (
        "Experts from each other",
        "Norm of the difference of two experts' weights over an expert's norm: 0 means equal, 1.41 unrelated.",
    ),
    "drift": (
        "Experts from their dense parent",
        "How far training has moved each expert from the dense feed-forward that it was copied from.",
    ),
    "gradients": (
        "Tokens' gradients in training",
        "What the run logged about the gradients of the tokens of an expert.",
    ),
}
_STYLE = """\
section { margin: 0 0 1.5rem; }
section img { border-radius: 8px; }
section .note { margin-bottom: .6rem; }
li { color: var(--soft); }
ul { margin: 0; padding-left: 1.2rem; }
"""
