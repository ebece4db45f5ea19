"""A process group beside the learners' own, in which one process sends tensors to others that come and go.

Nothing in it is repaired: when a member is lost or late the group is left, and a new one made with a store of its own.
"""

import datetime
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.environment import environment
from cluster.faults import COLLECTIVE, kind_of
from cluster.process import interface_towards
from cluster.topology import num_hosts

SENDER = 0
_OPEN, _CLOSED = "open", "closed"
"""Keys of the store: all have come, or the sender has given up."""
_PAUSE_S = 0.001
_LEFT_TO_US = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0"}
"""What the watchdog of a group of NCCL's does about an error, and a fourth of how long it sleeps before that."""


class GroupLostError(Exception):
    """A member is gone or late; the group is of no use any more."""


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """A place in a side group, sent to a process by any other way."""

    rendezvous: str
    """`file:///path` on one machine, where no port of the store is opened then, or `tcp://host:port`."""
    rank: int
    size: int
    nccl: bool
    """Whether tensors lie on accelerators; gloo otherwise."""
    timeout_s: float
    """How long any wait for another member may last."""

    def accept(self) -> "SideGroup":
        """Raises: GroupLostError if the others do not come in time."""
        with _losing():
            store = self.open_store(is_sender=False)
            store.set(_arrival(self.rank), b"here")
            until = time.monotonic() + self.timeout_s
            while not store.check([_OPEN]):
                if store.check([_CLOSED]):
                    raise GroupLostError("the sender has given up")
                _pause(until)
            return SideGroup(store, self)

    def open_store(self, *, is_sender: bool) -> dist.Store:
        kind, _, place = self.rendezvous.partition("://")
        timeout = datetime.timedelta(seconds=self.timeout_s)
        if kind == "file":
            store = dist.FileStore(place, -1)
            store.set_timeout(timeout)
            return store
        host, _, port = place.rpartition(":")
        return dist.TCPStore(host, int(port), None, is_sender, timeout, wait_for_workers=False)


class Meeting:
    """The sender's side: make it, pass its invitations on, then `meet`; to be kept as long as the others may read it.

    Ray must run. Gloo speaks over loopback where the cluster is one machine.
    """

    def __init__(self, receivers: int, *, nccl: bool, timeout_s: float):
        self._directory = tempfile.TemporaryDirectory(prefix="grail-")
        rendezvous = f"file://{self._directory.name}/store"
        if num_hosts() > 1:
            rendezvous = f"tcp://{ray.util.get_node_ip_address()}:0"
        own = Invitation(
            rendezvous=rendezvous, rank=SENDER, size=receivers + 1, nccl=nccl, timeout_s=timeout_s
        )
        self._store = own.open_store(is_sender=True)
        if isinstance(self._store, dist.TCPStore):
            rendezvous = f"tcp://{self._store.host}:{self._store.port}"
        self._own, *self.invitations = [
            replace(own, rendezvous=rendezvous, rank=rank) for rank in range(own.size)
        ]

    def meet(self, meanwhile: Callable[[], None]) -> "SideGroup":
        """The group, once all have come; `meanwhile` is called over and over and may give up by an error.

        Raises: GroupLostError if they do not in time; whatever `meanwhile` does.
        """
        arrivals = [_arrival(invitation.rank) for invitation in self.invitations]
        until = time.monotonic() + self._own.timeout_s
        outcome = _CLOSED
        try:
            with _losing():
                while not self._store.check(arrivals):
                    _pause(until, meanwhile)
            outcome = _OPEN
        finally:
            self._store.set(outcome, b"now")
        with _losing():
            return SideGroup(self._store, self._own)


class SideGroup:
    """Members that take part in the same broadcasts in the same order; forgotten by dropping it."""

    def __init__(self, store: dist.Store, seat: Invitation):
        self._timeout_s = seat.timeout_s
        self.device = torch.device("cuda", torch.cuda.current_device()) if seat.nccl else torch.device("cpu")
        """Where the tensors must lie."""
        self._group = (_nccl if seat.nccl else _gloo)(store, seat)

    def broadcast(self, tensor: Tensor, meanwhile: Callable[[], None] | None = None) -> None:
        """Fill the tensor with the sender's; on return it may be read and written again.

        Raises: GroupLostError if a member is gone or late; whatever `meanwhile` does.
        """
        with _losing():
            work = self._group.broadcast(tensor, SENDER)
            until = time.monotonic() + self._timeout_s
            while not work.is_completed():
                _pause(until, meanwhile)
            work.wait()

    def leave(self) -> None:
        """Let the others notice at once; a broadcast of gloo's that is on its way ends at its own time-out."""
        self._group.abort()


@contextmanager
def _losing() -> Iterator[None]:
    """A failed or late collective, or a store that does not answer, is a lost group."""
    try:
        yield
    except RuntimeError as error:
        if kind_of(error) != COLLECTIVE:
            raise
        raise GroupLostError(" ".join(str(error).split())[:200]) from error


def _pause(until: float, meanwhile: Callable[[], None] | None = None) -> None:
    if time.monotonic() > until:
        raise GroupLostError("a member did not answer in time")
    if meanwhile is not None:
        meanwhile()
    time.sleep(_PAUSE_S)


def _arrival(rank: int) -> str:
    return f"arrived/{rank}"


def _gloo(store: dist.Store, seat: Invitation) -> dist.Backend:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=seat.timeout_s)
    # Explicit, since the environment names the interface of the learners' group.
    interface = interface_towards(seat.rendezvous)
    options._devices = [dist.ProcessGroupGloo.create_device(interface=interface)]
    return dist.ProcessGroupGloo(store, seat.rank, seat.size, options)


def _nccl(store: dist.Store, seat: Invitation) -> dist.Backend:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=2 * seat.timeout_s)
    # Its watchdog would end the process a minute after another was lost, though `broadcast` had given up long before.
    with environment(_LEFT_TO_US):
        return dist.ProcessGroupNCCL(store, seat.rank, seat.size, options)
