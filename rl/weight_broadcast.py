"""Weights to all rollout workers at once over a process group of their own, in flat buckets of bounded size.

A transfer that fails is not repeated: a worker without the weights says so when it is given work, which then brings
them along through the object store, and the next version goes over a new group. So no wait is without an end.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cluster.errors import ClusterError
from cluster.pool import Pool
from cluster.side_group import GroupLostError, Invitation, Meeting, SideGroup
from rl.weight_sync import BUCKET_VALUES, FlatWeights, Layout, put_range, put_weights

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""For each wait: until all have come, for a bucket, and for the answers behind the last."""
_MOST_FAILURES = 3
_HEAR_S = 0.002
_START_S = 1.0


@dataclass(frozen=True, kw_only=True)
class WeightCall:
    """Tells a rollout worker to take part in a transfer; its answer is whether it now has the weights."""

    version: int
    layout: Layout
    invitation: Invitation | None
    """To a new group; None for the one of the transfer before."""


class WeightSender:
    """Rank 0's side; one transfer at a time, while no worker draws."""

    def __init__(
        self,
        pool: Pool,
        *,
        nccl: bool,
        start_timeout_s: float,
        timeout_s: float = TIMEOUT_S,
        on_wait: Callable[[], None] = lambda: None,
    ):
        """`nccl` where learner and workers have an accelerator each; `on_wait` is called again and again in waits."""
        self._pool, self._nccl, self._on_wait = pool, nccl, on_wait
        self._start_timeout_s, self._timeout_s = start_timeout_s, timeout_s
        self._group: SideGroup | None = None
        self._meeting: Meeting | None = None
        self._members: list[int] = []
        """Processes in the group, as the pool knows them."""
        self._awaited: set[int] = set()
        self._failures = 0
        """Transfers in a row that failed though no worker died."""
        self.groups = 0
        """Groups made so far."""

    def send(self, version: int, weights: FlatWeights) -> bool:
        """Whether all workers that are ready have them now. Nothing may be pending in the pool.

        Raises: ClusterError if workers die too often, or transfers keep failing though none dies; PoolGoneError
        if there was no worker for too long.
        """
        # Of a transfer that ended with the pool: nothing is pending, so no answer will ever come.
        self._awaited.clear()
        if not self.groups:
            self._wait_for_all()
        members, deaths = sorted(self._pool.pids), self._pool.deaths
        if not members:
            return False
        try:
            self._transfer(version, weights, members)
        except GroupLostError as error:
            cause = str(error)
        else:
            self._failures = 0
            return True
        # Outside of the handler, since the error's traceback keeps the group and its connections.
        self.leave()
        self._dismiss_late()
        self._failures = self._failures + 1 if self._pool.deaths == deaths else 0
        self._report(version, cause)
        return False

    def _wait_for_all(self) -> None:
        until = time.monotonic() + self._start_timeout_s
        while not self._pool.is_complete and (left := until - time.monotonic()) > 0:
            self._pool.wait_for_all(min(left, _START_S))
            self._on_wait()

    def leave(self) -> None:
        if self._group is not None:
            self._group.leave()
        self._group, self._members = None, []

    def _transfer(self, version: int, weights: FlatWeights, members: list[int]) -> None:
        invitations: Sequence[Invitation | None] = [None] * len(members)
        if is_new := self._group is None or members != self._members:
            self.leave()
            self._meeting = Meeting(len(members), nccl=self._nccl, timeout_s=self._timeout_s)
            invitations = self._meeting.invitations
        for invitation in invitations:
            call = WeightCall(version=version, layout=weights.layout, invitation=invitation)
            self._awaited.add(self._pool.submit(call, repeats=False))
        if is_new:
            self._group, self._members = self._meeting.meet(self._hear), members
            self.groups += 1
            backend = "NCCL" if self._nccl else "gloo"
            logger.info(
                "weights go to %d rollout workers by %s (group %d)", len(members), backend, self.groups
            )
        device = self._group.device
        header = torch.tensor([version, weights.values.numel()], dtype=torch.int64, device=device)
        self._group.broadcast(header, self._hear)
        for bucket in weights.values.split(BUCKET_VALUES):
            self._group.broadcast(bucket.to(device), self._hear)
        until = time.monotonic() + self._timeout_s
        while self._awaited:
            if time.monotonic() > until:
                raise GroupLostError("a worker did not say in time that it has the weights")
            self._hear()

    def _hear(self) -> None:
        """Take answers that are there. Raises: GroupLostError for one of a worker that died or lost the others."""
        self._on_wait()
        answers = dict(self._pool.poll(_HEAR_S))
        self._awaited -= answers.keys()
        if not all(answer is True for answer in answers.values()):
            raise GroupLostError("a worker died, or lost the others")

    def _dismiss_late(self) -> None:
        """Wait for the workers' own time-outs; who has not answered then is replaced."""
        until, is_told = time.monotonic() + 2 * self._timeout_s, False
        while self._awaited:
            self._on_wait()
            if time.monotonic() > until and not is_told:
                self._pool.end_members_with(self._awaited)
                is_told = True
            self._awaited -= {ticket for ticket, _ in self._pool.poll(_HEAR_S)}

    def _report(self, version: int, cause: str) -> None:
        logger.warning(
            "weights %d did not reach all rollout workers by broadcast (%s); who lacks them gets them with its work, "
            "and the next ones go over a new group",
            *(version, cause),
        )
        if self._failures >= _MOST_FAILURES:
            raise ClusterError(
                f"weights must reach the rollout workers, and {self._failures} broadcasts in a row failed though no "
                f"worker died ({cause}); look at the network between the hosts, or give --rollout.weights "
                "object-store"
            )


class HeldWeights:
    """A rollout worker's side: its model, and which policy's weights it has."""

    def __init__(self, module: nn.Module):
        self.module, self.version = module, -1
        self._group: SideGroup | None = None

    def put(self, version: int, weights: Mapping[str, np.ndarray]) -> None:
        """Take weights that came along with work."""
        put_weights(self.module, weights)
        self.version = version

    def receive(self, call: WeightCall) -> bool:
        """Take part in a transfer; whether the model has the weights now."""
        self.version = -1
        try:
            if call.invitation is not None:
                self._group = call.invitation.accept()
            if self._group is None:
                return False
            self._take(call)
        except GroupLostError as error:
            logger.warning("lost the others in the transfer of weights %d: %s", call.version, error)
            self._group = None
            return False
        self.version = call.version
        return True

    def _take(self, call: WeightCall) -> None:
        size, device = sum(size for _, size in call.layout), self._group.device
        header = torch.empty(2, dtype=torch.int64, device=device)
        self._group.broadcast(header)
        assert header.tolist() == [call.version, size], f"expected {call.version} of {size}, got {header}"
        buffer = torch.empty(min(BUCKET_VALUES, size), device=device)
        for first in range(0, size, BUCKET_VALUES):
            bucket = buffer[: min(BUCKET_VALUES, size - first)]
            self._group.broadcast(bucket)
            put_range(self.module, call.layout, first, bucket)
