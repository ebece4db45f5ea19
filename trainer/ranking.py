"""Evaluation of models that say how users answer given items: AUC, AUC within users, and calibration.

Shapes: n exposures of all users, A actions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit

from cluster.errors import NobodyHeldOutError
from data_streams.configuration import DataConfig
from data_streams.exposures import NO_ITEM, ExposureBatch, ExposureStream
from sharding.collectives import broadcast_json, exchange_integers, gather_on_first
from sharding.item_index import evaluating
from trainer.assembly import Assembly
from trainer.calibration import Calibration, fit_calibration
from trainer.configuration import PretrainConfig
from trainer.evaluate import EvaluationResult, in_step

CALIBRATION_BINS = 10


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says of exposures and what users did."""

    users: np.ndarray
    """[n] int64 user rows."""
    logits: np.ndarray
    """[n, A] float32."""
    labels: np.ndarray
    """[n, A] bool."""


def answer_metrics(assembly: Assembly, data: DataConfig) -> dict[str, float]:
    """auc, gauc and logloss of every action on the validation exposures, as needed while training; collective."""
    answers = _collect(assembly, data, "valid")
    metrics = None if answers is None else _metrics(answers, assembly.model.actions, answers.logits)
    return broadcast_json(metrics, assembly.process)


def evaluate_answers(
    assembly: Assembly, config: PretrainConfig, *, split: str, step: int
) -> EvaluationResult:
    """Calibrate on the validation exposures, keep that in the run directory, and measure it on a split's.

    `step` is that of the weights; rewards read a calibration with no others.

    A collective call, whose result is the same on every rank.
    """
    fitted = _collect(assembly, config.data, "valid")
    measured = fitted if split == "valid" else _collect(assembly, config.data, split)
    outcome = None
    if fitted is not None:
        actions = assembly.model.actions
        calibration = fit_calibration(fitted.logits, fitted.labels)
        calibration.save(config.run_dir, actions, step=step, data_path=config.data.path)
        outcome = {
            "num_users": len(np.unique(measured.users)),
            "metrics": _metrics(measured, actions, _calibrated(calibration, measured.logits)),
        }
    found = broadcast_json(outcome, assembly.process)
    return EvaluationResult(split=split, seen_filtered=False, step=step, **found)


def _calibrated(calibration: Calibration, logits: np.ndarray) -> np.ndarray:
    return logits * np.array(calibration.scales) + np.array(calibration.shifts)


def _collect(assembly: Assembly, data: DataConfig, split: str) -> Answers | None:
    """All exposures of a split on rank 0; None on the other ranks.

    Raises: NobodyHeldOutError where there are none.
    """
    process = assembly.process
    stream = ExposureStream(
        data,
        split=split,
        actions=assembly.model.actions,
        rank=process.rank,
        world_size=process.world_size,
        users_per_batch=assembly.config.evaluation.users_per_batch,
        user_share=assembly.config.evaluation.user_share,
    )
    own = _score(assembly, stream.batches(), stream.empty_batch())
    counts = [count for (count,) in exchange_integers([len(own.users)], process)]
    if not sum(counts):
        raise NobodyHeldOutError(
            f"there are no exposures around the {split} events of {data.path}; build from more events or with "
            "another split"
        )
    gathered = [
        gather_on_first(torch.from_numpy(column), counts, process)
        for column in (own.users, own.logits, own.labels.astype(np.uint8))
    ]
    if gathered[0] is None:
        return None
    users, logits, labels = (column.numpy() for column in gathered)
    return Answers(users=users, logits=logits, labels=labels.astype(bool))


def _score(assembly: Assembly, batches: Iterable[ExposureBatch], empty: ExposureBatch) -> Answers:
    model, device, lookup = assembly.model, assembly.process.device, assembly.lookup()
    parts = []
    with evaluating(model):
        for batch in in_step(batches, empty, assembly.process):
            rows = lookup(model.candidate_ids(batch.histories, batch.candidates))
            logits = model.logits(rows, batch.histories.to(device), batch.candidates.to(device)).cpu()
            real = batch.candidates != NO_ITEM
            users = batch.histories.user_ids[:, None].expand_as(real)[real]
            parts.append((users.numpy(), logits[real].numpy(), batch.answers[real].numpy()))
    if not parts:
        return Answers(
            users=np.zeros(0, dtype=np.int64),
            logits=np.zeros((0, len(model.actions)), dtype=np.float32),
            labels=np.zeros((0, len(model.actions)), dtype=bool),
        )
    users, logits, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Answers(users=users, logits=logits, labels=labels)


def _metrics(answers: Answers, actions: tuple[str, ...], logits: np.ndarray) -> dict[str, float]:
    """Of the first action under plain names, of the others under NAME/ACTION."""
    found = {}
    for number, action in enumerate(actions):
        suffix = f"/{action}" if number else ""
        own, labels = logits[:, number].astype(np.float64), answers.labels[:, number]
        found |= {
            f"auc{suffix}": auc(own, labels),
            f"gauc{suffix}": grouped_auc(own, labels, answers.users),
            f"logloss{suffix}": float((np.logaddexp(0, own) - labels * own).mean()),
            f"calibration_error{suffix}": calibration_error(expit(own), labels),
        }
    return found


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Chance that a positive has a larger score than a negative, ties counting half; 0.5 without both.

    Shapes: scores, labels [n].
    """
    return grouped_auc(scores, labels, np.zeros(len(scores), dtype=np.int64))


def grouped_auc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """The mean AUC of the users that have positives and negatives, weighted by their exposures.

    Source: Zhou et al., Deep Interest Network (2018). Shapes: three times [n].
    """
    _, user = np.unique(users, return_inverse=True)
    place = _ranks_within(scores, user)
    count, positives = np.bincount(user), np.bincount(user, weights=labels)
    above = np.bincount(user, weights=place * labels) - positives * (positives - 1) / 2
    pairs = positives * (count - positives)
    known = pairs > 0
    if not known.any():
        return 0.5
    return float(np.average(above[known] / pairs[known], weights=count[known]))


def _ranks_within(scores: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Rank of each score among those of its user, from 0, the mean where several are equal. Shapes: [n] each."""
    order = np.lexsort((scores, user))
    sorted_user, sorted_scores = user[order], scores[order]
    first = np.searchsorted(sorted_user, sorted_user)
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (sorted_user[1:] != sorted_user[:-1]) | (sorted_scores[1:] != sorted_scores[:-1])
    tie = np.cumsum(begins) - 1
    within = np.arange(len(order)) - first
    mean = np.bincount(tie, weights=within) / np.bincount(tie)
    ranks = np.empty(len(order))
    ranks[order] = mean[tie]
    return ranks


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance between predicted and real frequency over bins with equally many exposures. Shapes: twice [n]."""
    order = np.argsort(probabilities, kind="stable")
    parts = np.array_split(order, min(CALIBRATION_BINS, len(order)))
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(order))
