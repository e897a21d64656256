"""Canvas, style and colours of the figures; the one module that knows matplotlib (extra 'analysis').

The colours are ones that colour-blind people tell apart.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Okabe & Ito, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#000000"
EXPERTS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK)
TEXT, IMAGE = BLUE, ORANGE
GREY = "#5b6475"
_WIDTH = 10.5  # inches: at 110 dots an inch, a page's width
_DPI = 110
_STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
}


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draws with _STYLE, and leaves matplotlib's own settings as they are."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def require() -> None:
    """Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("figures need matplotlib; pip install 'moe_vlm_jax[analysis]'.") from error


def png(figure: Any) -> bytes:
    """Returns the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def pixels(figure: Any) -> np.ndarray:
    """Returns the figure as uint8[H, W, 3]."""
    from matplotlib.backends import backend_agg

    figure.set_dpi(_DPI)
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def canvas(height: float) -> tuple[Any, Any]:
    """Returns a figure of a page's width and so many inches high, and its axes."""
    figure, axes = grid(height, 1, 1)
    return figure, axes[0, 0]


def grid(height: float, rows: int, columns: int) -> tuple[Any, np.ndarray]:
    """Returns a figure of a page's width, and its axes as an array [rows, columns]."""
    from matplotlib import figure as figure_lib

    figure = figure_lib.Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def legend_right(axes: Any, *, reverse: bool = False) -> None:
    """Puts the legend beside the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    order = slice(None, None, -1) if reverse else slice(None)
    axes.legend(handles[order], labels[order], loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def layer_axis(axes: Any, layers: Sequence[int]) -> None:
    """Names places 0, 1, ... of the x axis after decoder layers."""
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    room = 0.5 + max(0, 4 - len(layers)) / 2  # bars of few layers are no walls
    axes.set(xlabel="decoder layer", xlim=(-room, len(layers) - 1 + room))


def expert_color(e: int) -> str:
    """Returns the colour of an expert; the ninth has the first one's again."""
    return EXPERTS[e % len(EXPERTS)]
