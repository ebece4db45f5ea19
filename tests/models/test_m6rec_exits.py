"""Early exit: an exit answers as a model would that ends there, and what is answered goes no further."""

import pytest
import torch
import torch.nn.functional as F

from cluster.errors import ConfigError
from tests.models.test_m6rec import CONTEXT, looked_up, make_model, make_users
from tests.models.test_mtgr import random_log
from tests.text_cases import TEXT_RANKERS

CANDIDATES = torch.tensor([[2, 9, 2], [1, -1, -1], [-1, 0, 5]])
BLOCKS = 4


def make_exiting(name: str, exits: tuple[int, ...] = (2, 3), **options):
    return make_model(name, num_blocks=BLOCKS, exits=exits, **options)


def ended_at(model, name: str, number: int):
    """The same model without the layers behind a stop, which answers as that stop does."""
    shorter = make_model(name, num_blocks=model.stops[number])
    weights = model.state_dict()
    shorter.load_state_dict({key: weights[key] for key in shorter.state_dict()})
    if number < len(model.exits):
        shorter.classify = lambda states, item, *_: by_hand(model.exits[number], states, item)
    return shorter


def by_hand(head, states, item) -> torch.Tensor:
    found = states.prompts @ head.classifier.weight.T + head.classifier.bias
    if head.likeness is None:
        return found
    users, items = (F.normalize(part, dim=-1) for part in (states.begins, states.alone[item]))
    return found + (users * items).sum(-1, keepdim=True) * head.likeness.weight[:, 0]


def scores(model) -> torch.Tensor:
    ids = model.candidate_ids(make_users(), CANDIDATES)
    return model.logits(looked_up(model, ids), make_users(), CANDIDATES)


def sureness(answers: torch.Tensor) -> torch.Tensor:
    """The least likely of the answers of each candidate."""
    return torch.maximum(answers.sigmoid(), 1 - answers.sigmoid()).min(-1).values


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", TEXT_RANKERS)
def test_a_candidate_is_answered_where_it_is_first_sure(name, share):
    """Asked for what a share of the candidates is not sure of at the first exit."""
    model, real = make_exiting(name), CANDIDATES >= 0
    found = [scores(ended_at(model, name, number))[real] for number in range(3)]
    model.exit_confidence = sureness(found[0]).quantile(share).item() if share < 1 else 1.0
    expected, answered = found[-1].clone(), torch.full((int(real.sum()),), 2)
    for number in (1, 0):
        sure = sureness(found[number]) >= model.exit_confidence
        expected[sure], answered[sure] = found[number][sure], number
    torch.testing.assert_close(scores(model)[real], expected, atol=1e-5, rtol=1e-4)
    assert (len(answered.unique()) > 1) == (share == 0.5)


@pytest.mark.parametrize("name", ["m6-rec-ranking", "m6-rec-ranking of adapters"])
def test_exits_add_their_losses_and_teach_the_layers_nothing(name):
    model = make_exiting(name)
    batch = model.training_batch(random_log(num_users=3), CONTEXT)

    def loss_of(some) -> torch.Tensor:
        return some(looked_up(some, some.ids(batch, CONTEXT)), batch, CONTEXT).sum

    parts = [loss_of(ended_at(model, name, number)) for number in range(3)]
    loss = loss_of(model)
    assert loss.item() == pytest.approx(sum(map(float, parts)), rel=1e-5)
    loss.backward()
    without = ended_at(model, name, 2)
    loss_of(without).backward()
    gradients = {key: weights.grad for key, weights in model.named_parameters()}
    for key, weights in without.named_parameters():
        torch.testing.assert_close(gradients[key], weights.grad, atol=1e-6, rtol=1e-5)
    assert all(gradients[key].any() for key in gradients if key.startswith("exits."))


def test_a_share_of_what_exits_learn_is_learnt_by_the_layers_below():
    gradients = {}
    for weight in (0.0, 0.25, 1.0):
        model = make_exiting("m6-rec-ranking", exit_weight=weight)
        batch = model.training_batch(random_log(num_users=3), CONTEXT)
        model(looked_up(model, model.ids(batch, CONTEXT)), batch, CONTEXT).sum.backward()
        gradients[weight] = {key: weights.grad for key, weights in model.named_parameters()}
    for key, alone in gradients[0.0].items():
        expected = alone + 0.25 * (gradients[1.0][key] - alone)
        if not key.startswith("exits."):
            torch.testing.assert_close(gradients[0.25][key], expected, atol=1e-4, rtol=1e-3)
    marks = "encoder.marks.weight"
    assert not torch.allclose(gradients[0.0][marks], gradients[1.0][marks])
    with pytest.raises(ConfigError, match="exit-weight must lie in"):
        make_exiting("m6-rec-ranking", exit_weight=1.5)
    with pytest.raises(ConfigError, match=r"exit-weight 0.2 is of --model.exits, and there are none"):
        make_exiting("m6-rec-ranking", exits=(), exit_weight=0.2)


def test_prompts_that_are_answered_take_their_regions_with_them():
    model = make_exiting("m6-rec-ranking", separate_blocks=1, joint_tokens="last")
    users, shown = make_users(), torch.arange(12)
    reading = model.encoder.reader.scoring(
        users, users.items.with_values(torch.ones_like(shown)), shown.numpy()
    )
    kept = torch.zeros(12, dtype=torch.bool)
    kept[3] = True
    fewer, tokens = reading.narrowed(kept)
    assert fewer.prompts.num_rows == 1 and fewer.regions.num_rows == 2 and fewer.slots.tolist() == [0]
    assert len(tokens) == len(fewer.alone.values) + len(fewer.regions.values) + len(fewer.prompts.values)
    none, _ = reading.narrowed(kept & False)
    assert none.prompts.num_rows == 0 and none.regions.num_rows == 1


@pytest.mark.parametrize("exits", [(1,), (4,), (3, 2), (2, 2)])
def test_exits_lie_between_the_joint_layers_and_the_last(exits):
    with pytest.raises(ConfigError, match="must rise, lie above model"):
        make_exiting("m6-rec-ranking", exits)


def test_likelihoods_have_no_exits():
    with pytest.raises(ConfigError, match="exits are of --model"):
        make_exiting("m6-rec-ranking as published", scoring="likelihood")


def test_neighbouring_layers_share_blocks():
    """Four layers of two blocks are a model of four layers with equal weights in pairs."""
    model, unshared = (
        make_model("m6-rec-ranking", num_blocks=4, distinct_blocks=count) for count in (2, None)
    )
    weights = model.state_dict()
    for name, tensor in unshared.state_dict().items():
        before, blocks, after = name.partition("decoder.blocks.")
        number, _, rest = after.partition(".")
        tensor.copy_(weights[f"{before}{blocks}{int(number) // 2}.{rest}" if blocks else name])
    torch.testing.assert_close(scores(model), scores(unshared))
    assert sum(map(torch.numel, model.parameters())) < 0.6 * sum(map(torch.numel, unshared.parameters()))


@pytest.mark.parametrize("count", [0, 4])
def test_there_are_no_more_blocks_than_layers(count):
    with pytest.raises(ConfigError, match="must be 1 to model"):
        make_model("m6-rec", distinct_blocks=count)
