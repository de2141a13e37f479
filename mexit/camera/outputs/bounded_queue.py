"""A queue between threads that never makes its producer wait: when it is full, the oldest item makes room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """Items in order of arrival; an item with a key replaces a waiting one with the same key.

    Keys are for states, of which the newest alone counts: a camera's state that waits while a broker is away is
    replaced by the next one and is no loss.

    Attributes:
        lost: items that were dropped because the queue was full or closed.
        replaced: items that were replaced by a newer one with their key.
    """

    def __init__(self, size: int) -> None:
        """An empty queue for at most `size` items."""
        self.lost = 0
        self.replaced = 0
        self._size = size
        self._items: OrderedDict[object, T] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        """The number of waiting items."""
        return len(self._items)

    def put(self, item: T, key: str | None = None) -> None:
        """Add an item at the end, without waiting; the oldest item is dropped if the queue is full.

        Args:
            item: the item.
            key: a waiting item with this key is replaced.
        """
        with self._changed:
            if self._closed:
                self.lost += 1
                return
            if key is not None and key in self._items:
                del self._items[key]
                self.replaced += 1
            elif len(self._items) >= self._size:
                self._items.popitem(last=False)
                self.lost += 1
            self._items[object() if key is None else key] = item
            self._changed.notify()

    def take(self) -> T | None:
        """Wait for an item and take the oldest; None once the queue is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return self._items.popitem(last=False)[1] if self._items else None

    def close(self) -> None:
        """Accept no further item; waiting ones can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Drop all waiting items; they count as lost."""
        with self._changed:
            self.lost += len(self._items)
            self._items.clear()
