"""Pictures in a folder, as pixels of the size that a network takes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxfuse.errors import DataError

__all__ = ["Pictures", "read_pictures"]

_ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures of a folder.

    Attributes:
        pixels: Shape (n, channels, height, width), float32, in [0, 1].
        unreadable: Those that are damaged, or are no pictures.
    """

    pixels: NDArray[np.float32]
    unreadable: tuple[Path, ...]


def read_pictures(folder: Path, height: int, width: int, channels: int, most: int) -> Pictures:
    """Read the pictures of a folder and of those inside it, in the order of their paths.

    Every picture is scaled so that it covers the size asked for, and its middle is cut out. Those that can't be read
    are left out.

    Args:
        folder: The folder.
        height: Pixels.
        width: Pixels.
        channels: 3 for colour, 1 for grey.
        most: Read at most so many, evenly spaced over all of them.

    Returns:
        Those that can be read, at least one.

    Raises:
        DataError: There are no pictures, none can be read, or Pillow is not installed.
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
    read: list[Path] = []
    problems: dict[Path, Exception] = {}
    for path in chosen:
        try:
            with Image.open(path) as picture:
                fitted = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (width, height))
        # Pillow's readers of single formats complain of damage in ways of their own.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems[path] = error
        else:
            array = np.asarray(fitted, np.float32).reshape(height, width, channels) / 255
            pixels[len(read)] = array.transpose(2, 0, 1)
            read.append(path)
    if not read:
        first, problem = next(iter(problems.items()))
        what = f"none of the {len(problems)} pictures can be read; the first: {problem}"
        raise DataError(what, where=str(first), mend="check what is in the folder") from problem
    return Pictures(pixels[: len(read)], tuple(problems))
