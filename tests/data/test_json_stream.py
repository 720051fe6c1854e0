"""A list read in a window equals the list read whole; whatever is wrong with a file is named with its place."""

import io
import json
import tracemalloc

import pytest
from hypothesis import strategies as st

from dynamic_llava.data import json_stream
from dynamic_llava.data.json_stream import stream_list
from tests.properties import few_or_many, for_all

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def read(data, name="data.json"):
    return list(stream_list(io.BytesIO(data), name))


@few_or_many
def test_the_window_changes_nothing(examples, monkeypatch):
    """For any values, spelling, indentation and size of the window, down to one byte."""

    @for_all(examples, st.lists(VALUES, max_size=6), st.integers(1, 9), st.booleans(), st.sampled_from([None, 0, 3]))
    def check(values, chunk, ascii_only, indent):
        monkeypatch.setattr(json_stream, "CHUNK", chunk)
        data = json.dumps(values, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
        assert read(data) == json.loads(data.decode("utf-8", "surrogatepass"))


@few_or_many
def test_a_file_that_is_cut_anywhere_is_refused(examples, monkeypatch):
    data = json.dumps([{"id": "größe", "n": [1, 2.5, None]}, "text \\u00e4", 12], ensure_ascii=False).encode()

    @for_all(examples, st.integers(0, len(data) - 1), st.integers(1, 50))
    def check(length, chunk):
        monkeypatch.setattr(json_stream, "CHUNK", chunk)
        with pytest.raises(ValueError, match=r"data\.json"):
            read(data[:length])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not begin with '\\['"),
        (b'{"id": 1}\n{"id": 2}', "not one sample per line"),
        (b'[{"id": 1}, {"id": "ab', r"item 1, byte 19: Unterminated string.*was it cut off"),
        (b'[{"id": 1}, {"id": 2}', r"item 2, byte 21: a ',' or the closing '\]' is missing; .*was it cut off"),
        (b'[{"id": 1},', r"item 1, byte 11: Expecting value; .*was it cut off"),
        (b'[{"id": 1} {"id": 2}]', r"item 1, byte 11: a ',' or the closing '\]' is missing$"),
        (b'[{"id": 1}, {"id": oops}, 3]', r"item 1, byte 19: Expecting value$"),
        (b'[{"id": 1}] {"id": 2}', r"byte 12: there is more behind"),
        ('["größe", "'.encode() + b'\xff"]', r"no UTF-8 text: item 0 or a later one, byte 13 "),
        ('["größe'.encode()[:-2], r"no UTF-8 text: .* byte 6 \(unexpected end"),
        (b"[" * 100_000, "cannot be read"),
        (b'["' + b"9" * 10 + b'", ' + b"9" * 5000 + b"]", "item 1, byte 15: it cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(data, message):
    with pytest.raises(ValueError, match=message):
        read(data)


def test_items_before_a_mistake_are_read():
    items = stream_list(io.BytesIO(b'[{"id": 1}, 2, {"id": '), "data.json")
    assert next(items) == {"id": 1} and next(items) == 2
    with pytest.raises(ValueError, match="item 2"):
        next(items)


def test_a_byte_order_mark_is_no_mistake():
    assert read(b"\xef\xbb\xbf[1]") == [1]


def test_a_missing_quotation_mark_does_not_load_the_whole_file(monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_ITEM", 1000)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    file = io.BytesIO(b'["' + b"x" * 100_000)
    with pytest.raises(ValueError, match=r"byte 1: no end within 1,000 characters"):
        list(stream_list(file, "data.json"))
    assert file.tell() < 5000


def test_memory_does_not_grow_with_the_file(monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 1 << 14)
    item = json.dumps({"id": "sample", "text": "word " * 60}).encode()

    def peak(items):
        file = io.BytesIO(b"[" + b",\n".join([item] * items) + b"]")
        tracemalloc.start()
        assert sum(1 for _ in stream_list(file, "data.json")) == items
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(5000) < 1.5 * peak(1000) < 1e6
