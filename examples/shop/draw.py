"""Draws the jars in static/: `python -m shop.draw`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 96  # pixels
COLOURS = {
    "apricot": "#f2a33c",
    "blackcurrant": "#3b1f4a",
    "gooseberry": "#a9b665",
    "lemon": "#f4dc5b",
    "plum": "#7a2f57",
    "quince": "#d9822b",
    "raspberry": "#c2274b",
}


def jar(colour: str) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), "#fffdf8")
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((24, 20, 72, 88), 10, fill=colour, outline="#555", width=2)
    draw.rectangle((28, 10, 68, 22), fill="#c9a24b", outline="#555", width=2)
    draw.rectangle((32, 42, 64, 66), fill="#fffdf8")
    return image.quantize(16)


if __name__ == "__main__":
    for name, colour in COLOURS.items():
        jar(colour).save(Path(__file__).parent / "static" / f"{name}.png", optimize=True)
