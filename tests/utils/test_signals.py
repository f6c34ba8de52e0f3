import os
import signal

import pytest

from litlora.utils.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_the_exit_code(number):
    request = StopRequest(None)
    with request.handling_signals():
        assert request.exit_code() == 0
        os.kill(os.getpid(), number)
        assert request.exit_code() == 128 + number
    assert str(request.error(128 + number, "here")).startswith(f"stopped by {number.name} here;")


def test_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest(None).handling_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest(None).handling_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_max_time_counts_from_construction():
    assert StopRequest(0).exit_code() == 124
    assert StopRequest(1e9).exit_code() == 0
    assert str(StopRequest(1e-9).error(124, "here")).startswith("stopped after --train.max_time (1e-09 seconds) here;")
