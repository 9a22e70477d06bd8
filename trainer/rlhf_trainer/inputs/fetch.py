"""Brings inputs from an object store to the pod's disk, before any rank starts. No torch.

    s3://bucket/key ─ head, list ─▶ objects ─ parts, a few at once ─▶ <path>.partial ─ rename ─▶ <path>

Every pod does it for itself: pods share no disk. Memory holds the parts under way, whatever the size of an object. Each
part names the version it belongs to (If-Match), so that no file is made of two. A store that does not answer is asked
again for a while, and the attempt then ends as one that another may follow. What it refuses is Invalid at the first
attempt; later the inputs have been read before, and credentials that have run out must not end a run for good.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhf_trainer.data.access import may_pass, open_bucket, refuses, scheme_of, why
from rlhf_trainer.exits import Ended, Invalid, NoSpace, Preempted, StoreUnavailable
from rlhf_trainer.inputs import Input
from rlhf_trainer.inputs.plan import Part, Stored, in_words, parts_of, targets

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0  # with a store that gives no answer
_REQUEST_SECONDS = 60.0  # for one part: a connection slower than 140 KB/s is given up
_AT_ONCE = 4
_TELL_SECONDS = 10.0
_LONGEST_PAUSE = 8.0
# Of the path, wherever the pod runs; any other error may be of one node's disk.
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT)
_CHECK = "bucket and key, spec.objectStore and its Secret"
_ROOM = "mount a larger, writable volume there by trainer.podTemplate, or request ephemeral-storage"
T = TypeVar("T")


def fetch(inputs: Sequence[Input], patience: float = PATIENCE_SECONDS, again: bool = False) -> None:
    """``again``: an earlier attempt has had them. Raises Invalid, StoreUnavailable, NoSpace, Preempted on SIGTERM."""
    if not inputs:
        return
    began = time.monotonic()
    try:
        size = asyncio.run(_fetch(_downloads(inputs, patience, again)))
    except asyncio.CancelledError as cancelled:
        raise Preempted("SIGTERM while the inputs were being loaded; nothing was lost") from cancelled
    log.info("inputs: loaded %s in %.1f s", in_words(size), time.monotonic() - began)


def _downloads(inputs: Sequence[Input], patience: float, again: bool) -> list[_Download]:
    """One client for each bucket: every one of them asks for credentials of its own."""
    addresses = [each.located.uri or "" for each in inputs]
    buckets = [address.removeprefix("s3://").partition("/")[0] for address in addresses if scheme_of(address)]
    stores = {bucket: open_bucket(bucket, _REQUEST_SECONDS) for bucket in buckets}
    return [_Download(each, stores[bucket], patience, again) for each, bucket in zip(inputs, buckets, strict=True)]


async def _fetch(downloads: Sequence[_Download]) -> int:
    with _cancelled_by_signals():
        for download in downloads:
            await download.look()
        _check_room(downloads)
        teller = asyncio.create_task(_tell(downloads))
        try:
            for download in downloads:
                await download.load()
        finally:
            teller.cancel()
        return sum(download.size for download in downloads)


class _Download:
    """One input on its way."""

    def __init__(self, wanted: Input, store: Any, patience: float, again: bool) -> None:
        self.wanted = wanted
        self.loaded = 0
        self._uri = wanted.located.uri or ""
        self._key = self._uri.removeprefix("s3://").partition("/")[2]
        self._store, self._patience, self._again = store, patience, again
        self._path = Path(wanted.located.path)
        self._partial = self._path.with_name(f"{self._path.name}.partial")
        self._found: dict[Path, Stored] = {}

    @property
    def size(self) -> int:
        return sum(stored.size for stored in self._found.values())

    @property
    def folder(self) -> Path:
        return self._path.parent

    async def look(self) -> None:
        """What there is. One object is asked for first: who may read it need not be allowed to list."""
        refused: Exception | None = None
        try:
            one = await self._patiently(self._head)
        except (Invalid, StoreUnavailable) as error:
            # Of a folder's name, where listing is granted below it alone. If not so, the list's refusal says why.
            if error.__cause__ is None or not refuses(error.__cause__):
                raise
            one, refused = None, error
        if one is not None:
            self._found = {self._partial: one}
        else:
            self._found = targets(self._uri, self._key, await self._patiently(self._list), self._partial)
        if refused is not None and not self._found:
            raise refused
        if not self._found:
            raise Invalid(f"{self.wanted.shown}: there is no such object, nor any below it; check {_CHECK}")
        objects = "1 object" if len(self._found) == 1 else f"{len(self._found)} objects"
        log.info("%s: %s, %s to load", self.wanted.shown, objects, in_words(self.size))

    async def load(self) -> None:
        """Complete, or not there at all."""
        with _writing(self.wanted):
            _remove(self._partial)
            for target in self._found:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
        parts = parts_of(self._found)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_AT_ONCE):
                    group.create_task(self._load_all(parts))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        with _writing(self.wanted):
            _remove(self._path)
            self._partial.rename(self._path)

    async def _load_all(self, parts: Iterator[Part]) -> None:
        for part in parts:  # shared: each part is taken by one of the tasks
            content = await self._patiently(partial(self._read, part))
            with _writing(self.wanted), part.target.open("r+b") as file:
                file.seek(part.start)
                file.write(content)
            self.loaded += part.end - part.start

    async def _head(self) -> Stored | None:
        try:
            return _stored(await self._store.head_async(self._key))
        except FileNotFoundError:
            return None

    async def _list(self) -> list[Stored]:
        return [_stored(meta) for meta in await self._store.list(self._key).collect_async()]

    async def _read(self, part: Part) -> Any:
        options: dict[str, Any] = {"range": (part.start, part.end)}
        if part.stored.e_tag.startswith('"'):  # a weak one never matches
            options["if_match"] = part.stored.e_tag
        content = await (await self._store.get_async(part.stored.key, options=options)).bytes_async()
        if len(content) != part.end - part.start:
            raise OSError(
                f"{len(content)} bytes of {part.stored.key} came where {part.end - part.start} were asked for"
            )
        return content

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer, be it the first or a later one."""
        pause, until = 0.5, None
        while True:
            try:
                return await ask()
            except Exception as error:  # every store has errors of its own
                now = time.monotonic()
                until = until or now + self._patience
                self._give_up(error, out_of_time=now + pause > until)
                log.warning("%s: %s; asking again in %.1f s", self.wanted.shown, why(error), pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _give_up(self, error: Exception, out_of_time: bool) -> None:
        """Raises what the error amounts to; returns where asking again is worth it."""
        listed = bool(self._found)
        if type(error).__name__ == "PreconditionError" or (listed and isinstance(error, FileNotFoundError)):
            raise StoreUnavailable(
                f"{self.wanted.shown}: an object changed while it was being read; another attempt reads what is there "
                "now, and its digest decides"
            ) from error
        if not may_pass(error):
            kind = StoreUnavailable if self._again and refuses(error) else Invalid
            raise kind(f"{self.wanted.shown}: cannot be read ({why(error)}); check {_CHECK}") from error
        if out_of_time:
            raise StoreUnavailable(
                f"{self.wanted.shown}: no answer for {self._patience:.0f} s ({why(error)}); check the network, {_CHECK}"
            ) from error


def _stored(meta: Mapping[str, Any]) -> Stored:
    return Stored(str(meta["path"]), int(meta["size"]), str(meta["e_tag"] or ""))


async def _tell(downloads: Sequence[_Download]) -> None:
    """What a slow download is told apart by from one that hangs."""
    began, total = time.monotonic(), sum(download.size for download in downloads)
    while True:
        await asyncio.sleep(_TELL_SECONDS)
        loaded = sum(download.loaded for download in downloads)
        log.info("inputs: loaded %s of %s in %.0f s", in_words(loaded), in_words(total), time.monotonic() - began)


def _check_room(downloads: Sequence[_Download]) -> None:
    """Before the first byte: a disk that fills up after an hour says the same an hour later."""
    for download in downloads:
        with _writing(download.wanted):
            download.folder.mkdir(parents=True, exist_ok=True)
    needed: Counter[int] = Counter()
    for download in downloads:
        needed[download.folder.stat().st_dev] += download.size
    for download in downloads:
        size, free = needed[download.folder.stat().st_dev], shutil.disk_usage(download.folder).free
        if size > free:
            place = f"{in_words(size)} at {download.folder}, {in_words(free)} are free"
            raise NoSpace(f"ENOSPC: the inputs need {place}; {_ROOM}")


@contextmanager
def _writing(wanted: Input) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            name = errno.errorcode[error.errno]
            raise NoSpace(f"{name}: {wanted.shown} does not fit at {wanted.located.path}; {_ROOM}") from error
        kind = Invalid if error.errno in _PATH_ERRORS else Ended
        raise kind(f"{wanted.shown}: cannot be written: {error}; {_ROOM}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Of the running task: a request to a store that does not answer is not waited for."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])
