"""A folder of pictures as a phone leaves them, to try a recipe (docs/recipes) from the start.

    python -m dopsd_jax.miniature.phone_folder --out photos

One concept of the miniature's world in several arrangements: large JPEGs that lie on their side and
say so in EXIF, one HEIC where pillow-heif is installed, names that tell nothing, no captions.
"""

from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import UInt8
from PIL import ExifTags, Image

from dopsd_jax.common import program
from dopsd_jax.common.atomic import atomic_folder
from dopsd_jax.common.files import expand
from dopsd_jax.data import heic
from dopsd_jax.miniature import concepts, render, world

LONG, SHORT = 4032, 3024  # pixels of a phone's picture
COUNT, MOST = 7, 200
# EXIF orientations, and what the stored pixels are of the upright ones.
TURNED = {
    6: Image.Transpose.ROTATE_90,  # held upright
    1: None,
    8: Image.Transpose.ROTATE_270,  # upright, on its head
    3: Image.Transpose.ROTATE_180,
}


def write_folder(folder: Path, count: int = COUNT, seed: int = 0) -> list[str]:
    """Writes `count` pictures of one concept; returns their names.

    Their middle squares are the world's pictures. The last one is a HEIC where that can be written.
    Raises `UserError` if the folder holds something already.
    """
    rng = np.random.default_rng(seed)
    scenes = concepts.arrangements(rng, world.random_concept(rng), "", count)
    images = world.pictures(scenes, rng)
    with atomic_folder(folder) as partial:
        for i, image in enumerate(images):
            orientation = list(TURNED)[i % len(TURNED)]
            last = i == len(images) - 1 and heic.available()
            name = f"IMG_{i + 1:04d}.{'HEIC' if last else 'JPG'}"
            taken(image, orientation).save(
                partial / name, heic.FORMAT if last else "JPEG", quality=90,
                exif=exif(orientation, i).tobytes(),
            )  # fmt: skip
        return sorted(path.name for path in partial.iterdir())


def taken(image: UInt8[np.ndarray, "s s 3"], orientation: int) -> Image.Image:
    """A picture as a phone in this orientation stores it; more ground on the two long ends."""
    upright = orientation in (6, 8)
    more = round(render.SIDE * (LONG / SHORT - 1) / 2)
    ends = ((more, more), (0, 0), (0, 0)) if upright else ((0, 0), (more, more), (0, 0))
    size = (SHORT, LONG) if upright else (LONG, SHORT)
    picture = Image.fromarray(np.pad(image, ends, "edge")).resize(size, Image.Resampling.BICUBIC)
    turned = TURNED[orientation]
    return picture if turned is None else picture.transpose(turned)


def exif(orientation: int, number: int) -> Image.Exif:
    """What a phone says of its picture of this number: camera, time, exposure and place."""
    base, gps = ExifTags.Base, ExifTags.GPS
    time = f"2026:05:{1 + number % 28:02d} 10:{number % 60:02d}:00"
    found = Image.Exif()
    found[base.Orientation] = orientation
    found[base.Make], found[base.Model], found[base.DateTime] = "Miniature", "Phone 1", time
    found[ExifTags.IFD.Exif] = {
        base.DateTimeOriginal: time,
        base.ExposureTime: 1 / 120,
        base.FNumber: 1.8,
        base.ISOSpeedRatings: 64,
    }
    found[ExifTags.IFD.GPSInfo] = {
        gps.GPSLatitudeRef: "N",
        gps.GPSLatitude: (0.0, 0.0, 0.0),
        gps.GPSLongitudeRef: "E",
        gps.GPSLongitude: (0.0, 0.0, 0.0),
    }
    return found


def main() -> None:
    folder = expand(flags.FLAGS.out)
    names = write_folder(folder, flags.FLAGS.count, flags.FLAGS.seed)
    missing = "" if heic.available() else "; no HEIC, which needs pillow-heif"
    print(f"{folder}: {names[0]} to {names[-1]}, without captions{missing}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "folder to write", required=True)
    flags.DEFINE_integer("count", COUNT, "pictures", 1, MOST)
    flags.DEFINE_integer("seed", 0, "of what is on the pictures", 0)
    program.run(main)
