"""A page to draw on that knows where its texts are and refuses to let two of them meet.

Shapes are drawn at twice the size and scaled down, for smooth edges; texts are drawn last, at their final size, in the
font that Pillow carries (Aileron), so a page looks the same on every machine.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Color = tuple[int, int, int]
_SCALE = 2
_EDGE = 4  # no text comes nearer to the page's edge


class CrowdedError(Exception):
    """There is no room for a text; the page has to be laid out in another way."""


@dataclasses.dataclass(frozen=True)
class Text:
    """One printed line: what it says and where. `origin` and `anchor` are Pillow's."""

    text: str
    box: Box
    origin: tuple[float, float]
    anchor: str
    size: int
    color: Color
    bold: bool
    halo: Color | None

    def words(self) -> Iterator[tuple[str, Box]]:
        """Each word with its box, from left to right."""
        left, top, _, bottom = self.box
        line = ""
        for word in self.text.split(" "):
            start = text_width(line, self.size, self.bold)
            line += word
            yield word, (left + start, top, left + text_width(line, self.size, self.bold), bottom)
            line += " "


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own scalable font."""
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise ValueError("Pillow was built without FreeType, and its bitmap font has one size; install Pillow's wheel.")
    return loaded


def text_width(text: str, size: int, bold: bool = False) -> float:
    """Advance width in pixels."""
    return font(size).getlength(text) + (2 * _stroke(size) if bold and text else 0)


def line_height(size: int) -> int:
    """Distance between two lines of a paragraph."""
    return math.ceil(1.25 * size)


def wrap(text: str, size: int, width: float, bold: bool = False) -> list[str]:
    """The text in lines of at most `width` pixels, as few as words allow."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, bold) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
        if text_width(lines[-1], size, bold) > width:
            raise CrowdedError(f"{word!r} is wider than {width:.0f} px")
    return lines


class Page:
    """The page: shapes at once, texts noted down and drawn by `image`."""

    def __init__(self, width: int, height: int, background: Color):
        self.width, self.height, self.background = width, height, background
        self.texts: list[Text] = []
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), background)
        self._pen = ImageDraw.Draw(self._image)

    def text(
        self,
        origin: tuple[float, float],
        text: str,
        size: int,
        color: Color,
        *,
        anchor: str = "la",
        bold: bool = False,
        halo: Color | None = None,
    ) -> Box:
        """Prints one line; raises CrowdedError where it would leave the page or meet another text.

        `halo` outlines the letters in the colour of the ground, for text that lies on lines.
        """
        box = self.measure(origin, text, size, anchor=anchor, bold=bold)
        if not self.has_room(box):
            raise CrowdedError(f"no room for {text!r}")
        self.texts.append(Text(text, box, origin, anchor, size, color, bold, halo))
        return box

    def measure(
        self, origin: tuple[float, float], text: str, size: int, *, anchor: str = "la", bold: bool = False
    ) -> Box:
        """The box that `text` would take."""
        stroke = _stroke(size) if bold else 0
        left, top, right, bottom = font(size).getbbox(text, anchor=anchor, stroke_width=stroke)
        x, y = origin
        return (math.floor(x + left), math.floor(y + top), math.ceil(x + right), math.ceil(y + bottom))

    def has_room(self, box: Box) -> bool:
        """Whether a text box lies on the page and meets no other."""
        left, top, right, bottom = box
        if left < _EDGE or top < _EDGE or right > self.width - _EDGE or bottom > self.height - _EDGE:
            return False
        return not any(
            left < other.box[2] + 1
            and other.box[0] - 1 < right
            and top < other.box[3] + 1
            and other.box[1] - 1 < bottom
            for other in self.texts
        )

    def paragraph(
        self,
        box: Box,
        text: str,
        size: int,
        color: Color,
        *,
        align: str = "left",
        bold: bool = False,
    ) -> float:
        """Prints a text in lines from the top of the box; returns where the next thing may begin."""
        left, top, right, bottom = box
        x, anchor = {"left": (left, "la"), "center": ((left + right) / 2, "ma"), "right": (right, "ra")}[align]
        for line in wrap(text, size, right - left, bold):
            self.text((x, top), line, size, color, anchor=anchor, bold=bold)
            top += line_height(size)
        if top > bottom + 1:
            raise CrowdedError(f"{text!r} is too long")
        return top

    def rectangle(self, box: Box, color: Color, *, radius: float = 0, outline: Color | None = None) -> None:
        """A filled rectangle."""
        scaled = [_SCALE * value for value in box]
        if scaled[2] - scaled[0] >= 1 and scaled[3] - scaled[1] >= 1:
            self._pen.rounded_rectangle(scaled, _SCALE * radius, fill=color, outline=outline, width=_SCALE)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: float) -> None:
        """A line through the points."""
        scaled = [(_SCALE * x, _SCALE * y) for x, y in points]
        self._pen.line(scaled, fill=color, width=round(_SCALE * width), joint="curve")

    def disc(self, center: tuple[float, float], radius: float, color: Color) -> None:
        """A filled circle."""
        x, y = center
        self._pen.ellipse([_SCALE * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=color)

    def polygon(self, points: Sequence[tuple[float, float]], color: Color) -> None:
        """A filled polygon."""
        self._pen.polygon([(_SCALE * x, _SCALE * y) for x, y in points], fill=color)

    def slice(
        self, center: tuple[float, float], radius: float, angles: tuple[float, float], color: Color, ground: Color
    ) -> None:
        """A slice of a pie with an edge in the ground's colour; angles in degrees clockwise from three o'clock."""
        x, y = center
        box = [_SCALE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        self._pen.pieslice(box, *angles, fill=color, outline=ground, width=_SCALE)

    def image(self) -> Image.Image:
        """The finished page, RGB."""
        image = self._image.resize((self.width, self.height), Image.Resampling.BOX)
        pen = ImageDraw.Draw(image)
        for text in self.texts:
            stroke = 2 if text.halo else _stroke(text.size) if text.bold else 0
            outline = text.halo or text.color
            pen.text(
                text.origin,
                text.text,
                fill=text.color,
                font=font(text.size),
                anchor=text.anchor,
                stroke_width=stroke,
                stroke_fill=outline,
            )
        return image


def _stroke(size: int) -> int:
    """Outline that makes the regular weight bold; letters smaller than this would clog."""
    return 0 if size < 26 else 1
