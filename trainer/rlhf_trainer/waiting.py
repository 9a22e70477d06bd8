"""Long work of rank 0 while the others wait, without looking dead: all ranks show life until it is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from rlhf_trainer.exits import Ended, classify

if TYPE_CHECKING:
    from rlhf_trainer.distributed import World

T = TypeVar("T")

_LOOK_SECONDS = 0.2  # between two signs of life


class _Work(threading.Thread, Generic[T]):
    """Runs ``work`` once and keeps what it returned or raised. A daemon: it never keeps an ended process alive."""

    def __init__(self, work: Callable[[], T]) -> None:
        super().__init__(name="rank-0-work", daemon=True)
        self._work = work
        self.result: T | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:  # carried to the thread that waits, which raises it
            self.error = error


def on_main(world: World, work: Callable[[], T], alive: Callable[[], None]) -> T:
    """``work()`` of rank 0, its value on every rank; ``alive`` is called on all ranks while it runs. Collective.

    Hashing or converting a large checkpoint takes longer than the watchdog and a collective's timeout allow. What
    ``work`` raises is raised on rank 0 and, as the planned ending it amounts to, on every other rank. It must not use
    collectives itself.
    """
    thread = _Work(work) if world.is_main else None
    if thread is not None:
        thread.start()
    while True:
        box: tuple[bool, T | None, Ended | None] | None = None
        if thread is not None:
            thread.join(_LOOK_SECONDS)
            error = None if thread.error is None else classify(thread.error)
            box = (not thread.is_alive(), thread.result, error)
        box = world.broadcast(box)
        assert box is not None  # rank 0 always speaks
        finished, value, ended = box
        if finished:
            break
        alive()
    if thread is not None and thread.error is not None:
        raise thread.error
    if ended is not None:
        raise ended
    return cast(T, value)
