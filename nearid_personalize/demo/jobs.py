"""Long work on a device that one job has at a time, told of as it goes, and ended once nobody listens any more."""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from nearid_personalize.errors import InputError

News = TypeVar("News")

PULSE = 0.5
"""Seconds between two items of news at most: as often a listener who has gone can be noticed."""


class Cancelled(Exception):
    """Nobody waits for this job any more."""


class Device:
    """What one job has at a time, first come, first served.

    max_waiting: jobs that may stand in line; one more is refused.
    """

    def __init__(self, max_waiting: int = 50) -> None:
        self.max_waiting = max_waiting
        self._line: list[object] = []
        self._moved = threading.Condition()

    def __len__(self) -> int:
        """Jobs under way and waiting."""
        return len(self._line)

    @contextmanager
    def turn(self, on_wait: Callable[[int], None]) -> Iterator[None]:
        """Wait for the device, have it inside the block. `on_wait` hears how many are before, and leaves by raising."""
        ticket = object()
        with self._moved:
            if len(self._line) > self.max_waiting:
                raise InputError(f"{len(self._line)} others are waiting for this machine; try again in some minutes")
            self._line.append(ticket)
        try:
            while ahead := self._line.index(ticket):
                on_wait(ahead)
                with self._moved:
                    self._moved.wait_for(lambda: self._line[0] is ticket, timeout=PULSE)
            yield
        finally:
            with self._moved:
                self._line.remove(ticket)
                self._moved.notify_all()


class Job(Generic[News]):
    """One piece of work in a thread of its own.

    work: is given `report_progress`. What it reports, and in the end returns, is news; `report_progress` raises
    `Cancelled` to end it. Of news that come faster than they are read only the latest are kept. ahead: how many jobs
    this one waits for.
    """

    def __init__(self, work: Callable[[Callable[[News], None]], News], device: Device) -> None:
        self.ahead = 0
        self._work, self._device = work, device
        self._changed = threading.Condition()
        self._latest: list[News] = []
        self._error: BaseException | None = None
        self._done = self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="job", daemon=True)

    @property
    def cancelled(self) -> bool:
        """Whether it was told to end."""
        return self._cancelled

    def cancel(self) -> None:
        """Let the work end at the next thing it tells."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def news(self) -> Generator[News | None]:
        """Start; yield the latest news as they come, and None each time there was none for `PULSE` seconds.

        The last item is what the work returned. Raises what the work raised; a cancelled job just ends. Closing the
        iterator cancels the job.
        """
        self._thread.start()
        try:
            done = False
            while not done:
                with self._changed:
                    self._changed.wait_for(lambda: self._latest or self._done, timeout=PULSE)
                    latest, self._latest = self._latest, []
                    done = self._done
                if latest or not done:
                    yield latest[0] if latest else None
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def _tell(self, news: News) -> None:
        with self._changed:
            self._check()
            self._latest = [news]
            self._changed.notify_all()

    def _wait(self, ahead: int) -> None:
        self._check()
        self.ahead = ahead

    def _check(self) -> None:
        if self._cancelled:
            raise Cancelled

    def _run(self) -> None:
        try:
            with self._device.turn(self._wait):
                self._wait(0)
                self._latest = [self._work(self._tell)]
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised again where the news are read
            self._error = error
        with self._changed:
            self._done = True
            self._changed.notify_all()
