"""Worker processes that share the parent's memory: many items, results in order.

Threads of one Python wait for one another between any two array operations; processes do not. They
are forks, so they see what the parent has loaded and opened, and answer through pipes. Knows
nothing of tensors.
"""

from __future__ import annotations

import gc
import os
import pickle
import selectors
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from ckptools.errors import CkptError
from ckptools.interrupts import held_back

Result = TypeVar("Result")
Work = Callable[[int, int], Result]

CAN_FORK = sys.platform == "linux"  # elsewhere system libraries do not survive it
_TICKET = struct.Struct("=ii")  # item, slot: written and read whole, as all short writes to a pipe
_ANSWER = struct.Struct("=iiI?")  # item, slot, bytes that follow, whether they are an error
_READ_BYTES = 1 << 16


def in_order(
    work: Work[Result],
    count: int,
    *,
    workers: int,
    slots: int,
    last_look: Callable[[list[int]], None] = lambda numbers: None,
) -> Generator[Result, None, None]:
    """`work(item, slot)` for items 0 to `count` - 1, each in some process; results in order.

    work   runs in a fork: what it changes is lost, but for shared memory and files. Its result, or
           its error, must be picklable and, for speed, small
    slots  at most so many items are in work or waiting for their turn; each has a slot of its own,
           which is given to another item once the next result is asked for
    last_look  is called with the processes' numbers when all is done and they still are there

    Raises the first error in the order of items. A process that ends unasked is a `CkptError`.
    All processes have ended when the iteration ends; where that may be early, close it
    (`contextlib.closing`). Linux only: see `CAN_FORK`.
    """
    crew = _Crew(count)
    try:
        with held_back():  # an interruption in a fork would unwind the parent's frames there
            crew.start(work, workers)
        for slot in range(slots):
            crew.assign(slot)
        for item in range(count):
            answer = crew.answer(item)
            if answer.is_error:
                raise pickle.loads(answer.data)
            yield pickle.loads(answer.data)
            crew.assign(answer.slot)
        last_look(crew.numbers)
        crew.dismiss()
    finally:
        crew.end()


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2


@dataclass(frozen=True)
class _Answer:
    """What came of an item."""

    slot: int
    data: bytes
    is_error: bool


@dataclass
class _Worker:
    """A process and what it said so far that is not a whole answer yet."""

    number: int
    pipe: int
    heard: bytearray = field(default_factory=bytearray)


class _Crew:
    def __init__(self, count: int) -> None:
        self._count = count
        self._next = 0
        self._answers: dict[int, _Answer] = {}
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._tickets, self._desk = os.pipe()

    def start(self, work: Work[Result], workers: int) -> None:
        """Fork the workers; each takes tickets and answers until there are no more."""
        for _ in range(workers):
            listen, speak = os.pipe()
            number = _fork()
            if number == 0:
                others = [listen, self._desk, *(worker.pipe for worker in self._workers)]
                _become_worker(work, self._tickets, speak, others)
            os.close(speak)
            worker = _Worker(number, listen)
            self._workers.append(worker)
            self._selector.register(listen, selectors.EVENT_READ, worker)

    @property
    def numbers(self) -> list[int]:
        """The processes, as the system numbers them."""
        return [worker.number for worker in self._workers]

    def assign(self, slot: int) -> None:
        """Give the slot to the next item, if there is one, for whoever is free first."""
        if self._next < self._count:
            with suppress(BrokenPipeError):  # nobody is left: `answer` says so
                os.write(self._desk, _TICKET.pack(self._next, slot))
            self._next += 1

    def answer(self, item: int) -> _Answer:
        """What came of an item, once it is there."""
        while item not in self._answers:
            for key, _ in self._selector.select():
                self._hear(key.data)
        return self._answers.pop(item)

    def _hear(self, worker: _Worker) -> None:
        data = os.read(worker.pipe, _READ_BYTES)
        if not data:
            raise _lost(worker)
        worker.heard += data
        while len(worker.heard) >= _ANSWER.size:
            item, slot, nbytes, is_error = _ANSWER.unpack_from(worker.heard)
            end = _ANSWER.size + nbytes
            if len(worker.heard) < end:
                return
            self._answers[item] = _Answer(slot, bytes(worker.heard[_ANSWER.size : end]), is_error)
            del worker.heard[:end]

    def dismiss(self) -> None:
        """No more tickets: workers end by themselves."""
        os.close(self._desk)
        self._desk = -1
        for worker in self._workers:
            os.waitpid(worker.number, 0)
        self._workers = []

    def end(self) -> None:
        """End whoever still works and give everything back; does nothing twice."""
        with held_back():
            for worker in self._workers:
                with suppress(ProcessLookupError):
                    os.kill(worker.number, signal.SIGKILL)
            for worker in self._workers:
                with suppress(ChildProcessError):  # waited for already
                    os.waitpid(worker.number, 0)
            pipes = [key.fd for key in self._selector.get_map().values()]
            self._selector.close()
            for pipe in (*pipes, self._tickets, self._desk):
                if pipe >= 0:
                    os.close(pipe)
            self._workers, self._tickets, self._desk = [], -1, -1


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; ours are a progress bar and a library's, no fork calls them.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _lost(worker: _Worker) -> CkptError:
    _, status = os.waitpid(worker.number, 0)
    code = os.waitstatus_to_exitcode(status)
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return CkptError(
        f"a worker process ended unasked ({how})",
        fix="if the machine is short of memory, use fewer (--threads 1); otherwise report this",
    )


def _become_worker(work: Work[Result], tickets: int, answers: int, others: list[int]) -> NoReturn:
    """Work until there are no more tickets, then end without the parent's clean-up."""
    code = 1
    try:
        gc.freeze()  # to look through the parent's objects would copy their pages
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all; the parent decides
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        for pipe in others:  # where the parent's end is open, nobody learns that the parent died
            os.close(pipe)
        serve(work, tickets, answers)
        code = 0
    except BrokenPipeError:  # the parent is gone
        pass
    finally:
        os._exit(code)


def serve(work: Work[Result], tickets: int, answers: int) -> None:
    """Take tickets from one pipe until it is closed, write an answer for each to another."""
    while ticket := os.read(tickets, _TICKET.size):
        item, slot = _TICKET.unpack(ticket)
        try:
            data, is_error = pickle.dumps(work(item, slot)), False
        except BaseException as exc:  # carried to the parent, whatever it is
            data, is_error = _dump_error(exc), True
        view = memoryview(_ANSWER.pack(item, slot, len(data), is_error) + data)
        while view:
            view = view[os.write(answers, view) :]


def _dump_error(error: BaseException) -> bytes:
    """An exception for another process; one that cannot be pickled is told in words."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except (pickle.PicklingError, TypeError, AttributeError, ValueError):
        data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data
