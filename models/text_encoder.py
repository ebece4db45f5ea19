"""The language model of M6-Rec over what was laid out for it: lower layers segment by segment, upper layers jointly.

The lower layers see every segment alone, with places that begin at 0, so a segment's states do not depend on where it
stands: an item is computed once however many users have it. The upper layers see regions and the prompts behind them,
with places that go on through both.

Source: M6-Rec (Alibaba, 2022), arXiv 2205.08084. MEMORY: places are restarted in segments; the form of the adapters.
RECONSTRUCTED: the upper layers count places anew, by rotary positions; the options are the soft prompts' own vectors,
and not what the layers make of them; the marks between texts are learnt in every mode of tuning.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import ConfigError
from data_streams.jagged import Jagged
from models.kernels.length_buckets import BucketLayout, bucket_layout
from models.kernels.masked_attention import masked_attention, prefix_masks
from models.kernels.region_attention import RegionLayout, region_attention
from models.layers.adapter import add_adapter, freeze
from models.layers.attention_plan import Plan
from models.layers.text_decoder import TextDecoder
from models.layers.vocabulary import with_others
from models.pretrained_decoder import PretrainedDecoder
from models.remembered_states import RememberedStates
from models.text_reader import NUM_MARKS, TextReader
from models.text_reading import Reading
from models.texts import TextConfig, Texts

WORDS_AT_A_TIME = 2048
"""Words that are predicted together: each takes a number for every word there is."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Options of every model that reads users and items as text."""

    text: TextConfig = field(default_factory=TextConfig)
    pretrained: str = ""
    """Folder of a Hugging Face decoder with its tokenizer (config.json, *.safetensors, tokenizer.json) to start from,
    whose own sizes then hold, without dropout; left out, from scratch with those below. Needs the folder in every
    use."""
    width: int = 64
    """Size of the residual stream."""
    num_blocks: int = 4
    """Layers in all (L)."""
    distinct_blocks: int | None = None
    """Blocks with weights of their own, which neighbouring layers share (M6-Edge); left out, each layer has its own."""
    num_heads: int = 4
    """Attention heads per layer."""
    feedforward_width: int = 128
    """Hidden size of the feed-forward part."""
    dropout: float = 0.1
    """Dropout on what layers add."""
    init_scale: float = 0.1
    """Standard deviation of the initial vectors of tokens."""
    separate_blocks: int = 2
    """Lower layers that see each segment alone (L'); 0 reads everything jointly."""
    joint_tokens: Literal["all", "last"] = "all"
    """What of behaviours and candidates the upper layers see: all tokens, as in the paper, or the last one of each,
    which is far cheaper."""
    region: Literal["bidirectional", "behaviours"] = "bidirectional"
    """How the history is read: both ways, as in the paper, in a copy for each prompt that knows other events; or so
    that behaviours see no later one, and all prompts of a user share one copy."""
    tuning: Literal["full", "option", "option-adapter"] = "full"
    """What is trained: all weights; soft prompts with a frozen language model; or adapters in its feed-forward parts
    too. The last two need a model that has learnt: pretrained, or the run of --init-from."""
    num_soft_prompts: int = 16
    """Soft prompts (K) of the tuning modes that have them."""
    adapter_width: int = 16
    """Hidden size of the adapters."""

    needs_texts = True
    """Whether `build` is to be given the texts of users, and of items where it reads them."""
    reads_item_texts = True

    @property
    def has_frozen_base(self) -> bool:
        return self.tuning != "full"

    def __post_init__(self) -> None:
        sizes = ("width", "num_blocks", "num_heads", "feedforward_width", "num_soft_prompts", "adapter_width")
        wrong = [name for name in sizes if getattr(self, name) < 1]
        if wrong:
            given = ", ".join(f"model.{name.replace('_', '-')} {getattr(self, name)}" for name in wrong)
            raise ConfigError(f"sizes of a text model must be at least 1, got {given}")
        if self.distinct_blocks is not None and not 1 <= self.distinct_blocks <= self.num_blocks:
            raise ConfigError(
                f"model.distinct-blocks must be 1 to model.num-blocks ({self.num_blocks}), got {self.distinct_blocks}"
            )
        if self.distinct_blocks is not None and self.pretrained:
            raise ConfigError(
                "model.distinct-blocks is of a model from scratch; leave it or --model.pretrained out"
            )
        if self.joint_tokens == "last" and not self.separate_blocks:
            raise ConfigError(
                "model.joint-tokens last needs lower layers that read each text, and model.separate-blocks is 0; raise "
                "it, or take --model.joint-tokens all"
            )


@dataclass(frozen=True, kw_only=True)
class States:
    """What the last layer says. Shapes: n segments alone, P prompts in the order of their slots, of G tokens."""

    alone: Tensor
    """[n, D], the last token of each segment alone: an item's vector."""
    prompts: Tensor
    """[P, D], the last token of each prompt."""
    begins: Tensor
    """[P, D], the first token of each prompt, [EOS'], which sees the region alone."""
    tokens: Tensor
    """[G, D], all tokens of the prompts, in the order of the reading."""


class TextEncoder(nn.Module):
    def __init__(self, config: TextEncoderConfig, texts: Texts, *, num_options: int = 0):
        """`num_options` of the soft prompts, the last ones, stand for answers.

        Raises: ConfigError where sizes do not fit each other or the language model.
        """
        super().__init__()
        self.config, self.remembered = config, RememberedStates()
        self.decoder = _build_decoder(config, texts)
        self.width = self.decoder.width
        self.num_separate = self._checked_separate()
        self.marks = nn.Embedding(NUM_MARKS, self.width)
        self.decoder.initialise_like_vocabulary(self.marks)
        num_soft_prompts = 0
        if config.has_frozen_base:
            num_soft_prompts = config.num_soft_prompts
            if num_soft_prompts < max(num_options, 1):
                raise ConfigError(
                    f"model.num-soft-prompts must be at least {max(num_options, 1)} with model.tuning {config.tuning}, "
                    f"two for each action that is predicted, got {num_soft_prompts}"
                )
            self._tune(num_soft_prompts)
        self.reader = TextReader(
            texts=texts,
            num_soft_prompts=num_soft_prompts,
            is_bidirectional=config.region == "bidirectional",
            only_last=config.joint_tokens == "last",
        )

    def _checked_separate(self) -> int:
        chosen, there = self.config.separate_blocks, self.decoder.num_layers
        if not 0 <= chosen <= there:
            raise ConfigError(
                f"model.separate-blocks must be 0 to {there}, the layers of the language model, got {chosen}"
            )
        return chosen

    def _tune(self, num_soft_prompts: int) -> None:
        freeze(self.decoder)
        self.soft_prompts = nn.Embedding(num_soft_prompts, self.width)
        self.decoder.initialise_like_vocabulary(self.soft_prompts)
        if self.config.tuning == "option-adapter":
            for layer in self.decoder.feedforwards():
                add_adapter(layer, self.width, self.config.adapter_width)

    def added_parameters(self, prefix: str) -> tuple[str, ...]:
        """Names of what tuning has added to the language model, behind a prefix."""
        names = (name for name, _ in self.named_parameters())
        return tuple(prefix + name for name in names if ".adapter." in name or "soft_prompts" in name)

    def forward(self, reading: Reading) -> States:
        hidden = self.joint_input(reading)
        hidden = self.join(hidden, Joint.build(reading), self.num_separate, self.decoder.num_layers)
        return self.states(hidden, reading)

    def joint_input(self, reading: Reading) -> Tensor:
        """What the joint layers begin with. Shapes: [A + H + G, D].

        Raises: RuntimeError where readings with remembered states come in another order than they were laid out in.
        """
        hidden, source = self.separate(reading), reading.joint_source()
        if not len(reading.remembered_from):
            return hidden.index_select(0, source)
        # Waits for the device; in serving alone.
        self.remembered.fill(hidden.index_select(0, reading.new), int(reading.remembered_from))
        number = source - len(hidden)
        read = hidden.index_select(0, source.clamp(max=len(hidden) - 1))
        return torch.where(number[:, None] < 0, read, self.remembered.states[number.clamp(min=0)])

    @property
    def memory(self) -> RememberedStates | None:
        """What is remembered from one reading to the next; nothing while weights are learnt."""
        return None if self.training else self.remembered

    def train(self, mode: bool = True) -> "TextEncoder":
        """Forgets what other weights have said."""
        self.remembered.forget()
        return super().train(mode)

    def separate(self, reading: Reading) -> Tensor:
        """The states of all segments below the joint layers. Shapes: [N, D]."""
        plan = Separate.build(reading.segments, reading.segment_limits)
        hidden = self.embed(reading.segments.values)
        return self.decoder.run_layers(hidden, reading.segments.places(), plan, 0, self.num_separate)

    def join(self, hidden: Tensor, plan: "Joint", first: int, stop: int) -> Tensor:
        """Joint layers first..stop (exclusive) over regions and prompts. Shapes: [A + H + G, D] -> the same."""
        return self.decoder.run_layers(hidden, plan.places, plan, first, stop)

    def states(self, hidden: Tensor, reading: Reading) -> States:
        """What a layer says, as if it were the last one. Shapes: hidden [A + H + G, D]."""
        hidden, alone, regions, prompts = (
            self.decoder.finish(hidden),
            reading.alone,
            reading.regions,
            reading.prompts,
        )
        of_prompts = hidden[len(alone.values) + len(regions.values) :]
        first, last = (
            of_prompts.index_select(0, at) for at in (prompts.offsets[:-1], prompts.offsets[1:] - 1)
        )
        return States(
            alone=hidden.index_select(0, alone.offsets[1:] - 1),
            prompts=torch.zeros_like(last).index_copy(0, reading.slots, last),
            begins=torch.zeros_like(first).index_copy(0, reading.slots, first),
            tokens=of_prompts,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Words, marks and soft prompts. Shapes: [N] -> [N, D]."""
        size = self.reader.texts.vocabulary_size
        vectors = self.decoder.vocabulary(tokens.clamp(max=size - 1))
        vectors = with_others(vectors, tokens - size, self.marks, NUM_MARKS)
        if not self.config.has_frozen_base:
            return vectors
        prompts = self.soft_prompts
        return with_others(vectors, tokens - size - NUM_MARKS, prompts, prompts.num_embeddings)

    def log_likelihoods(
        self, states: States, reading: Reading, places: Tensor, *, wordless: float = 0.0
    ) -> Tensor:
        """The mean over the words of each prompt that are followed at `places`; `wordless` for a prompt without.

        Shapes: places [M] among the tokens of the prompts -> [P] fp32, in the order of the slots.
        """
        tokens = reading.segments.values[reading.prompts.values]
        owner = reading.slots[reading.prompts.row_index()[places]]
        found = []
        for part in places.split(WORDS_AT_A_TIME):
            scores = self.decoder.vocabulary(states.tokens.index_select(0, part), predict=True)
            found.append(-F.cross_entropy(scores, tokens[part + 1], reduction="none"))
        sums, counts = (states.tokens.new_zeros(len(reading.slots), dtype=torch.float32) for _ in range(2))
        sums = sums.index_add(0, owner, torch.cat(found))
        counts = counts.index_add(0, owner, torch.ones_like(owner).float())
        return torch.where(counts > 0, sums / counts.clamp(min=1), wordless)

    def require_tied(self, otherwise: str) -> None:
        """Raises: ConfigError where the language model cannot predict words; `otherwise` is what else can be done."""
        if not self.decoder.is_tied:
            raise ConfigError(
                f"words are predicted by the vectors they are read by, and {self.config.pretrained} has others for "
                f"that, or scales the scores; {otherwise}, or take a model with tied vectors"
            )

    def options(self, number: int) -> Tensor:
        """The last soft prompts, which stand for answers. Shapes: [number, D]."""
        count = self.soft_prompts.num_embeddings
        device = self.soft_prompts.weight.device
        return self.soft_prompts(torch.arange(count - number, count, device=device))


@dataclass(frozen=True, kw_only=True)
class Separate(Plan):
    """Segments that each see themselves alone."""

    layout: BucketLayout
    masks: Sequence[Tensor]

    @staticmethod
    def build(segments: Jagged, limits: Tensor) -> "Separate":
        """`limits` says how many tokens of its segment each sees. Shapes: N tokens, limits [N]."""
        layout = bucket_layout(segments)
        return Separate(layout=layout, masks=tuple(prefix_masks(limits, layout)))

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return masked_attention(queries, keys, values, self.masks, self.layout)


@dataclass(frozen=True, kw_only=True)
class Joint(Plan):
    """Segments alone, and behind them regions and the prompts of these."""

    num_alone: int
    """Tokens of the segments alone."""
    alone: Separate
    layout: RegionLayout
    places: Tensor
    """[A + H + G] int64, through each region and on in the prompts behind it."""

    @staticmethod
    def build(reading: Reading) -> "Joint":
        """Made once for all layers."""
        alone, regions, prompts, visible = reading.alone, reading.regions, reading.prompts, reading.visible
        behind = visible.values[prompts.row_index()] + prompts.places()
        return Joint(
            num_alone=len(alone.values),
            alone=Separate.build(alone, alone.lengths[alone.row_index()]),
            layout=RegionLayout.build(regions, reading.region_limits, prompts, visible),
            places=torch.cat((alone.places(), regions.places(), behind)),
        )

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        alone, others = zip(
            *(part.tensor_split((self.num_alone,)) for part in (queries, keys, values)), strict=True
        )
        joint = region_attention(*others, self.layout)
        return torch.cat((self.alone.attend(layer, *alone), joint)) if self.num_alone else joint


def log_trained_share(model: nn.Module, encoder: TextEncoder) -> None:
    """Say how much of a model is trained."""
    trained = sum(weights.numel() for weights in model.parameters())
    frozen = (
        sum(weights.numel() for weights in encoder.decoder.buffers()) if encoder.config.has_frozen_base else 0
    )
    logger.info(
        "Tuning %s trains %d of %d weights (%.2f %%).",
        *(encoder.config.tuning, trained, trained + frozen, 100 * trained / (trained + frozen)),
    )


def _build_decoder(config: TextEncoderConfig, texts: Texts) -> TextDecoder | PretrainedDecoder:
    if not config.pretrained:
        return TextDecoder(
            vocabulary_size=texts.vocabulary_size,
            width=config.width,
            num_blocks=config.num_blocks,
            distinct_blocks=config.distinct_blocks,
            num_heads=config.num_heads,
            feedforward_width=config.feedforward_width,
            dropout=config.dropout,
            init_scale=config.init_scale,
        )
    return PretrainedDecoder(config.pretrained, num_words=texts.vocabulary_size)
