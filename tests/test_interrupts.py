"""Signals held back for a few lines, and raised after them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from ckptools.interrupts import held_back


@pytest.fixture
def told() -> Iterator[list[int]]:
    """Signals that a handler of the program was told of, which was there before."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_an_interruption_waits_for_the_end(told: list[int]) -> None:
    reached: list[bool] = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            reached.append(not told)

    with pytest.raises(KeyboardInterrupt):
        work()

    assert reached == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_back_and_told_afterwards(told: list[int]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with held_back():
        signal.raise_signal(signal.SIGTERM)
        assert told == []

    assert told == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is handler


def test_the_outermost_of_several_lets_go(told: list[int]) -> None:
    with held_back():
        with held_back():
            signal.raise_signal(signal.SIGTERM)
        assert told == []

    assert told == [signal.SIGTERM]


def test_an_error_within_comes_through_without_an_interruption(told: list[int]) -> None:
    with pytest.raises(ValueError, match="mine"), held_back():
        raise ValueError("mine")

    assert told == []


def test_a_second_interruption_while_the_first_is_passed_on_is_not_lost() -> None:
    """What a handler that lets go raises on its way out must find the others in place."""
    calls: list[int] = []

    def once_more(number: int, _: object) -> None:
        calls.append(number)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, once_more)
    try:
        with held_back():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert calls == [signal.SIGTERM, signal.SIGTERM]


def test_another_thread_changes_nothing() -> None:
    """Python interrupts the main thread alone, and only it may set handlers."""
    seen: list[object] = []

    def work() -> None:
        with held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert seen == [signal.default_int_handler]
