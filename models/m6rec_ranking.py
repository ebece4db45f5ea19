"""M6-Rec as ranker: the user is read both ways, each shown item as text behind it, and what the last mark says answers.

All candidates of a user share one copy of the user's region, and none sees another. `scoring classifier` asks the state
at [EOS] for each action; with soft prompts, the answers are the last of these: the log-odds of an action are <h, yes> -
<h, no>, so that the softmax over the two options is the probability. `scoring likelihood` needs no head: a candidate
counts by the mean log-likelihood of its words after the user's, learnt from the words of what was clicked.

Source: M6-Rec (Alibaba, 2022), arXiv 2205.08084; `models.text_encoder` tells of the language model. RECONSTRUCTED: a
pair of options for each action; the form of the likelihood. Deviations: [EOS'] sees the region and is not seen by it;
there are no cross features, no times and no places, which rankers are not given when they serve; the words of clicked
items may be learnt beside the answers (`language_weight`), in place of pretraining by infilling; the likeness of user
and item, as a retriever sees it, may be added to the log-odds (`likeness`).
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.batch import SequenceBatch
from data_streams.jagged import Jagged
from models.answered_actions import AnswersConfig, answered_actions
from models.exposure_windows import ANSWERS, CANDIDATES, NUM_STATIC, VISIBLE, exposure_windows
from models.layers.linear import Linear
from models.recommender import LossSum, Ranker, StepContext
from models.remembered_states import RememberedStates
from models.tables import Ids, Rows, TableSpec
from models.text_encoder import Joint, States, TextEncoder, TextEncoderConfig, log_trained_share
from models.text_reading import SPOKEN, Reading
from models.texts import Texts

PLACED, ITEM = "placed", "item"
LIKENESS = 5.0
"""What the cosine is multiplied by at first."""


class M6RecRanking(Ranker):
    @dataclass(frozen=True, kw_only=True)
    class Config(AnswersConfig, TextEncoderConfig):
        window: Literal["request", "span"] = "request"
        """Whose exposures are candidates: those of one random request per user and step, with what was taken before it
        as history; or span, of all requests, each of which needs a copy of its history where that is read both ways."""
        scoring: Literal["classifier", "likelihood"] = "classifier"
        """Score by a classifier of the last state, or by the mean log-likelihood of the candidate's words."""
        likeness: bool = False
        """Add to the log-odds a learnt multiple of the cosine of the user's and the item's vectors, as the retriever
        makes them. Not in the paper: from a few thousand users, attention alone learns little of what users and
        candidates have in common. A likelihood stands alone, without it."""
        exits: tuple[int, ...] = ()
        """Layers after which a classifier of their own answers too (early exit); each more than model.separate-blocks.
        How sure an answer must be to be the last word is --evaluation.exit-confidence."""
        exit_weight: float = 0.0
        """How much of what exits learn the layers below learn too: with 0 the last layer answers as it would without
        exits, with 1 all answers count the same."""
        language_weight: float = 0.0
        """Weight of the loss of the words of clicked candidates beside that of the answers."""
        actions: tuple[str, ...] = ()
        """Answers it predicts, the first of which makes up the histories; left out, all of the data but exposures,
        click first."""

        event_columns = (*AnswersConfig.event_columns, "timestamp_s")

        @property
        def has_likeness(self) -> bool:
            """Whether the cosine is added; a likelihood stands alone."""
            return self.likeness and self.scoring == "classifier"

        @property
        def reads_words(self) -> bool:
            """Whether the words of candidates are predicted."""
            return self.scoring == "likelihood" or self.language_weight > 0

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.exit_weight <= 1:
                raise ConfigError(f"model.exit-weight must lie in 0..1, got {self.exit_weight}")
            if self.exit_weight and not self.exits:
                raise ConfigError(
                    f"model.exit-weight {self.exit_weight} is of --model.exits, and there are none; leave it out"
                )
            if self.exits and self.scoring != "classifier":
                raise ConfigError("model.exits are of --model.scoring classifier; leave either out")
            if self.reads_words and self.joint_tokens != "all":
                raise ConfigError(
                    "model.scoring likelihood and model.language-weight predict word after word, and need "
                    f"--model.joint-tokens all, got {self.joint_tokens}"
                )
            if self.scoring == "likelihood" and self.language_weight > 0:
                raise ConfigError(
                    "model.language-weight is for the words beside the answers, and model.scoring likelihood learns "
                    f"nothing but words; leave it out, got {self.language_weight:g}"
                )

        def build(self, **parts: Any) -> "M6RecRanking":
            return M6RecRanking(self, **parts)

    def __init__(
        self,
        config: Config,
        *,
        actions: tuple[str, ...],
        texts: Texts,
        exit_confidence: float = 1.0,
        **_: Any,
    ):
        """`actions` are the names of the codes in the data's column `action`. When serving, what is answered at an exit
        with probabilities of yes or no of at least `exit_confidence` goes no further.

        Raises: ConfigError where the data has no answers, the language model cannot predict words, or has no such
        layers.
        """
        super().__init__()
        self.config, self.texts, self.codes = config, texts, tuple(actions)
        self.actions = answered_actions(config.actions, self.codes, "m6-rec-ranking")
        self.num_options = 2 * len(self.actions) * (config.scoring == "classifier")
        self.encoder = TextEncoder(config, texts, num_options=self.num_options)
        if config.reads_words:
            self.encoder.require_tied("leave model.scoring likelihood and model.language-weight out")
        self.exit_confidence, self.stops = exit_confidence, self._checked_stops()
        # So a ranker can start from a retriever.
        own = ("classifier.", "likeness.", *["exits."] * bool(config.exits))
        self.added_parameters = (*self.encoder.added_parameters("encoder."), *own)
        if self.num_options and not config.has_frozen_base:
            self.classifier = Linear(self.encoder.width, len(self.actions))
        if config.has_likeness:
            self.likeness = _multiples(len(self.actions))
        self.exits = nn.ModuleList(
            ExitHead(
                self.encoder.width,
                len(self.actions),
                has_likeness=config.has_likeness,
                weight=config.exit_weight,
            )
            for _ in config.exits
        )
        log_trained_share(self, self.encoder)

    def _checked_stops(self) -> tuple[int, ...]:
        """The layers that answers are read behind, the last one of all among them."""
        encoder, exits = self.encoder, self.config.exits
        stops = (*exits, encoder.decoder.num_layers)
        if exits and (list(stops) != sorted({*stops}) or exits[0] <= encoder.num_separate):
            raise ConfigError(
                f"model.exits must rise, lie above model.separate-blocks ({encoder.num_separate}) and below the "
                f"{stops[-1]} layers of the language model, got {', '.join(map(str, exits))}"
            )
        return stops

    def tables(self) -> list[TableSpec]:
        return []

    def training_batch(self, batch: SequenceBatch, context: StepContext) -> SequenceBatch:
        """With the candidates of each user's window, and what is known to which."""
        is_request = self.config.window == "request"
        batch = exposure_windows(batch, context, codes=self.codes, actions=self.actions, drawn=is_request)
        return _first_request(batch) if is_request else batch

    def num_targets(self, batch: SequenceBatch) -> int:
        return batch.supervision[CANDIDATES].values.shape[0]

    def ids(self, batch: SequenceBatch, context: StepContext) -> Ids:
        parts = batch.supervision
        reading, found = self._read(batch, parts[VISIBLE], parts[CANDIDATES].values)
        if self.config.reads_words:
            clicked = parts[ANSWERS].values[:, 0][reading.slots]
            found[SPOKEN] = reading.words(self.texts.vocabulary_size, clicked)
        return found

    def candidate_ids(self, batch: SequenceBatch, candidates: Tensor) -> Ids:
        shown = (candidates >= 0).sum(1)
        lengths = batch.items.lengths.repeat_interleave(shown)
        # What words are predicted of must be read.
        memory = self.encoder.memory if self.config.scoring == "classifier" else None
        visible = Jagged.from_lengths(lengths, shown)
        reading, found = self._read(batch, visible, candidates[candidates >= 0], memory)
        found[PLACED] = torch.nonzero(candidates.flatten() >= 0)[:, 0]
        if self.config.scoring == "likelihood":
            found[SPOKEN] = reading.words(self.texts.vocabulary_size)
        return found

    def _read(
        self,
        batch: SequenceBatch,
        visible: Jagged,
        candidates: Tensor,
        memory: RememberedStates | None = None,
    ) -> tuple[Reading, dict[str, Tensor]]:
        """What is read, the same as ids, and which of the items read alone each candidate is."""
        reading = self.encoder.reader.scoring(
            batch, visible, candidates.numpy(), with_items=self.config.has_likeness, memory=memory
        )
        return reading, {**reading.as_ids(), ITEM: candidates.unique(return_inverse=True)[1]}

    def forward(self, rows: Rows, batch: SequenceBatch, context: StepContext) -> LossSum:
        reading = Reading.of(rows)
        answers = batch.supervision[ANSWERS].values.float()
        found, states = self._answers_of_all_stops(reading, rows[ITEM].ids)
        total, metrics = states.prompts.sum().float() * 0, {}
        if found:
            losses = [
                F.binary_cross_entropy_with_logits(logits, answers, reduction="none") for logits in found
            ]
            total = torch.stack([loss.sum() for loss in losses]).sum()
            metrics = dict(zip(self.actions, losses[-1].detach().sum(0), strict=True))
        if self.config.reads_words:
            weight = self.config.language_weight if self.config.scoring == "classifier" else 1.0
            words = -self.encoder.log_likelihoods(states, reading, rows[SPOKEN].ids).sum()
            total, metrics = total + weight * words, {**metrics, "words": words.detach()}
        return LossSum(sum=total, count=self.num_targets(batch), metrics=metrics)

    def _answers_of_all_stops(self, reading: Reading, item: Tensor) -> tuple[list[Tensor], States]:
        """Log-odds [P, A] behind each exit and the last layer, none for likelihoods; and what the last layer says."""
        hidden, plan, found = self.encoder.joint_input(reading), Joint.build(reading), []
        for number, (first, stop) in enumerate(self._ranges()):
            hidden = self.encoder.join(hidden, plan, first, stop)
            states = self.encoder.states(hidden, reading)
            if self.config.scoring == "classifier":
                found.append(self.classify(states, item, number))
        return found, states

    def _ranges(self) -> list[tuple[int, int]]:
        """The joint layers, cut at the exits."""
        return list(pairwise((self.encoder.num_separate, *self.stops)))

    def logits(self, rows: Rows, batch: SequenceBatch, candidates: Tensor) -> Tensor:
        reading = Reading.of(rows)
        if self.config.scoring == "classifier":
            found, _ = self.answers_as_sure(reading, rows[ITEM].ids)
        else:
            # Where nothing is written, as likely as any word; 0 would be more than any text gets.
            likelihoods = self.encoder.log_likelihoods(
                self.encoder(reading),
                reading,
                rows[SPOKEN].ids,
                wordless=-math.log(self.texts.vocabulary_size),
            )
            found = likelihoods[:, None].expand(-1, len(self.actions))
        scores = found.new_zeros(candidates.numel(), len(self.actions))
        return scores.index_copy(0, rows[PLACED].ids, found).unflatten(0, candidates.shape)

    def answers_as_sure(self, reading: Reading, item: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of each prompt, where it has first been sure enough of all its answers, and behind which layer.

        Shapes: item [P] -> [P, A] fp32, [P] int64.
        """
        hidden, plan = self.encoder.joint_input(reading), Joint.build(reading)
        open_ = torch.arange(len(item), device=item.device)
        answers = hidden.new_zeros(len(item), len(self.actions), dtype=torch.float32)
        layers = torch.zeros_like(item)
        for number, (first, stop) in enumerate(self._ranges()):
            hidden = self.encoder.join(hidden, plan, first, stop)
            if stop < self.stops[-1] and self.exit_confidence == 1:
                continue
            logits = self.classify(self.encoder.states(hidden, reading), item[open_], number)
            answers, layers[open_] = answers.index_copy(0, open_, logits), stop
            if stop == self.stops[-1]:
                break
            unsure = logits.abs().min(dim=1).values.sigmoid() < self.exit_confidence
            reading, tokens = reading.narrowed(unsure)
            hidden, plan, open_ = hidden.index_select(0, tokens), Joint.build(reading), open_[unsure]
        return answers, layers

    def classify(self, states: States, item: Tensor, number: int = -1) -> Tensor:
        """Log-odds of each action for each prompt, behind an exit or by default the last layer.

        Shapes: item [P], which of those alone it is -> [P, A] fp32.
        """
        if 0 <= number < len(self.exits):
            return self.exits[number](states, item)
        if self.config.has_frozen_base:
            no, yes = self.encoder.options(self.num_options).unflatten(0, (-1, 2)).unbind(1)
            found = F.linear(states.prompts.float(), (yes - no).float())
        else:
            found = self.classifier(states.prompts).float()
        if not self.config.has_likeness:
            return found
        return found + self.likeness(_cosine(states, item)).float()


class ExitHead(nn.Module):
    """The answers behind an exit; a share `weight` of their gradient goes on into the states.

    Source of a share of 0: DeeBERT (Xin et al., 2020), which trains its exits behind a finished model.
    """

    def __init__(self, width: int, num_actions: int, *, has_likeness: bool, weight: float):
        super().__init__()
        self.weight = weight
        self.classifier = Linear(width, num_actions)
        self.likeness = _multiples(num_actions) if has_likeness else None

    def forward(self, states: States, item: Tensor) -> Tensor:
        """Log-odds of each action for each prompt. Shapes: item [P] -> [P, A] fp32."""
        found = self.classifier(self._taught(states.prompts)).float()
        if self.likeness is None:
            return found
        return found + self.likeness(self._taught(_cosine(states, item))).float()

    def _taught(self, values: Tensor) -> Tensor:
        """The same values, which get a share of the gradient alone."""
        return values.detach() if self.weight == 0 else values.detach().lerp(values, self.weight)


def _multiples(num_actions: int) -> Linear:
    """Of the cosine of user and item, one for each action."""
    multiples = Linear(1, num_actions, bias=False)
    nn.init.constant_(multiples.weight, LIKENESS)
    return multiples


def _cosine(states: States, item: Tensor) -> Tensor:
    """Of each prompt's user and its item. Shapes: item [P] -> [P, 1] fp32."""
    items = states.alone.index_select(0, item).float()
    return F.cosine_similarity(states.begins.float(), items, dim=-1)[:, None]


def _first_request(batch: SequenceBatch) -> SequenceBatch:
    """Of drawn windows, the candidates that know no more than was known when they begin, and that alone as history."""
    parts, items = batch.supervision, batch.items
    candidates, visible, answers = (parts[name] for name in (CANDIDATES, VISIBLE, ANSWERS))
    begins, user = parts[NUM_STATIC].values, candidates.row_index()
    kept = visible.values == begins[user]
    lengths = torch.bincount(user[kept], minlength=batch.num_users)
    return replace(
        batch,
        items=Jagged.from_lengths(items.values[items.places() < begins[items.row_index()]], begins),
        supervision={
            name: Jagged.from_lengths(rows.values[kept], lengths)
            for name, rows in ((CANDIDATES, candidates), (VISIBLE, visible), (ANSWERS, answers))
        },
    )
