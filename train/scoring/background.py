"""Work that is done ahead, in a thread of its own, while its results are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

LOOK_SECONDS = 0.1
"""How often a thread that waits for room looks whether it is still wanted."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items in their order, made by a thread up to ``depth`` ahead; its errors are raised here.

    The thread stops when the iterator is closed.
    """
    made: queue.Queue[T | _End] = queue.Queue(depth)
    unwanted = threading.Event()
    thread = threading.Thread(target=_make, args=(items, made, unwanted), daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        unwanted.set()
        thread.join()


def _make(items: Iterable[T], made: queue.Queue[T | _End], unwanted: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            if not _put(made, item, unwanted):
                return
    except BaseException as error:  # raised where the items are used
        end = _End(error)
    _put(made, end, unwanted)


def _put(made: queue.Queue[T | _End], item: T | _End, unwanted: threading.Event) -> bool:
    while not unwanted.is_set():
        try:
            made.put(item, timeout=LOOK_SECONDS)
            return True
        except queue.Full:
            continue
    return False
