"""Reading server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations


class EventTooLongError(ValueError):
    """A line or an event grew beyond the limit."""


class EventParser:
    """Splits bytes, in whatever pieces they come, into the data of events.

    Lines end with LF, CR or CRLF; comments and other fields are dropped; the data lines of an event are joined by LF.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes. Raises `EventTooLongError` beyond `limit` bytes."""
        lines = (self._pending + chunk).replace(b"\r\n", b"\n")
        held_back = b"\r" if lines.endswith(b"\r") else b""  # perhaps the first half of a CRLF
        *complete, rest = lines.removesuffix(held_back).replace(b"\r", b"\n").split(b"\n")
        self._pending = rest + held_back
        events = [event for line in complete if (event := self._line(line)) is not None]
        if len(self._pending) + self._size > self._limit:
            raise EventTooLongError(f"an event is longer than {self._limit} bytes")
        return events

    def end(self) -> list[bytes]:
        """The last event, where the stream ended without the blank line that closes it."""
        return self.feed(b"\n\n")

    def _line(self, line: bytes) -> bytes | None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
        elif not line and self._data:
            event = b"\n".join(self._data)
            self._data, self._size = [], 0
            return event
        return None
