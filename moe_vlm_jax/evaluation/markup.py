"""HTML that the pages of an evaluation have in common: the frame, its style, pictures, answers with their marks.

A page needs no network and no other file: images are data URLs, the style is inline, and so is the script of the pages
that have one. A policy in the head says so to the browser; it lets that script run, by its hash, and no other.
Functions take texts as they are and return HTML in which they are escaped.
"""

import base64
import hashlib
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from PIL import Image

IMAGE_SIDE = 440  # pixels of an image on a page; larger ones are reduced


def document(*, title: str, note: str, style: str, body: str, script: str = "") -> str:
    """Returns a whole page.

    Args:
      title: heading, a text.
      note: one sentence below it, a text.
      style: CSS rules beside STYLE.
      body: HTML.
      script: JavaScript that runs when the page is read; without a closing tag in it.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _DOCUMENT.format(
        title=html.escape(title),
        note=html.escape(note),
        policy=_POLICY + (f"; script-src 'sha256-{digest}'" if script else ""),
        style=STYLE + style,
        body=body + (f"\n<script>{script}</script>" if script else ""),
    )


def table(*, caption: str, heads: Iterable[str], bodies: Iterable[str]) -> str:
    """Returns a table that scrolls by itself where the window is narrow.

    Args:
      caption: a text.
      heads: of the columns, HTML: <th> elements.
      bodies: HTML: the rows of each <tbody>.
    """
    return (
        f'<div class="scroll"><table><caption>{html.escape(caption)}</caption><thead><tr>{"".join(heads)}</tr></thead>'
        + "".join(f"<tbody>{rows}</tbody>" for rows in bodies)
        + "</table></div>"
    )


def card(
    images: Sequence[Any],
    questions: Iterable[str],
    load_image: Callable[[Any], Image.Image],
    *,
    classes: Iterable[str] = (),
) -> str:
    """Returns the images of some questions beside them.

    Args:
      images: references.
      questions: HTML: <li> elements.
      load_image: image reference -> PIL image.
      classes: CSS classes.
    """
    return card_of(map(picture, map(_data_url, map(load_image, images))), questions, classes=classes)


def card_of(pictures: Iterable[str], questions: Iterable[str], *, classes: Iterable[str] = ()) -> str:
    """Returns pictures with the questions beside them.

    Args:
      pictures: HTML.
      questions: HTML: <li> elements.
      classes: CSS classes.
    """
    shown = "".join(pictures)
    figure = f"<figure>{shown}</figure>" if shown else ""
    return f"<article{_classes(classes)}>{figure}<ol>{''.join(questions)}</ol></article>"


def picture(url: str) -> str:
    """Returns the <img> element of a data URL."""
    return f'<img alt="the picture of these questions" src="{url}">'


def thumbnail(image: Image.Image, *, side: int) -> str:
    """Returns a picture of at most so many pixels a side as a data URL: PNG or JPEG, whichever is shorter."""
    image = _sized(image, side)
    return min((_encoded(image, "PNG", optimize=True), _encoded(image, "JPEG", quality=82)), key=len)


def question(
    text: str,
    answer_type: str,
    lines: Iterable[tuple[str, str]],
    *,
    classes: Iterable[str] = (),
    data: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Returns a question with what was answered.

    Args:
      text: the question.
      answer_type: shown beside it; may be empty.
      lines: (name, a text; HTML: its <dd> element) of each answer.
      classes: CSS classes.
      data: data-* attributes by name, for a script: texts.
    """
    kind = f'<span class="kind">{html.escape(answer_type)}</span>' if answer_type else ""
    answers = "".join(f"<dt>{html.escape(name)}</dt>{answer}" for name, answer in lines)
    attributes = "".join(f' data-{name}="{html.escape(value)}"' for name, value in data.items())
    return f"<li{_classes(classes)}{attributes}><p>{html.escape(text)} {kind}</p><dl>{answers}</dl></li>"


def accepted(answers: Sequence[str]) -> str:
    """Returns the <dd> element of the accepted answers, each once."""
    return f"<dd>{' <i>or</i> '.join(html.escape(answer) for answer in dict.fromkeys(answers))}</dd>"


def verdict(row: Mapping, remarks: Sequence[str] = ()) -> str:
    """Returns the <dd> element of an answer with a sign and a word for right or wrong: colour is never the only mark.

    Args:
      row: a prediction, with keys prediction, exact_match and anls.
      remarks: texts behind the mark.
    """
    near = f" (ANLS {row['anls']:.2f})" if row["anls"] else ""
    mark = "✓ right" if row["exact_match"] else f"✗ wrong{near}"
    return marked(row["prediction"], mark, "right" if row["exact_match"] else "wrong", remarks)


def marked(prediction: str, mark: str, kind: str, remarks: Sequence[str] = ()) -> str:
    """Returns the <dd> element of an answer with its mark.

    Args:
      prediction: a text.
      mark: a text.
      kind: CSS class.
      remarks: texts behind the mark.
    """
    text = html.escape(prediction) or "<i>nothing</i>"
    said = "".join(f' <span class="kind">{html.escape(remark)}</span>' for remark in remarks)
    return f'<dd class="{kind}">{text} <b>{html.escape(mark)}</b>{said}</dd>'


def _classes(names: Iterable[str]) -> str:
    joined = " ".join(names)
    return f' class="{joined}"' if joined else ""


def _data_url(image: Image.Image) -> str:
    return _encoded(_sized(image, IMAGE_SIDE), "PNG", optimize=True)


def _sized(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((side, side))
    factor = side // max(image.size)
    if factor > 1:  # tiny renderings: whole multiples keep their pixels crisp
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return image


def _encoded(image: Image.Image, form: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return f"data:image/{form.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{note}</p>
{body}
</body>
</html>
"""

STYLE = """\
:root { color-scheme: light dark; --ink: #1c2230; --soft: #5b6475; --line: #d9dee7; --page: #f6f7f9; --card: #fff;
  --right: #0b6b3a; --wrong: #a32020; --lead: #eaf1fb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #343b48; --page: #14171d;
  --card: #1d2129; --right: #6fd39b; --wrong: #f19a9a; --lead: #223047; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; }
.note { color: var(--soft); margin: 0 0 1.4rem; max-width: 75ch; }
.tables { display: flex; flex-wrap: wrap; gap: 1.25rem; align-items: flex-start; }
.scroll { max-width: 100%; overflow-x: auto; }
table { border-collapse: collapse; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 .4rem; }
th, td { padding: .3rem .55rem; text-align: right; border-top: 1px solid var(--line); }
thead th { font-weight: 600; color: var(--soft); border-top: 0; }
th[scope=row], thead th:first-child { text-align: left; font-weight: 500; }
.cards { columns: 2 480px; column-gap: 1.25rem; }
article { break-inside: avoid; margin: 0 0 1.25rem; padding: 1rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; display: flex; gap: 1rem; align-items: flex-start; min-width: 0; }
figure { margin: 0; flex: 0 0 38%; max-width: 38%; display: grid; gap: .5rem; }
img { width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
ol { margin: 0; padding: 0; list-style: none; flex: 1; min-width: 0; }
li + li { border-top: 1px solid var(--line); margin-top: .7rem; padding-top: .7rem; }
li p { margin: 0 0 .3rem; font-weight: 600; overflow-wrap: anywhere; }
.kind { font-weight: 400; font-size: .8rem; color: var(--soft); white-space: nowrap; }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .1rem .7rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
dd b { font-weight: 600; font-size: .85rem; white-space: nowrap; }
.right b { color: var(--right); }
.wrong b { color: var(--wrong); }
@media (max-width: 640px) { article { flex-direction: column; } figure { max-width: 260px; flex: none; } }
"""
