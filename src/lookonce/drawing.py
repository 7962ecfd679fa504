"""Small pictures of coloured shapes, for trying a model where no photo is at hand."""

from typing import Literal

from PIL import Image, ImageDraw

__all__ = ["Shape", "draw_scene", "draw_shape"]

Shape = Literal["circle", "square", "triangle"]


def draw_scene() -> Image.Image:
    """Draw a red circle, a blue square and a green triangle in a row on white, 480 x 320."""
    picture = Image.new("RGB", (480, 320), "white")
    draw = ImageDraw.Draw(picture)
    _draw(draw, "circle", "red", (90, 160))
    _draw(draw, "square", "blue", (240, 160))
    _draw(draw, "triangle", "green", (390, 160))
    return picture


def draw_shape(shape: Shape, colour: str, background: str) -> Image.Image:
    """Draw one shape in the middle of 256 x 256."""
    picture = Image.new("RGB", (256, 256), background)
    _draw(ImageDraw.Draw(picture), shape, colour, (128, 128))
    return picture


def _draw(draw: ImageDraw.ImageDraw, shape: Shape, colour: str, centre: tuple[int, int]) -> None:
    x, y = centre
    box = (x - 55, y - 55, x + 55, y + 55)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - 60), (x - 60, y + 50), (x + 60, y + 50)], fill=colour)
