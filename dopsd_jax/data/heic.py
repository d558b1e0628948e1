"""HEIC pictures, as phones take them: read with pillow-heif, where that is installed."""

import functools

SUFFIXES = (".heic", ".heif")
FORMAT = "HEIF"  # Pillow's name
BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # bytes 8 to 11
MISSING = (
    "HEIC is read with pillow-heif, which is not installed; pip install 'dopsd_jax[heic]', or "
    "convert it to PNG or JPEG"
)


@functools.cache
def available() -> bool:
    """Whether HEIC can be read; tells Pillow how."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True
