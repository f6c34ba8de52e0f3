"""Heartbeats between the processes of a run, so that none waits for a dead one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from torch._C._distributed_c10d import Store

from litlora.distributed.launcher import LEFT_ALONE, Place
from litlora.errors import LitLoraError, StoppedError

BEAT = 1.0  # seconds between two signs of life
LIMIT = 25  # beats without a sign of another's life after which it counts as dead
PATIENCE = 3  # looks at the others' signs, in which who is gone shows, before a rank says so
END = "end"  # in the store: the rank that says why all of them end
HINT = "look there for the cause, such as too little memory, and go on with the same command and --resume true"


class LostContactError(LitLoraError):
    """Another rank has ended in the midst of it."""


class Watch:
    """The signs of life of all ranks, in the store by which they have met.

    They come from a thread, whatever else a rank is busy with: one that reads, computes or writes for hours is alive.
    Beats are counted and not seconds, so that ranks which were suspended together go on together. A store that is
    gone may leave whoever asks it without an answer, so that the count is that of another thread.
    """

    def __init__(self, place: Place, store: Store) -> None:
        self.missing: int | None = None
        """The rank whose sign of life the others wait for."""
        self._place, self._store = place, store
        self._others = [rank for rank in range(place.count) if rank != place.rank]
        self._beat, self._looks, self._is_said, self._over = 0, 0, False, Event()
        self._threads = [Thread(target=target, daemon=True) for target in (self._live, self._guard)]
        for thread in self._threads:
            thread.start()

    def _live(self) -> None:
        """Show a sign of life for each beat, the next when all others have shown theirs."""
        with suppress(RuntimeError):  # the store is gone
            self._store.set(_sign(self._place.rank, 0), "")
            while not self._over.wait(BEAT):
                if self._is_complete():
                    self._beat, self.missing = self._beat + 1, None
                    self._store.set(_sign(self._place.rank, self._beat), "")
                    self._store.delete_key(_sign(self._place.rank, self._beat - 2))  # which all have seen
                self._looks += 1

    def _is_complete(self) -> bool:
        """Tell whether all others have shown the present sign of life, and note who has not, unless it has left."""
        if not self._others or self._store.check([_sign(rank, self._beat) for rank in self._others]):
            return True
        self._others = [rank for rank in self._others if not self._store.check([_farewell(rank)])]
        behind = [rank for rank in self._others if not self._store.check([_sign(rank, self._beat)])]
        if behind and self.missing not in behind:  # who was only late has shown its sign by now
            self.missing = behind[0]
        self._is_said = self._store.check([END])
        return not behind

    def _guard(self) -> None:
        """End this process, wherever it waits, when too many beats of its own have passed without a common one."""
        seen, late = 0, 0
        while late < LIMIT:
            if self._over.wait(BEAT):
                return
            seen, late = self._beat, late + 1 if self._beat == seen else 0
        if self._place.is_watched:
            os._exit(LEFT_ALONE)
        if not self._is_said and self._speaks():
            who = "rank 0, or what has started it," if self.missing is None else f"rank {self.missing}"
            fault = f"{who} has shown no sign of life for {LIMIT * BEAT:.0f} seconds"
            os.write(2, f"\nlitlora: {fault}: {HINT}\n".encode())
        os._exit(1)

    def _speaks(self) -> bool:
        """Claim the word; without an answer of the store, the first rank that lives on each machine has it."""
        answers: list[bool] = []
        asking = Thread(target=self._ask_for_the_word, args=(answers,), daemon=True)
        asking.start()
        asking.join(PATIENCE * BEAT)
        first_here = self._place.rank - self._place.rank % self._place.local_count
        return answers[0] if answers else self._place.rank == first_here + (self.missing in (None, first_here))

    def _ask_for_the_word(self, answers: list[bool]) -> None:
        with suppress(RuntimeError):  # the store is gone
            answers.append(has_the_word(self._store, self._place.rank))

    def explain(self, error: Exception) -> None:
        """Name the rank that is gone as the cause of an error, once those that are left have shown their lives."""
        enough = self._looks + PATIENCE
        while self._looks < enough and self._threads[0].is_alive():  # if nobody answers any more, the guard ends it
            time.sleep(BEAT / 4)
        if self.missing is not None:
            fault = f"rank {self._place.rank} has lost the contact to rank {self.missing}, which has ended"
            raise LostContactError(f"{fault}: {HINT}") from error

    def leave(self) -> None:
        """Say that this rank ends as it should; the first, which may hold the store, waits until all have said so."""
        with suppress(RuntimeError):
            self._store.set(_farewell(self._place.rank), "")
            farewells = [_farewell(rank) for rank in range(self._place.count)]
            while self._place.rank == 0 and not self._store.check(farewells):
                time.sleep(0.1)

    def stop(self) -> None:
        """End the threads, but for one that the store leaves without an answer."""
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE * BEAT)


def has_the_word(store: Store, rank: int) -> bool:
    """Tell whether it is for this rank to say why all of them end: it is for the first that asks."""
    return store.compare_set(END, "", str(rank)) == str(rank).encode()


def _sign(rank: int, beat: int) -> str:
    return f"alive/{rank}/{beat}"


def _farewell(rank: int) -> str:
    return f"left/{rank}"


@contextmanager
def keeping_contact(place: Place, store: Store) -> Iterator[None]:
    """Have this process end with the others, and say which of them was the cause, instead of waiting for it forever."""
    watch = Watch(place, store)
    try:
        yield
        watch.leave()
    except StoppedError:  # which all have agreed on
        watch.leave()
        raise
    except (LostContactError, RuntimeError) as error:
        watch.explain(error)
        raise
    finally:
        watch.stop()
