"""The stream of chunks, taken apart."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_core._models.code import CHUNK
from dstack_core._server.code_routes import ChunkReader
from dstack_core._store import CodeRefused


def framed(data: bytes) -> bytes:
    """A chunk as it is sent."""
    return hashlib.sha256(data).digest() + len(data).to_bytes(4, "big") + data


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.lists(st.integers(0, 500), max_size=12))
def test_chunks_arrive_however_the_stream_is_cut(chunks: list[bytes], cuts: list[int]) -> None:
    """The same chunks, in order, whatever the pieces in which the network brings them."""
    stream = b"".join(map(framed, chunks))
    ends = [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    reader, start, got = ChunkReader(), 0, []
    for end in ends:
        reader.feed(stream[start:end])
        assert reader.size == sum(len(data) for _, data in reader.whole)
        got += reader.take()
        start = end
    reader.finish()
    assert got == [(hashlib.sha256(data).hexdigest(), data) for data in chunks]


@pytest.mark.parametrize("size", [0, CHUNK + 1, 0xFFFFFFFF])
def test_a_chunk_that_says_it_is_too_large(size: int) -> None:
    """Refused by its head, before any of it takes up memory."""
    with pytest.raises(CodeRefused, match=f"not {size}"):
        ChunkReader().feed(bytes(32) + size.to_bytes(4, "big"))


def test_a_stream_that_ends_too_early() -> None:
    """What came before is there; the rest is said to be missing."""
    reader = ChunkReader()
    reader.feed(framed(b"whole") + framed(b"cut off")[:-1])
    assert [data for _, data in reader.take()] == [b"whole"]
    with pytest.raises(CodeRefused, match="not complete"):
        reader.finish()
