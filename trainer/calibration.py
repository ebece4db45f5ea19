"""Platt scaling: log-odds of a ranking model, stretched and shifted until they are probabilities of held-out data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from cluster.errors import DataError
from cluster.storage import Storage

CALIBRATION = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """p = sigm(scale * logit + shift) for each action."""

    scales: tuple[float, ...]
    shifts: tuple[float, ...]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Shapes: [..., A] -> [..., A]."""
        return (logits * torch.tensor(self.scales) + torch.tensor(self.shifts)).sigmoid()

    def save(self, run_dir: str, actions: Sequence[str], *, step: int, data_path: str) -> None:
        """Keep it in the run directory, as that of the weights and the data it was fitted with."""
        rows = zip(actions, self.scales, self.shifts, strict=True)
        document = {
            "step": step,
            "data": data_path,
            "actions": {action: {"scale": scale, "shift": shift} for action, scale, shift in rows},
        }
        Storage(run_dir).write(CALIBRATION, json.dumps(document, indent=1).encode())

    @staticmethod
    def load(run_dir: str, actions: Sequence[str], *, step: int, data_path: str) -> "Calibration":
        """The calibration of a step's weights.

        Raises: DataError where the run was not calibrated, or for another step, other data or other actions.
        """
        storage = Storage(run_dir)
        again = f"run `grail evaluate {run_dir} --checkpoint {step}`"
        try:
            document = json.loads(storage.read(CALIBRATION))
        except FileNotFoundError as error:
            raise DataError(
                f"the ranking model of {run_dir} must be calibrated before its scores are used, and there is no "
                f"{CALIBRATION}; {again}"
            ) from error
        # Files that name no step, as they once were, hold the actions alone.
        if isinstance(document.get("step"), int):
            _require_fitted_with(document, storage.path(CALIBRATION), step, data_path, again)
            document = document["actions"]
        if list(document) != list(actions):
            raise DataError(
                f"{storage.path(CALIBRATION)} must be about the actions {', '.join(actions)}, and is about "
                f"{', '.join(document)}; {again} again"
            )
        return Calibration(
            scales=tuple(entry["scale"] for entry in document.values()),
            shifts=tuple(entry["shift"] for entry in document.values()),
        )


def _require_fitted_with(
    document: Mapping[str, Any], path: str, step: int, data_path: str, again: str
) -> None:
    if (document["step"], document["data"]) != (step, data_path):
        raise DataError(
            f"{path} must be fitted with the weights of step {step} on {data_path}, and is of step "
            f"{document['step']} on {document['data']}, which was evaluated last; {again} again"
        )


def fit_calibration(logits: np.ndarray, labels: np.ndarray) -> Calibration:
    """The most likely scale and shift of each action; unchanged where one class is missing.

    No scale is below 0: a model that is worse than chance then tells nothing, where its order would be turned round.

    Source: Platt, Probabilistic Outputs for Support Vector Machines (1999), without his prior.

    Shapes: logits, labels [n, A].
    """
    fitted = [_fit(logits[:, action], labels[:, action]) for action in range(logits.shape[1])]
    scales, shifts = zip(*fitted, strict=True)
    return Calibration(scales=scales, shifts=shifts)


def _fit(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    labels = labels.astype(np.float64)
    if labels.min(initial=1) == labels.max(initial=0) or not len(labels):
        return 1.0, 0.0

    # Takes half a second, and every worker of every model would wait for it at its start.
    from scipy.optimize import minimize

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = parameters[0] * logits + parameters[1]
        error = expit(scaled) - labels
        value = (np.logaddexp(0, scaled) - labels * scaled).mean()
        return value, np.array([(error * logits).mean(), error.mean()])

    bounds = ((0, None), (None, None))
    scale, shift = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds).x
    return float(scale), float(shift)
