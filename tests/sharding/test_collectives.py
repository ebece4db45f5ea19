import torch

from sharding.collectives import gather_rows_with_gradient
from tests.process_group import run_on_processes

COUNTS = ((2, 0, 1), (0, 0, 0))


def gather(process):
    """Per case: the rows of all ranks, and the gradient of this rank's rows."""
    found = []
    for counts in COUNTS:
        own = torch.full((counts[process.rank], 3), float(process.rank + 1), requires_grad=True)
        gathered = gather_rows_with_gradient(counts)(own)
        factors = torch.arange(float(gathered.shape[0]))[:, None] * 10**process.rank
        (gathered * factors).sum().backward()
        found.append((gathered.detach(), own.grad))
    return found


def test_every_rank_gets_all_rows_and_gives_back_the_gradients_of_all_ranks():
    results = run_on_processes(gather, 3)
    for rank, ((gathered, gradient), _) in enumerate(results):
        assert gathered[:, 0].tolist() == [1, 1, 3]
        rows = {0: [0, 1], 1: [], 2: [2]}[rank]
        assert gradient.tolist() == [[row * 111.0] * 3 for row in rows]
    for _, (gathered, gradient) in results:
        assert gathered.shape == gradient.shape == (0, 3)
