"""HTML and SVG put together from pieces, every text escaped: the one place where tags are made."""

import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup already; any other ``str`` is somebody's name and gets escaped."""

    __slots__ = ()


def text(value: object) -> Html:
    """A value as escaped text, or markup as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """One element. ``class_`` is ``class``, and ``_`` in a name of an attribute is ``-``."""
    listed = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{listed}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Html:
    """One after another."""
    return Html("".join(map(text, children)))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Html:
    """A table that scrolls on narrow screens; ``numbers`` are the columns that are aligned right."""

    def row(kind: str, cells: Sequence[object]) -> Html:
        return tag(
            "tr", *(tag(kind, cell, **({"class_": "number"} if i in numbers else {})) for i, cell in enumerate(cells))
        )

    head = tag("thead", row("th", heads)) if any(heads) else Html("")
    body = tag("tbody", *(row("td", cells) for cells in rows))
    return tag("div", tag("table", head, body), class_="wide")
