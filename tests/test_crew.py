"""Worker processes: results in order, errors carried over, nobody left behind."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from ckptools import crew
from ckptools.crew import CAN_FORK, in_order, serve
from ckptools.errors import CkptError, NonFiniteError

needs_fork = pytest.mark.skipif(not CAN_FORK, reason="only Linux forks safely")


def children() -> set[int]:
    """Processes that this one has started and not waited for."""
    text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return {int(word) for word in text.split()}


@needs_fork
@pytest.mark.parametrize(("workers", "slots"), [(1, 1), (2, 1), (3, 2), (2, 8)])
def test_results_come_in_order_whoever_made_them(workers: int, slots: int) -> None:
    before = children()

    found = list(in_order(lambda item, slot: (item * item, slot), 50, workers=workers, slots=slots))

    assert [square for square, _ in found] == [item * item for item in range(50)]
    assert {slot for _, slot in found} == set(range(slots))
    assert children() == before


@needs_fork
def test_a_slot_is_given_on_only_when_its_result_was_used() -> None:
    """Two slots of shared memory hold a hundred results, one after the other."""
    memory = mmap.mmap(-1, 2)

    def work(item: int, slot: int) -> int:
        memory[slot] = item
        return slot

    seen = []
    for slot in in_order(work, 100, workers=3, slots=2):
        seen.append(memory[slot])

    assert seen == list(range(100))


@needs_fork
def test_many_and_large_results_do_not_lock_up() -> None:
    found = list(in_order(lambda item, _: bytes([item]) * 300_000, 40, workers=2, slots=40))

    assert [(data[0], len(data)) for data in found] == [(item, 300_000) for item in range(40)]


@needs_fork
def test_no_items_is_no_work() -> None:
    assert list(in_order(lambda item, _: item, 0, workers=2, slots=2)) == []


@needs_fork
def test_the_first_error_in_order_is_raised_as_it_was() -> None:
    def work(item: int, slot: int) -> int:
        if item in (7, 3):
            raise NonFiniteError(f"{item} is bad", where="w", fix="f")
        return item

    before = children()
    got = []
    with pytest.raises(NonFiniteError) as caught:
        got.extend(in_order(work, 20, workers=3, slots=6))

    assert (caught.value.what, caught.value.where, caught.value.fix) == ("3 is bad", "w", "f")
    assert children() == before


class AwkwardError(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} {two}")


@needs_fork
def test_an_error_that_cannot_be_carried_is_told_in_words() -> None:
    def work(item: int, slot: int) -> int:
        raise AwkwardError(1, 2)

    with pytest.raises(RuntimeError, match="AwkwardError: 1 2"):
        list(in_order(work, 1, workers=1, slots=1))


@needs_fork
def test_a_process_that_is_killed_is_an_error_with_its_signal() -> None:
    def work(item: int, slot: int) -> int:
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    before = children()
    with pytest.raises(CkptError, match="signal 9"):
        list(in_order(work, 9, workers=1, slots=2))

    assert children() == before


@needs_fork
def test_leaving_early_ends_the_workers() -> None:
    before = children()
    with closing(in_order(lambda item, _: item, 1000, workers=2, slots=4)) as results:
        assert next(results) == 0
        assert len(children() - before) == 2

    assert children() == before


@needs_fork
def test_ctrl_c_at_a_terminal_is_the_parents_to_answer() -> None:
    """The whole group gets the signal; workers go on until they are told."""
    script = (
        "import os, signal\n"
        "from ckptools.crew import in_order\n"
        "def work(item, slot):\n"
        "    if item == 3: os.killpg(0, signal.SIGINT)\n"
        "    return item\n"
        "try:\n"
        "    for item in in_order(work, 10**6, workers=2, slots=2): pass\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, check=False, start_new_session=True,
    )  # fmt: skip

    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 0)


@needs_fork
def test_workers_end_with_a_parent_that_is_killed() -> None:
    """They hold the parent's locks, so the next run would have to wait for them."""
    script = (
        "import os, signal\n"
        "from ckptools.crew import in_order\n"
        "def work(item, slot): return os.getpid()\n"
        "for number, pid in enumerate(in_order(work, 10**6, workers=2, slots=2)):\n"
        "    if number > 50: print(pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )  # returns once nobody holds the other end of stdout: workers inherited it

    assert done.returncode == -signal.SIGKILL
    assert int(done.stdout) > 0


def test_a_worker_answers_every_ticket_until_there_are_no_more() -> None:
    tickets, desk = os.pipe()
    answers, speak = os.pipe()
    for item, slot in ((4, 0), (5, 1)):
        os.write(desk, crew._TICKET.pack(item, slot))
    os.close(desk)

    def work(item: int, slot: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item + slot

    serve(work, tickets, speak)
    os.close(speak)
    said = os.read(answers, 10_000)
    for pipe in (tickets, answers):
        os.close(pipe)

    item, slot, nbytes, is_error = crew._ANSWER.unpack_from(said)
    assert (item, slot, is_error) == (4, 0, False)
    item, slot, _, is_error = crew._ANSWER.unpack_from(said, crew._ANSWER.size + nbytes)
    assert (item, slot, is_error) == (5, 1, True)
