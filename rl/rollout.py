"""Where completions come from: the learners themselves, or a pool of workers that holds the dense weights alone.

Rows of huge tables stay with the learners, who look up what prompts need and ship it with them.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.configuration import ClusterConfig
from cluster.errors import DivergenceError, PoolGoneError
from cluster.placement import Placement
from cluster.pool import Pool
from cluster.process import Process
from cluster.shared_object import SharedObject
from data_streams.batch import SequenceBatch
from data_streams.item_table import ItemTable
from models.tables import LookedUp, Rows
from rl.configuration import AlignOptions, RolloutConfig
from rl.drawing import Drawing
from rl.heartbeat import Heartbeat
from rl.policy_version import age
from rl.prompts import PromptStep, to_batch, to_prompts
from rl.types import Completions, Prompts, join_completions
from rl.weight_broadcast import HeldWeights, WeightCall, WeightSender
from rl.weight_sync import FETCH_TIMEOUT_S, FlatWeights, gather_weights
from sharding.collectives import gather_objects
from trainer.assembly import Assembly, build_model, load_item_features, load_semantic_ids
from trainer.configuration import PretrainConfig
from trainer.dense_module import resolve_precision
from trainer.step_input import split_users

logger = logging.getLogger(__name__)

NAME = "rollout pool"

_MOST_NOT_FINITE = 3


class Rollouts(ABC):
    """Begins and ends the drawing of steps, in order; every method is a collective call of all learners."""

    def __init__(self, assembly: Assembly, engine: Any, drawing: Drawing):
        self.assembly, self.engine, self.drawing = assembly, engine, drawing
        self.process: Process = assembly.process
        self.item_codes = torch.from_numpy(assembly.semantic_ids.codes)
        """[N, L] codes of the catalogue, on the host."""
        self.version = -1

    @abstractmethod
    def settle(self) -> None:
        """Wait for whatever must have been drawn before `publish`."""

    @abstractmethod
    def publish(self, version: int) -> None:
        """From here on completions are drawn by the weights as they are now."""

    @abstractmethod
    def begin(self, step: PromptStep) -> Any:
        """Start to draw for a step; what is returned is for `finish`."""

    @abstractmethod
    def finish(self, begun: Any) -> list[Completions] | None:
        """The completions of each rank's users on rank 0, None on the others, which must go on to `Heartbeat.end`.

        Raises: PoolGoneError on rank 0 where there was no worker for too long.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the workers back, if there are any."""

    def _shipped(self, part: SequenceBatch, serials: torch.Tensor) -> "PromptPart":
        rows = self.assembly.lookup()(self.assembly.model.prompt_ids(part))
        return PromptPart(prompts=to_prompts(part, serials, self.item_codes), rows=_to_arrays(rows))


class OwnRollouts(Rollouts):
    """The learners draw with the weights they train."""

    def settle(self) -> None:
        """Nothing is drawn before it is waited for."""

    def publish(self, version: int) -> None:
        self.version = version

    def begin(self, step: PromptStep) -> PromptStep:
        return step

    def finish(self, begun: PromptStep) -> list[Completions] | None:
        device, model = self.process.device, self.assembly.model
        rows = self.assembly.lookup()(model.prompt_ids(begun.prompts))
        prompts = to_prompts(begun.prompts, begun.serials, self.item_codes)
        drawn = self.drawing.draw(model, rows, begun.prompts.to(device), prompts, self.version)
        return gather_objects(drawn, self.process)

    def close(self) -> None:
        """There is nothing to give back."""


@dataclass(frozen=True, kw_only=True)
class PromptPart:
    """Some prompts of one rank and the rows of huge tables they need."""

    prompts: Prompts
    rows: Mapping[str, tuple[np.ndarray | None, ...]]
    """Feature -> ids, rows and item features, as `LookedUp` has them."""


@dataclass(frozen=True, kw_only=True)
class RolloutWork:
    """What a rollout worker is given at once: prompts, and the policy of `version` to answer them with."""

    part: PromptPart
    version: int
    weights: SharedObject | None
    """Name -> flat array; None for a worker that has them already."""


class PooledRollouts(Rollouts):
    """Workers draw; rank 0 keeps their queue, and a worker that died is replaced and given the weights of its work.

    Weights come with the work, or by a broadcast before it; a worker that missed that refuses work without any.
    """

    def __init__(
        self,
        assembly: Assembly,
        engine: Any,
        drawing: Drawing,
        *,
        config: RolloutConfig,
        cluster: ClusterConfig,
        placement: Placement | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        """`stop_requested` ends the wait for completions, whose step is then given up."""
        super().__init__(assembly, engine, drawing)
        self._config, self._stop_requested = config, stop_requested
        self._num_not_finite = 0
        self._parts = math.ceil(config.workers / self.process.world_size)
        self._heartbeat = Heartbeat(self.process, cluster)
        self._pool: Pool | None = None
        self._sender: WeightSender | None = None
        self._weights: FlatWeights | None = None
        self._shared: SharedObject | None = None
        """Those weights in the object store, where they are wanted there."""
        self._done: dict[int, Completions] = {}
        self._asked: dict[int, tuple[int, PromptPart]] = {}
        """By the ticket of the pool: the ticket that `begin` gave out, and what is to be drawn for."""
        if self.process.rank == 0:
            self._pool = Pool(
                *(build_worker, assembly.config, drawing.options, bool(config.gpus_per_worker)),
                members=config.workers,
                cluster=cluster,
                cpus_per_member=config.cpus_per_worker,
                gpus_per_member=config.gpus_per_worker,
                patience_s=config.wait_s,
                item_timeout_s=config.timeout_s,
                name=NAME,
                placement=placement,
            )
        if self._pool is not None and config.weights == "broadcast":
            nccl = self.process.device.type == "cuda" and config.gpus_per_worker > 0
            self._sender = WeightSender(
                self._pool,
                nccl=nccl,
                start_timeout_s=cluster.start_timeout_s,
                on_wait=self._heartbeat.beat_if_due,
            )

    def settle(self) -> None:
        """Before a broadcast all completions come in, since every worker takes part in it; a wish to stop ends that."""
        while self._sender is not None and self._pool.pending and not self._stop_requested():
            try:
                self._poll()
            except PoolGoneError:
                break  # `finish` meets the same
        self._heartbeat.end()

    def publish(self, version: int) -> None:
        self.version, self._shared = version, None
        self._weights = gather_weights(self.engine, self.process)
        if self._sender is not None:
            self._broadcast()
        elif self._pool is not None:
            self._share()
            self._weights = None  # the store holds them now
        if self._config.weights == "broadcast":
            self._heartbeat.end()

    def _broadcast(self) -> None:
        if self._pool.pending:
            return  # the pool is gone, or the run is to stop
        with suppress(PoolGoneError):  # `finish` meets the same
            self._sender.send(self.version, self._weights)

    def _share(self) -> SharedObject:
        if self._shared is None:
            self._shared = SharedObject.put(self._weights.arrays())
        return self._shared

    def begin(self, step: PromptStep) -> list[list[int]] | None:
        parts, first = [], 0
        for part in split_users(step.prompts, self._parts):
            parts.append(self._shipped(part, step.serials[first : first + part.num_users]))
            first += part.num_users
        everyone = gather_objects(parts, self.process)
        return None if everyone is None else [[self._submit(part) for part in own] for own in everyone]

    def finish(self, begun: list[list[int]] | None) -> list[Completions] | None:
        if begun is None:
            return None
        wanted = {ticket for tickets in begun for ticket in tickets}
        while not wanted <= self._done.keys():
            if self._stop_requested():
                return None
            self._poll()
        return [join_completions([self._done.pop(ticket) for ticket in tickets]) for tickets in begun]

    def close(self) -> None:
        if self._sender is not None:
            self._sender.leave()
        if self._pool is not None:
            self._pool.close()

    def _submit(self, part: PromptPart, instead_of: int | None = None, *, is_refused: bool = False) -> int:
        weights = self._share() if is_refused or self._sender is None else None
        ticket = self._pool.submit(RolloutWork(part=part, version=self.version, weights=weights))
        self._asked[ticket] = (ticket if instead_of is None else instead_of, part)
        return ticket

    def _poll(self) -> None:
        """Take what comes back in time for the next beat."""
        for ticket, drawn in self._pool.poll(self._heartbeat.every_s):
            self._take(ticket, drawn)
        self._heartbeat.beat()

    def _take(self, ticket: int, drawn: Completions | None) -> None:
        """Keep completions, or drop those of a lost policy and have them drawn again by the one of now."""
        if ticket not in self._asked:
            return  # the answer to a broadcast that was given up
        asked, part = self._asked.pop(ticket)
        if drawn is None:
            self._submit(part, asked, is_refused=True)
            return
        if not np.isfinite(drawn.log_probs).all():
            self._redraw_not_finite(part, asked)
            return
        if age(drawn.policy_version, self.version) is not None:
            self._done[asked] = drawn
            return
        logger.warning(
            "completions of %d prompts are by policy %d, which was lost; they are dropped and drawn again by %d",
            *(part.prompts.num_users, drawn.policy_version, self.version),
        )
        self._submit(part, asked)

    def _redraw_not_finite(self, part: PromptPart, asked: int) -> None:
        self._num_not_finite += 1
        if self._num_not_finite > _MOST_NOT_FINITE:
            raise DivergenceError(
                f"log-probabilities of completions must be finite, and those of {self._num_not_finite} parts of "
                "prompts were not; lower train.learning-rate, or look at the machines of the rollout workers"
            )
        logger.warning("completions have log-probabilities that are not finite; they are drawn again")
        self._submit(part, asked)


def build_worker(
    config: PretrainConfig, options: AlignOptions, use_gpu: bool
) -> Callable[[RolloutWork | WeightCall], Completions | bool | None]:
    """What a member of the pool does with some prompts, or None without the weights to do it; and how it gets weights
    by broadcast."""
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    items = ItemTable.load(config.data.path)
    semantic_ids = load_semantic_ids(config, items)
    model = build_model(config, items, load_item_features(config, items), semantic_ids).eval().to(device)
    codes = torch.from_numpy(semantic_ids.codes).to(device)
    precision = resolve_precision(config.train.precision, device)
    drawing = Drawing(options, codes, model.code_sizes, seed=config.seed, precision=precision)
    held = HeldWeights(model)

    def work(given: RolloutWork | WeightCall) -> Completions | bool | None:
        if isinstance(given, WeightCall):
            return held.receive(given)
        if held.version != given.version:
            if given.weights is None:
                return None
            held.put(given.version, given.weights.get(FETCH_TIMEOUT_S))
        prompts, rows = given.part.prompts, _to_rows(given.part.rows, device)
        return drawing.draw(model, rows, to_batch(prompts).to(device), prompts, given.version)

    return work


def _to_arrays(rows: Rows) -> dict[str, tuple[np.ndarray | None, ...]]:
    return {
        name: tuple(
            None if tensor is None else tensor.cpu().numpy()
            for tensor in (found.ids, found.rows, found.item_features)
        )
        for name, found in rows.items()
    }


def _to_rows(arrays: Mapping[str, tuple[np.ndarray | None, ...]], device: torch.device) -> Rows:
    found = {}
    for name, parts in arrays.items():
        ids, rows, features = (None if part is None else torch.tensor(part, device=device) for part in parts)
        found[name] = LookedUp(ids=ids, rows=rows, item_features=features)
    return found
