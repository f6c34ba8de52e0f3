import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from litlora.utils import resource_limits
from litlora.utils.limited_process import LimitedProcess


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[LimitedProcess]:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    process = LimitedProcess("tests.helpers.stubborn")
    yield process
    process.close()


def test_answers_come_back_as_they_are(process):
    request = {"do": "echo", "text": "é 🚪 \ud800\n", "numbers": [1, 2.5, None, True], "nested": {"b": 1, "a": 2}}
    answer = process.ask(request)
    assert answer == request
    assert list(answer["nested"]) == ["b", "a"]


def test_one_process_answers_all_requests(process):
    assert process.ask({"do": "process"}) == process.ask({"do": "process"}) != os.getpid()


@pytest.mark.parametrize(("work", "error"), [("burn", TimeoutError), ("sort", TimeoutError), ("allocate", MemoryError)])
def test_work_in_c_code_is_ended(process, work, error, monkeypatch):
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.1)
    before = process.ask({"do": "process"})
    with pytest.raises(error):
        process.ask({"do": work})
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert process.ask({"do": "process"}) != before


def test_a_crash_is_contained(process):
    with pytest.raises(MemoryError):
        process.ask({"do": "crash"})
    assert process.ask({"do": "echo"}) == {"do": "echo"}


def test_an_interrupted_request_leaves_no_answer_behind(process):
    """The next request would get it otherwise."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            process.ask({"do": "burn"})
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert process.ask({"do": "echo"}) == {"do": "echo"}


def test_a_fork_has_a_process_of_its_own(process):
    """The answers of two processes would mix in one pipe."""
    own = process.ask({"do": "process"})
    child = os.fork()
    if not child:
        other = process.ask({"do": "process"})
        process.close()
        os._exit(int(other == own))
    assert os.waitpid(child, 0)[1] == 0
    assert process.ask({"do": "process"}) == own


def test_the_process_ends_with_the_one_that_asks(process):
    worker = process.ask({"do": "process"})
    process.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{worker}").exists()
