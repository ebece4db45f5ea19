"""Losses that compare the score of a target with those of negatives that all queries share, one by one.

Each formula stands twice: with its derivatives, as it is computed, and as a `reference_` in plain operators.
Negatives equal to the query's target are left out of the sums; means still divide by the number drawn.

Shapes: scores [t, R] of the negatives, positive [t], excluded [t, R] bool; losses [t].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kernels.shared_negatives import Slopes

LOWEST = torch.finfo(torch.float32).min


def binary_cross_entropy(
    positive_weight: float, negative_weight: float, scores: Tensor, positive: Tensor, excluded: Tensor
) -> Slopes:
    """-a log sigm(s+) - b sum_j log(1 - sigm(s_j))."""
    scores.masked_fill_(excluded, float("-inf"))
    losses = positive_weight * F.softplus(-positive) + negative_weight * F.softplus(scores).sum(1)
    return Slopes(
        losses=losses,
        by_positive=-positive_weight * torch.sigmoid(-positive),
        by_scores=scores.sigmoid_(),
        row_scale=torch.full_like(positive, negative_weight),
    )


def reference_binary_cross_entropy(
    positive_weight: float, negative_weight: float, scores: Tensor, positive: Tensor, excluded: Tensor
) -> Tensor:
    negative = -F.logsigmoid(-scores).masked_fill(excluded, 0.0).sum(1)
    return -positive_weight * F.logsigmoid(positive) + negative_weight * negative


def bpr(scores: Tensor, positive: Tensor, excluded: Tensor) -> Slopes:
    """-mean_j log sigm(s+ - s_j)."""
    share = 1 / scores.shape[1]
    scores.sub_(positive[:, None]).masked_fill_(excluded, float("-inf"))
    losses = F.softplus(scores).sum(1) * share
    slopes = scores.sigmoid_()
    return Slopes(
        losses=losses,
        by_positive=slopes.sum(1) * -share,
        by_scores=slopes,
        row_scale=torch.full_like(positive, share),
    )


def reference_bpr(scores: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
    return -F.logsigmoid(positive[:, None] - scores).masked_fill(excluded, 0.0).mean(1)


def top1(scores: Tensor, positive: Tensor, excluded: Tensor) -> Slopes:
    """mean_j [sigm(s_j - s+) + sigm(s_j^2)]."""
    share = 1 / scores.shape[1]
    above, large = _top1_terms(scores, positive)
    above.masked_fill_(excluded, 0.0)
    large.masked_fill_(excluded, 0.0)
    losses = (above.sum(1) + large.sum(1)) * share
    by_above = _sigmoid_slope(above)
    return Slopes(
        losses=losses,
        by_positive=by_above.sum(1) * -share,
        by_scores=scores.mul_(2).mul_(_sigmoid_slope(large)).add_(by_above),
        row_scale=torch.full_like(positive, share),
    )


def reference_top1(scores: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
    terms = torch.sigmoid(scores - positive[:, None]) + torch.sigmoid(scores**2)
    return terms.masked_fill(excluded, 0.0).mean(1)


def top1_max(scores: Tensor, positive: Tensor, excluded: Tensor) -> Slopes:
    """sum_j p_j [sigm(s_j - s+) + sigm(s_j^2)], p = softmax of the negatives' scores."""
    shares, _ = _softmax_of_some(scores.masked_fill(excluded, float("-inf")))
    above, large = _top1_terms(scores, positive)
    terms = above + large
    losses = (shares * terms).sum(1)
    by_above = _sigmoid_slope(above)
    slopes = scores.mul_(2).mul_(_sigmoid_slope(large)).add_(by_above).add_(terms).sub_(losses[:, None])
    return Slopes(
        losses=losses,
        by_positive=-(shares * by_above).sum(1),
        by_scores=slopes.mul_(shares),
        row_scale=torch.ones_like(positive),
    )


def reference_top1_max(scores: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
    shares = scores.masked_fill(excluded, float("-inf")).softmax(1)
    return (shares * (torch.sigmoid(scores - positive[:, None]) + torch.sigmoid(scores**2))).sum(1)


def bpr_max(regularisation: float, scores: Tensor, positive: Tensor, excluded: Tensor) -> Slopes:
    """-log sum_j p_j sigm(s+ - s_j) + r sum_j p_j s_j^2, p = softmax of the negatives' scores.

    With a_j = sigm(s+ - s_j) and w_j = p_j a_j / sum_k p_k a_k, the first term has the derivatives p_j - w_j a_j by
    s_j and -sum_j w_j (1 - a_j) by s+; its logarithm is a difference of two log-sums, which no score can overflow.
    """
    negatives = scores.masked_fill(excluded, float("-inf"))
    log_beaten = F.logsigmoid(positive[:, None] - scores)
    joint = negatives + log_beaten
    shares, log_sum = _softmax_of_some(negatives)
    weights, joint_log_sum = _softmax_of_some(joint)
    beaten, squares = log_beaten.exp_(), scores.square()
    size = (shares * squares).sum(1)
    first = log_sum - joint_log_sum
    by_positive = (weights * beaten).sum(1) - weights.sum(1)
    pull = squares.sub_(size[:, None]).add_(scores, alpha=2).mul_(regularisation).add_(1.0)
    return Slopes(
        losses=first + regularisation * size,
        by_positive=by_positive,
        by_scores=pull.mul_(shares).addcmul_(weights, beaten, value=-1),
        row_scale=torch.ones_like(positive),
    )


def reference_bpr_max(regularisation: float, scores: Tensor, positive: Tensor, excluded: Tensor) -> Tensor:
    shares = scores.masked_fill(excluded, float("-inf")).softmax(1)
    beaten = (shares * torch.sigmoid(positive[:, None] - scores)).sum(1)
    return -beaten.log() + regularisation * (shares * scores**2).sum(1)


def _top1_terms(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sub(scores, positive[:, None]).sigmoid_(), scores.square().sigmoid_()


def _sigmoid_slope(sigmoid: Tensor) -> Tensor:
    """The derivative of a sigmoid from its value."""
    return torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1)


def _softmax_of_some(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over dim 1 where -inf is left out, and the log of its sum; zeros where a row leaves out everything."""
    highest = scores.amax(1).clamp_(min=LOWEST)
    exponentials = (scores - highest[:, None]).exp_()
    total = exponentials.sum(1)
    some = total > 0
    log_sum = torch.where(some, highest + total.log(), 0.0)
    return exponentials.mul_(torch.where(some, 1 / total, 0.0)[:, None]), log_sum
