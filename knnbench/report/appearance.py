"""How each backend looks: a colour, a shape and a filling that stay the same on every chart and page.

Colours have a contrast of 3 to 1 at the least on the light and on the dark background (WCAG 2.2, 1.4.11), and no
two backends share colour, shape and filling, so that none is told by its colour alone.
"""

import zlib
from dataclasses import dataclass

__all__ = ["BACKGROUNDS", "COLOURS", "Look", "look_of"]

BACKGROUNDS = {"light": "#ffffff", "dark": "#15191e"}

COLOURS = {
    "blue": "#2b7bba",
    "red": "#d5473d",
    "green": "#2e8b57",
    "orange": "#c8701c",
    "purple": "#9163bd",
    "pink": "#c9539b",
    "brown": "#94683f",
    "grey": "#7b8088",
    "teal": "#16898e",
    "olive": "#85861f",
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a backend is drawn.

    Attributes
    ----------
    colour : str
        ``#rrggbb``.
    shape : str
        A symbol of Vega.
    filled : bool
        Own backends are, peers are not.
    """

    colour: str
    shape: str
    filled: bool


_LOOKS = {
    "python": Look(COLOURS["brown"], "triangle-down", True),
    "numpy": Look(COLOURS["blue"], "circle", True),
    "numba": Look(COLOURS["red"], "diamond", True),
    "numba-cuda": Look(COLOURS["pink"], "triangle-up", True),
    "cupy": Look(COLOURS["green"], "square", True),
    "torch": Look(COLOURS["orange"], "cross", True),
    "torch-cuda": Look(COLOURS["purple"], "triangle-right", True),
    "notebook": Look(COLOURS["grey"], "triangle-left", False),
    "torch-cdist": Look(COLOURS["olive"], "cross", False),
    "torch-cdist-cuda": Look(COLOURS["pink"], "triangle-right", False),
    "torch-mm": Look(COLOURS["blue"], "cross", False),
    "torch-mm-cuda": Look(COLOURS["blue"], "triangle-right", False),
    "scipy": Look(COLOURS["teal"], "triangle-up", False),
    "sklearn": Look(COLOURS["purple"], "square", False),
    "faiss": Look(COLOURS["green"], "circle", False),
}

_SHAPES = ("circle", "square", "cross", "diamond", "triangle-up", "triangle-down", "triangle-right", "triangle-left")


def look_of(backend: str, peer: bool = False) -> Look:
    """Return how a backend is drawn; a third party's look follows from its name alone.

    Examples
    --------
    >>> look_of("numba")
    Look(colour='#d5473d', shape='diamond', filled=True)
    >>> look_of("mine") == look_of("mine")
    True
    """
    if backend in _LOOKS:
        return _LOOKS[backend]
    code = zlib.crc32(backend.encode(errors="surrogatepass"))
    colours = list(COLOURS.values())
    return Look(colours[code % len(colours)], _SHAPES[code // len(colours) % len(_SHAPES)], not peer)
