import os
import signal

import pytest

from litlora.utils.signals import Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_with_its_own_exit_code(number):
    stopping = Stopping(None)
    with stopping.heeding_signals():
        assert stopping.code() == 0
        os.kill(os.getpid(), number)
        assert stopping.code() == 128 + number
    assert str(stopping.stopped(128 + number, "here")).startswith(f"stopped by {number.name} here;")


def test_the_second_signal_stops_at_once():
    stopping = Stopping(None)
    with pytest.raises(KeyboardInterrupt), stopping.heeding_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_mean_afterwards_what_they_meant_before():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stopping(None).heeding_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_time_runs_from_the_start():
    assert Stopping(1e-9).code() == 124
    assert Stopping(1e9).code() == 0
    assert str(Stopping(1e-9).stopped(124, "here")).startswith("stopped after --train.max_time (1e-09 seconds) here;")
