"""Pictures made by a formula, the same on every machine, for comparisons with the reference.

Whole-number arithmetic only; knows nothing of models.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["make_picture"]


def make_picture(width: int, height: int, number: int = 0) -> NDArray[np.uint8]:
    """Give an RGB picture, uint8 (height, width, 3): gradients, a chequerboard, a disc and fine grain.

    `number` moves all of them, so that pictures of one size differ.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    picture = np.empty((height, width, 3), dtype=np.int64)
    picture[..., 0] = 255 * x // width
    picture[..., 1] = 255 * y // height
    picture[..., 2] = 40 * (number % 6) + 20
    picture += (((x // 24) + (y // 16) + number) % 2 * 70)[..., None]
    centre_x, centre_y = (number * 37 + 50) % 100 * width // 100, (number * 53 + 40) % 100 * height // 100
    disc = (x - centre_x) ** 2 + (y - centre_y) ** 2 < (min(width, height) // 3) ** 2
    picture[disc] = ((number * 90 + 30) % 256, (number * 60 + 200) % 256, (number * 120 + 90) % 256)
    picture += ((x * 2_654_435_761 + y * 40_503 + number * 97) % 65_521 % 48 - 24)[..., None]
    return np.clip(picture, 0, 255).astype(np.uint8)
