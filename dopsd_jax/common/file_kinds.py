"""Recognises by its first bytes a file whose content is not what its name says."""

FIRST_BYTES = 512  # enough for `kind_of`

_BEGINNINGS = (
    (b"version https://git-lfs", "is a Git LFS pointer; run `git lfs pull`, or download it again"),
    (b"GGUF", "is a GGUF file, which is quantised for other programs; get the safetensors version"),
    (b"PK\3\4", "is a zip archive or a pickle of PyTorch; get the safetensors version"),
    (b"\x80\2", "is a pickle, which may run code when read; get the safetensors version"),
    (b"\x80\4", "is a pickle, which may run code when read; get the safetensors version"),
    (b"\x1f\x8b", "is packed with gzip; unpack it"),
    (b"\x93NUMPY", "is an array of numpy"),
    (b"\x89HDF", "is an HDF5 file; get the safetensors version"),
)
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml")


def kind_of(content: bytes) -> str | None:
    """The kind of file that begins so, and what to do about it; None if it is unknown."""
    for beginning, what in _BEGINNINGS:
        if content.startswith(beginning):
            return what
    if content.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_PAGES):
        return "is a saved web page, not the file; download the file itself again"
    return None
