"""What a browser would make of a page that we write, and what every such page must hold to."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image

HOSTILE = '<script>alert("x")</script> & <img src=http://evil.example/x onerror=alert(1)> \'"$5 $6'


class Page(HTMLParser):
    """What a browser would make of a page: pictures, addresses, tags, and the texts of elements by their class."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.images, self.drawings = [], [], [], []
        self.texts, self._open = {}, []
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "svg":
            self.drawings.append(dict(attributes))
        if tag not in ("img", "meta"):
            self._open.append((tag, dict(attributes).get("class", tag)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open and self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self._open:
            self.texts.setdefault(name, []).append(data)


def pixels_of(image):
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def check_alone(text):
    """Nothing in it leads outside, nothing runs, every picture says what it shows."""
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "poster", "xlink:href")]
    assert all(value.startswith("data:image/png;base64,") for value in addresses)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    css = "".join(page.texts["style"])
    assert "url(" not in css and "@import" not in css and "prefers-color-scheme: dark" in css
    assert any(value and "default-src 'none'" in value for name, value in page.attributes if name == "content")
    assert all(image["alt"].strip() for image in page.images)
    assert all(one.get("aria-label") or one.get("aria-hidden") == "true" for one in page.drawings)
    return page
