"""Cross-entropy of one positive among negatives, some of which may be the positive itself."""

import torch
from torch import Tensor


def info_nce(scores: Tensor, is_positive: Tensor) -> Tensor:
    """-log(exp s_0 / (exp s_0 + sum_j exp s_j)) over negatives j that are not the positive.

    Shapes: scores [S, 1 + N], the positive first; is_positive [S, N] bool, of the negatives -> [S] fp32.
    """
    scores = scores.float()
    negatives = scores[:, 1:].masked_fill(is_positive, float("-inf"))
    return torch.cat((scores[:, :1], negatives), dim=1).logsumexp(1) - scores[:, 0]
