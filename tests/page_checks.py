"""Pages as a test reads them."""

import base64
import html.parser
import io

from PIL import Image

VOID = {"meta", "img", "input", "line", "polyline", "polygon", "circle", "br"}


class Page(html.parser.HTMLParser):
    """Tags and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self._open, self._elements = [], []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            around = [name for name, _ in self._open]
            self._open.append((tag, []))
            self._elements.append((tag, around, self._open[-1][1]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        name, _ = self._open.pop()
        assert name == tag

    def handle_data(self, data):
        self.text.append(data)
        for _, texts in self._open:
            texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def inside(self, tag, around, but=None):
        """The texts of the elements `tag` somewhere inside an element `around`, in none `but`."""
        return [
            "".join(texts)
            for name, path, texts in self._elements
            if name == tag and around in path and but not in path
        ]

    def by_id(self, name):
        (found,) = [attrs for _, attrs in self.tags if attrs.get("id") == name]
        return found

    def picture(self, attrs):
        """The picture inside an img."""
        return Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))


def points(page, tag="polyline"):
    """Of every line of a page, or other figure, its points (x, y)."""
    return [
        [tuple(map(float, pair.split(","))) for pair in attrs["points"].split()]
        for attrs in page.all(tag)
    ]
