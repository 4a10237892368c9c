"""Pictures in a folder, as pixels of the size that a network takes."""

from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxfuse.errors import DataError

__all__ = ["read_pictures"]

Pixels: TypeAlias = NDArray[np.float32]

_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def read_pictures(folder: Path, height: int, width: int, channels: int, most: int) -> Pixels:
    """Read the pictures of a folder and of those inside it, in the order of their paths.

    Every picture is scaled so that it covers the size asked for, and its middle is cut out.

    Args:
        folder: The folder.
        height: Pixels.
        width: Pixels.
        channels: 3 for colour, 1 for grey.
        most: Read at most so many, evenly spaced over all of them.

    Returns:
        Shape (n, channels, height, width), in [0, 1].

    Raises:
        DataError: There are no pictures, one can't be read, or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        what = "pictures can't be read without Pillow"
        raise DataError(what, where=str(folder), mend="pip install 'onnxfuse[images]', or give an .npz file") from error
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    if not paths:
        what = "there are no pictures in this folder"
        raise DataError(what, where=str(folder), mend=f"known endings: {', '.join(sorted(_ENDINGS))}")
    chosen = [paths[i * len(paths) // min(len(paths), most)] for i in range(min(len(paths), most))]
    pixels = np.empty((len(chosen), channels, height, width), np.float32)
    for place, path in zip(pixels, chosen, strict=True):
        try:
            with Image.open(path) as picture:
                fitted = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (width, height))
        except (OSError, ValueError) as error:
            what = f"this picture can't be read: {error}"
            raise DataError(what, where=str(path), mend="remove or replace it") from error
        array = np.asarray(fitted, np.float32).reshape(height, width, channels) / 255
        place[:] = array.transpose(2, 0, 1)
    return pixels
