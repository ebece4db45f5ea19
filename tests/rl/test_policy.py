"""The policy under an objective: one pass over the prompt equals a row of its own for every completion."""

from dataclasses import replace

import pytest
import torch

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.recommender import StepContext
from models.tables import LookedUp
from rl.configuration import AlignOptions
from rl.drawing import Drawing
from rl.objectives import PolicyInputs
from rl.objectives.ecpo import Ecpo
from rl.objectives.grpo_sr import GrpoSr
from rl.policy import PolicyModule, experience, padded
from rl.prompts import POSITIVES, to_prompts
from rl.types import Advantages
from tests.generator_cases import CODE_SIZES, GENERATORS, make_generator, prompt_rows, semantic_ids
from tests.training_cases import make_batch
from trainer.expert_balance import forget_routings

GROUP = 4
CODES = semantic_ids().codes
SPACES = ("free", "catalogue")


def make_drawing(**options):
    chosen = AlignOptions(group_size=GROUP, **options)
    return Drawing(chosen, CODES, CODE_SIZES, seed=4, precision=torch.float32)


def make_prompts():
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(97, (length,), generator=generator) for length in (5, 2, 9, 12)]
    batch = make_batch(sequences)
    positives = Jagged.from_lengths(torch.tensor([5, 9, 11, 2, 60]), torch.tensor([1, 0, 3, 1]))
    return replace(batch, targets=None, target_features={}, supervision={POSITIVES: positives})


def drawn_by(model, drawing, prompts, serials=(0, 1, 2, 3)):
    given = to_prompts(prompts, torch.tensor(serials), CODES)
    return drawing.draw(model, prompt_rows(model, prompts), prompts, given, 7)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", GENERATORS)
def test_the_learner_finds_the_stamped_log_probabilities(name, space):
    model, drawing, prompts = make_generator(name), make_drawing(space=space, temperature=1.7), make_prompts()
    drawn = drawn_by(model, drawing, prompts)
    found = drawing.log_probabilities(
        model, prompt_rows(model, prompts), prompts, torch.from_numpy(drawn.paths)
    )
    torch.testing.assert_close(found.detach(), torch.from_numpy(drawn.log_probs), atol=1e-4, rtol=0)
    other = make_drawing(space=space).log_probabilities(
        model, prompt_rows(model, prompts), prompts, torch.from_numpy(drawn.paths)
    )
    assert (other.detach() - torch.from_numpy(drawn.log_probs)).abs().max() > 1e-2
    if space == "catalogue":
        assert drawn.legal.all()


@pytest.mark.parametrize("draws", ["distinct", "beam"])
@pytest.mark.parametrize("space", SPACES)
def test_different_completions_carry_the_probability_of_each_by_itself(space, draws):
    model, prompts = make_generator("decoder-only"), make_prompts()
    drawing = make_drawing(space=space, draws=draws, temperature=1.7)
    drawn = drawn_by(model, drawing, prompts)
    # Where items share a path, it comes once for each of them.
    different = drawn.items[..., None] if space == "catalogue" else drawn.paths
    assert all(len({tuple(one) for one in group}) == GROUP for group in different.tolist())
    found = drawing.log_probabilities(
        model, prompt_rows(model, prompts), prompts, torch.from_numpy(drawn.paths)
    )
    torch.testing.assert_close(found.detach(), torch.from_numpy(drawn.log_probs), atol=1e-4, rtol=0)
    again = drawn_by(model, drawing, prompts, serials=(5, 6, 7, 8))
    assert (again.paths == drawn.paths).all() == (draws == "beam")
    if draws == "beam":
        everything = drawn_by(model, make_drawing(space=space, temperature=1.7), prompts)
        assert (drawn.log_probs.sum(-1).max(1) >= everything.log_probs.sum(-1).max(1) - 1e-4).all()


def test_more_different_completions_than_there_are_items_are_refused():
    options = AlignOptions(group_size=98, draws="distinct", space="catalogue")
    with pytest.raises(ConfigError, match=r"align.group-size must not exceed the 97 items"):
        Drawing(options, CODES, CODE_SIZES, seed=4, precision=torch.float32)


def test_draws_depend_on_the_prompt_and_not_on_its_neighbours():
    model, drawing, prompts = make_generator("decoder-only"), make_drawing(), make_prompts()
    together = drawn_by(model, drawing, prompts)
    alone = drawn_by(model, drawing, prompts.select(2, 3), serials=(2,))
    assert (alone.paths[0] == together.paths[2]).all()
    again = drawn_by(model, drawing, prompts.select(2, 3), serials=(9,))
    assert (again.paths[0] != together.paths[2]).any()


def make_learnt(model, drawing, prompts):
    drawn = drawn_by(model, drawing, prompts)
    generator = torch.Generator().manual_seed(8)
    values = torch.randn(4, GROUP, generator=generator).numpy()
    mask = torch.rand(4, GROUP, generator=generator).numpy() > 0.2
    advantages = Advantages(values=values, mask=mask, skipped=mask.all(1))
    return replace(prompts, supervision=experience(prompts, drawn, advantages, CODES))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_shared_prompt_equals_a_row_of_its_own_for_every_completion(name):
    drawing, prompts, objective = make_drawing(), make_prompts(), GrpoSr.Config(alpha=0.3)
    model, alone = make_generator(name).train(), make_generator(name).train()
    learnt = make_learnt(model, drawing, prompts)
    module = PolicyModule(model, torch.float32, objective=objective.build(), drawing=drawing)
    rows = leaves_of(prompt_rows(model, prompts))
    loss = module.loss(rows, learnt, StepContext(step=0))
    loss.sum.backward()
    own_rows = [
        leaves_of(prompt_rows(alone, prompts.select(user, user + 1))) for user in range(prompts.num_users)
    ]
    expected = one_by_one(alone, drawing, objective.build(), own_rows, learnt)
    expected.backward()
    torch.testing.assert_close(loss.sum, expected, atol=1e-5, rtol=1e-5)
    for (parameter, own), found in zip(
        zip(model.named_parameters(), alone.parameters(), strict=True), model.parameters(), strict=True
    ):
        gradient = torch.zeros_like(found) if found.grad is None else found.grad
        wanted = torch.zeros_like(own) if own.grad is None else own.grad
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4, msg=parameter[0])
    for feature, found in rows.items():
        wanted = torch.cat([own[feature].rows.grad for own in own_rows])
        torch.testing.assert_close(found.rows.grad, wanted, atol=1e-5, rtol=1e-4)


def test_the_anchor_is_the_bare_models_likelihood_wherever_completions_are_drawn():
    model, prompts, kept = make_generator("decoder-only"), make_prompts(), []
    drawing = make_drawing(space="catalogue", temperature=1.7)

    class Kept(GrpoSr):
        def __call__(self, inputs):
            kept.append(inputs)
            return super().__call__(inputs)

    learnt = make_learnt(model, drawing, prompts)
    module = PolicyModule(model, torch.float32, objective=Kept(GrpoSr.Config()), drawing=drawing)
    module.loss(prompt_rows(model, prompts), learnt, StepContext(step=0))
    positives, exists = padded(learnt.supervision["positive_paths"])
    bare = model.log_probabilities(prompt_rows(model, prompts), prompts, positives)
    torch.testing.assert_close(kept[0].positive_log_probs[exists], bare[exists])
    among_items = drawing.log_probabilities(model, prompt_rows(model, prompts), prompts, positives)
    assert (among_items - bare)[exists].abs().max() > 1e-2


def leaves_of(rows):
    return {
        name: LookedUp(ids=found.ids, rows=found.rows.detach().requires_grad_())
        for name, found in rows.items()
    }


def one_by_one(model, drawing, objective, rows, learnt):
    """The same loss with a prompt of its own for every path."""
    paths = learnt.supervision["paths"].values.unflatten(0, (4, GROUP))
    positives, exists = padded(learnt.supervision["positive_paths"])
    everything = torch.cat((paths, positives), 1)
    log_probs = torch.stack(
        [
            torch.cat(
                [own_path(model, drawing, rows, learnt, user, everything[user, place]) for user in range(4)]
            )
            for place in range(everything.shape[1])
        ],
        dim=1,
    )
    by_group = lambda name: learnt.supervision[name].values.unflatten(0, (4, GROUP))  # noqa: E731
    inputs = PolicyInputs(
        log_probs=log_probs[:, :GROUP],
        old_log_probs=by_group("old_log_probs"),
        advantages=by_group("advantages"),
        mask=by_group("counts"),
        positive_log_probs=log_probs[:, GROUP:],
        positive_mask=exists,
    )
    return objective(inputs).sum


def own_path(model, drawing, rows, learnt, user, path):
    batch = replace(learnt, supervision={}).select(user, user + 1)
    return drawing.log_probabilities(model, rows[user], batch, path[None, None])[:, 0]


def test_routers_count_what_a_group_shares_once():
    drawing, prompts = make_drawing(), make_prompts()
    model = make_generator("onerec-v2 of experts").train()
    learnt = make_learnt(model, drawing, prompts)
    module = PolicyModule(model, torch.float32, objective=Ecpo.Config(alpha=0.0).build(), drawing=drawing)
    forget_routings(module.mixtures)
    module.loss(prompt_rows(model, prompts), learnt, StepContext(step=0))
    # What the first code is predicted from belongs to the prompt; then each completion brings a token for each code.
    expected = prompts.num_users * (1 + (len(CODE_SIZES) - 1) * GROUP)
    for layer in module.mixtures:
        assert sum(routing.loads.sum() for routing in layer.routings) == expected * layer.config.top_k


def test_rows_of_unequal_number_stand_side_by_side():
    rows = Jagged.from_lengths(torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([2, 0, 1]))
    values, exists = padded(rows)
    assert values.tolist() == [[[1, 2], [3, 4]], [[-1, -1], [-1, -1]], [[5, 6], [-1, -1]]]
    assert exists.tolist() == [[True, True], [False, False], [True, False]]
