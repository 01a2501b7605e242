"""Signals in this process: noted, delivered later, and at once where nobody waits."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from matryoshka.interrupt import SIGNALS, Stopped, StopRequest, stoppable
from matryoshka.pipeline import _run as run_stage


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler of Python runs between two of its instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_unwinds_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    unwound = []
    with pytest.raises(Stopped) as stopped, stoppable():  # noqa: PT012
        try:
            send(number)
        finally:
            unwound.append(signal.getsignal(number))
    assert stopped.value.signal == number
    assert stopped.value.exit_code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert unwound == [signal.SIG_DFL]  # a second one ends the process
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_request_holds_the_first_signal_back() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stoppable(), StopRequest() as stop:  # noqa: PT012
        send(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        stop.deliver()
        pytest.fail("it was not delivered")


def test_a_second_signal_does_not_wait() -> None:
    with pytest.raises(Stopped, match="SIGINT"), stoppable(), StopRequest():  # noqa: PT012
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_from_python_code_ctrl_c_stays_a_keyboard_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:  # noqa: PT012
        send(signal.SIGINT)
        stop.deliver()


def test_what_a_shell_has_started_in_the_background_ignores_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable(), StopRequest() as stop:
            send(signal.SIGINT)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGINT, before)


STAGE = """
import signal, sys, time
def end(*_):
    open(sys.argv[1], "w").write("ended in order")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
open(sys.argv[1], "w").write("began")
time.sleep(60)
"""


def test_a_pipeline_ends_its_stage(tmp_path: Path) -> None:
    file = tmp_path / "stage"

    def send_when_it_runs() -> None:
        while not file.exists() or file.read_text() != "began":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send_when_it_runs)
    thread.start()
    with pytest.raises(Stopped, match="SIGTERM"), stoppable():
        run_stage([sys.executable, "-c", STAGE, str(file)])
    thread.join()
    assert file.read_text() == "ended in order"
