"""Heartbeats between the processes of a run, so that none waits for a dead one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from torch._C._distributed_c10d import Store

from litlora.distributed.launcher import PEER_FAILED, RankInfo
from litlora.errors import RESUME, LitLoraError, StoppedError

BEAT = 1.0  # seconds between two heartbeats
LIMIT = 25  # beats without a peer's heartbeat after which the peer counts as dead
CHECKS = 3  # of the peers' heartbeats before a rank reports which of them is gone
END = "end"  # key in the store: the rank that reports why all of them end
HINT = f"look there for the cause, such as too little memory, and {RESUME}"


class LostPeerError(LitLoraError):
    """A peer has ended before the run has."""


class Monitor:
    """The heartbeats of all ranks, in the store by which they have met.

    They come from a thread, whatever else a rank is busy with: one that reads, writes or computes for hours is alive.
    Beats are counted and not seconds, so that ranks that were suspended together resume together. A store that is gone
    may never answer, hence another thread counts.
    """

    def __init__(self, rank_info: RankInfo, store: Store) -> None:
        self.missing: int | None = None
        """The rank for whose heartbeat its peers wait."""
        self._rank_info, self._store = rank_info, store
        self._peers = [rank for rank in range(rank_info.world_size) if rank != rank_info.rank]
        self._beat, self._checks, self._is_reported, self._stopped = 0, 0, False, Event()
        self._threads = [Thread(target=target, daemon=True) for target in (self._send, self._guard)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        """Send heartbeats, the next one when all peers have sent theirs."""
        rank = self._rank_info.rank
        with suppress(RuntimeError):  # the store is gone
            self._store.set(_heartbeat(rank, 0), "")
            while not self._stopped.wait(BEAT):
                if self._is_complete():
                    self._beat, self.missing = self._beat + 1, None
                    self._store.set(_heartbeat(rank, self._beat), "")
                    self._store.delete_key(_heartbeat(rank, self._beat - 2))  # which all have seen
                self._checks += 1

    def _is_complete(self) -> bool:
        """Tell whether all peers have sent the present heartbeat; note which has not, unless it has left the run."""
        if not self._peers or self._store.check([_heartbeat(rank, self._beat) for rank in self._peers]):
            return True
        self._peers = [rank for rank in self._peers if not self._store.check([_farewell(rank)])]
        late_peers = [rank for rank in self._peers if not self._store.check([_heartbeat(rank, self._beat)])]
        if late_peers and self.missing not in late_peers:  # a peer that was only late has sent its heartbeat by now
            self.missing = late_peers[0]
        self._is_reported = self._store.check([END])
        return not late_peers

    def _guard(self) -> None:
        """End this process, wherever it waits, after LIMIT of its own beats without a common one."""
        last, late = 0, 0
        while late < LIMIT:
            if self._stopped.wait(BEAT):
                return
            last, late = self._beat, late + 1 if self._beat == last else 0
        if self._rank_info.is_launched:
            os._exit(PEER_FAILED)
        if not self._is_reported and self._claims_report():
            who = "rank 0, or what has started it," if self.missing is None else f"rank {self.missing}"
            fault = f"{who} has sent no heartbeat for {LIMIT * BEAT:.0f} seconds"
            os.write(2, f"\nlitlora: {fault}: {HINT}\n".encode())
        os._exit(1)

    def _claims_report(self) -> bool:
        """Claim the report; where the store does not answer, it is for the first rank alive on each machine."""
        replies: list[bool] = []
        request = Thread(target=self._ask_store, args=(replies,), daemon=True)
        request.start()
        request.join(CHECKS * BEAT)
        first_here = self._rank_info.rank - self._rank_info.rank % self._rank_info.local_world_size
        return replies[0] if replies else self._rank_info.rank == first_here + (self.missing in (None, first_here))

    def _ask_store(self, replies: list[bool]) -> None:
        with suppress(RuntimeError):  # the store is gone
            replies.append(claim_report(self._store, self._rank_info.rank))

    def explain(self, error: Exception) -> None:
        """Name the rank that is gone as the cause of an error, once its peers have had time to send heartbeats."""
        enough = self._checks + CHECKS
        while self._checks < enough and self._threads[0].is_alive():  # if nobody replies any more, the guard ends it
            time.sleep(BEAT / 4)
        if self.missing is not None:
            fault = f"rank {self._rank_info.rank} has lost contact with rank {self.missing}, which has ended"
            raise LostPeerError(f"{fault}: {HINT}") from error

    def leave(self) -> None:
        """Announce that this rank ends as it should; rank 0, which may hold the store, waits until all have done so."""
        with suppress(RuntimeError):
            self._store.set(_farewell(self._rank_info.rank), "")
            farewells = [_farewell(rank) for rank in range(self._rank_info.world_size)]
            while self._rank_info.rank == 0 and not self._store.check(farewells):
                time.sleep(0.1)

    def stop(self) -> None:
        """End the threads, except one that waits for a store that does not answer."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(CHECKS * BEAT)


def claim_report(store: Store, rank: int) -> bool:
    """Tell whether this rank reports why all of them end: the first that asks does."""
    return store.compare_set(END, "", str(rank)) == str(rank).encode()


def _heartbeat(rank: int, beat: int) -> str:
    return f"alive/{rank}/{beat}"


def _farewell(rank: int) -> str:
    return f"left/{rank}"


@contextmanager
def monitoring_peers(rank_info: RankInfo, store: Store) -> Iterator[None]:
    """End this process with its peers, and name the one that was the cause, instead of waiting for it forever."""
    monitor = Monitor(rank_info, store)
    try:
        yield
        monitor.leave()
    except StoppedError:  # on which all ranks agree
        monitor.leave()
        raise
    except (LostPeerError, RuntimeError) as error:
        monitor.explain(error)
        raise
    finally:
        monitor.stop()
