"""A JSON file that holds one long list, read item by item: a window of the text is in memory, never the whole file."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

CHUNK = 1 << 20
"""Bytes that are read at once."""
MAX_ITEM = 1 << 26
"""Characters after which an item is taken for one that never closes."""
_REACH = 12
"""This close to the end of the window a value may go on behind it: half of an escaped pair, a number's exponent."""


def stream_list(file: BinaryIO, name: str) -> Iterator[Any]:
    """Yield the items of the JSON list in `file`, opened in binary mode; `name` stands in the errors.

    Raises ValueError, with the item's number and the byte, when the file is no list, is cut off or broken, is not
    UTF-8, or goes on behind the list. Items before that place have been yielded by then.
    """
    window = _Window(file, name)
    if window.next_character() != "[":
        raise ValueError(f"{name} does not begin with '['; give one JSON list of samples (not one sample per line)")
    window.place += 1
    if window.next_character() != "]":
        yield window.item()
        while window.next_character() == ",":
            window.place += 1
            window.next_character()
            yield window.item()
        if window.next_character() != "]":
            raise window.broken("a ',' or the closing ']' is missing", window.place)
    window.place += 1
    if window.next_character():
        raise window.broken("there is more behind the closing ']'", window.place)


class _Window:
    """The text of a file from its next unread character on, as far as it has been read."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name = file, name
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder()
        self.text, self.place = "", 0
        self.bytes_read = 0
        self.ended = False
        self.items = 0

    def next_character(self) -> str:
        """Move to the next character that is no white space and return it; "" at the end of the file."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in " \t\n\r":
                    return self.text[self.place]
                self.place += 1
            if self.ended:
                return ""
            self._read_on()

    def item(self) -> Any:
        """Return the value that begins at the current place."""
        while True:
            try:
                value, end = self.json.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                goes_on = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - _REACH
                if self.ended or not goes_on:
                    raise self.broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise self.broken(f"it cannot be read ({error})", self.place) from None
            else:
                if end < len(self.text) - _REACH or self.ended:
                    self.place = end
                    self.items += 1
                    return value
            if len(self.text) - self.place > MAX_ITEM:
                raise self.broken(f"no end within {MAX_ITEM:,} characters; is a quotation mark missing?", self.place)
            self._read_on()

    def broken(self, what: str, place: int) -> ValueError:
        """Return the error for the character at `place` of the window."""
        behind = len(self.text[place:].encode()) + len(self.decoder.getstate()[0])
        where = f"item {self.items}, byte {self.bytes_read - behind:,}"
        at_end = place >= len(self.text.rstrip()) or what.startswith("Unterminated string")
        cut = "; the file ends there, was it cut off?" if self.ended and at_end else ""
        return ValueError(f"{self.name} is no valid JSON at {where}: {what}{cut}")

    def _read_on(self) -> None:
        """Forget what has been read and append as much as is left, so that a long item is tried a few times only."""
        data = self.file.read(max(CHUNK, len(self.text) - self.place))
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            at = self.bytes_read + len(data) - len(error.object) + error.start
            raise ValueError(
                f"{self.name} is no UTF-8 text: item {self.items} or a later one, byte {at:,} ({error.reason}); "
                "save the file as UTF-8"
            ) from None
        self.bytes_read += len(data)
        self.text, self.place = self.text[self.place :] + more, 0
