"""Text in, speech tokens out: one stack of blocks used twice, and the prefix written from LLM hidden states.

Paper: "Speech Decoder". The shared stack first reads the whole text at once (nar: every text position sees
every other), which fills its kv_cache, then speaks one token after the other on that cache (ar). A small
pre-network reads the text before. In decoder stage 3 a prefix decoder turns LLM hidden states into the very
first entries of that cache; nothing else trains. Used by notebooks 06 and 07 and by dialogue.py. The mask is
drawn in notebook 06.

Beside the paper's way to read a text, a few vectors for each LLM token, there is another: one for each of its
characters (`spelled`), and positions at which text and speech run side by side (`stretch`). DIFFERENCES 34 and 35.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KVCache, Rotation, TransformerBlock, lengths_mask, rotary, rotation
from .errors import StageMismatch
from .scales import Preset
from .text import SPELLING_IDS

EXTRA_TOKENS = 40  # a second that any text may take beyond `longest`: pauses, a single slow word
TURNS = 64  # speech positions whose rotary angles are computed at once: far cheaper than one by one


class LayerPrefix(NamedTuple):
    """Keys and values (batch, heads, positions, head_width) that stand before everything else in one layer.

    In training it takes the place of a KVCache: it joins instead of writing in place, so gradients reach it.
    """

    keys: Tensor
    values: Tensor

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


class Prefix(NamedTuple):
    """What the prefix decoder writes: one LayerPrefix for each shared block, and (batch,) valid positions."""

    layers: list[LayerPrefix]
    lengths: Tensor

    def visible(self) -> Tensor:
        """Bool (batch, positions): which positions are not padding."""
        return lengths_mask(self.lengths, self.layers[0].keys.shape[2])


@dataclass
class DecoderState:
    """Everything that one spoken segment (or a batch of them) remembers between AR steps."""

    caches: list[KVCache]
    start: Tensor  # (batch,) position of START_OF_SPEECH; a prefix does not count
    read: Tensor  # (batch,) text vectors that were read
    visible: Tensor | None  # bool (batch, prefix + text positions); None: nothing is padded
    ended: Tensor  # bool (batch,): the decoder said END_OF_SPEECH by itself
    spoken: int = 0  # steps so far
    turns: Rotation | None = None  # of the TURNS positions around the next one


class Utterance(Iterator[int]):
    """The codes of one segment, each computed when it is asked for; `ended` tells who stopped it."""

    def __init__(self, state: DecoderState, draws: Iterator[Tensor]) -> None:
        self.state, self.draws = state, draws

    def __next__(self) -> int:
        return int(next(self.draws))

    @property
    def ended(self) -> bool:
        """True once END_OF_SPEECH was drawn, False before and after running into max_speech_tokens."""
        return bool(self.state.ended.all())


def decoder_mask(prefix: int, text: int, speech: int) -> Tensor:
    """Who sees whom, padding aside: text sees the prefix and all text; speech also sees speech up to itself.

    Returns bool (text + speech, prefix + text + speech), True where attention is allowed.

    >>> decoder_mask(1, 2, 2).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    """
    spoken = torch.arange(1, speech + 1)  # the prefix and the text are there from the start: time 0
    query_time = torch.cat([spoken.new_zeros(text), spoken])
    key_time = torch.cat([spoken.new_zeros(prefix + text), spoken])
    return key_time[None] <= query_time[:, None]


class TextProjection(nn.Sequential):
    """LLM vectors (batch, tokens, llm_width) -> decoder vectors (batch, tokens * vectors, width).

    A learned projection instead of the released reshape by a constant: any LLM width works. The norm in front
    makes it blind to the scale of the vectors, which differs widely between LLMs, and between embeddings and
    hidden states of one LLM.
    """

    def __init__(self, llm_width: int, width: int, vectors: int) -> None:
        super().__init__(nn.RMSNorm(llm_width, eps=1e-6), nn.Linear(llm_width, vectors * width))
        self.vectors = vectors

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        inside = lengths_mask(lengths, x.shape[1])[..., None]
        dtype = self[1].weight.dtype
        x = torch.where(inside, x, 0).to(dtype)  # whatever stands in the padding has no effect
        x = (
            super().forward(x).to(dtype)
        )  # under autocast too, what the blocks add up keeps the weights' precision
        return x.unflatten(-1, (self.vectors, -1)).flatten(1, 2)

    def counts(self, characters: Tensor | None, lengths: Tensor) -> Tensor:
        """(batch,) vectors of each row."""
        return lengths * self.vectors


class SpelledProjection(nn.Module):
    """One vector for each character: what the character is, plus what its token means.

    LLM vectors (batch, tokens, llm_width), characters (batch, tokens, longest; 0: none) -> (batch, characters, width).
    """

    def __init__(self, llm_width: int, width: int) -> None:
        super().__init__()
        self.token = TextProjection(llm_width, width, vectors=1)
        self.character = nn.Embedding(SPELLING_IDS, width)

    def forward(self, x: Tensor, lengths: Tensor, characters: Tensor) -> Tensor:
        inside = self.inside(characters, lengths).flatten(1)
        count = int(inside.sum(dim=1).max()) if inside.numel() else 0
        order = inside.int().argsort(dim=1, descending=True, stable=True)[
            :, :count
        ]  # all that are there come first
        letters = characters.flatten(1).gather(1, order)
        owners = order // max(1, characters.shape[2])  # each character's token
        tokens = self.token(x, lengths)
        spelled = tokens.gather(1, owners[..., None].expand(-1, -1, tokens.shape[2]))
        return spelled + self.character(letters).to(spelled.dtype)

    def inside(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """Bool (batch, tokens, longest): where a character stands."""
        return (characters > 0) & lengths_mask(lengths, characters.shape[1])[..., None]

    def counts(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """(batch,) characters of each row."""
        return self.inside(characters, lengths).flatten(1).sum(dim=1)


class SpeechDecoder(nn.Module):
    """Text vectors (batch, text_tokens, llm_width) -> speech tokens. Ids: the codes, then four specials.

    characters   of every text token, (batch, text_tokens, longest) ids of text.Speller, 0 where there is none; only a
                 decoder of a `spelled` preset needs them, any other ignores them
    """

    def __init__(self, preset: Preset, codebook_size: int, llm_width: int) -> None:
        super().__init__()
        self.preset, self.codebook_size = preset, codebook_size
        self.vectors = preset.vectors_per_text_token
        self.text_projection = (
            SpelledProjection(llm_width, preset.width)
            if preset.spelled
            else TextProjection(llm_width, preset.width, self.vectors)
        )
        self.pre_network = blocks(preset, preset.pre_network_layers)
        self.embedding = nn.Embedding(codebook_size + 4, preset.width)
        self.blocks = blocks(preset, preset.layers)
        self.norm = nn.RMSNorm(preset.width, eps=1e-6)
        self.output = nn.Linear(preset.width, codebook_size + 4)

    @classmethod
    def from_preset(cls, preset: Preset, codebook_size: int, llm_width: int) -> "SpeechDecoder":
        """A fresh decoder of a `decoder_nar_ar` preset, for a codec's codebook_size and an LLM's width."""
        return cls(preset, codebook_size, llm_width)

    @property
    def BEGIN_OF_TEXT(self) -> int:
        return self.codebook_size

    @property
    def START_OF_SPEECH(self) -> int:
        return self.codebook_size + 1

    @property
    def END_OF_SPEECH(self) -> int:
        return self.codebook_size + 2

    @property
    def PAD(self) -> int:
        return self.codebook_size + 3

    # Training: the whole of prefix, text and speech in one masked pass.

    def forward(
        self,
        text_vectors: Tensor,
        text_lengths: Tensor,
        codes: Tensor,
        code_lengths: Tensor,
        prefix: Prefix | None = None,
        characters: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Teacher forcing on codes (batch, speech_tokens): mean cross-entropy over codes and END_OF_SPEECH.

        Returns loss and token_accuracy (how often the likeliest token was the right one, 0 to 1).
        """
        logits = self.logits(text_vectors, text_lengths, codes, code_lengths, prefix, characters)
        targets = self.targets(codes, code_lengths)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=self.PAD)
        right = (logits.argmax(dim=-1) == targets)[targets != self.PAD]
        return {"loss": loss, "token_accuracy": right.float().mean()}

    def logits(
        self,
        text_vectors: Tensor,
        text_lengths: Tensor,
        codes: Tensor,
        code_lengths: Tensor,
        prefix: Prefix | None = None,
        characters: Tensor | None = None,
    ) -> Tensor:
        """(batch, 1 + speech_tokens, codes + 4): place j tells what follows the first j codes."""
        text, lengths = self.read_text(text_vectors, text_lengths, characters)
        codes = codes.masked_fill(~lengths_mask(code_lengths, codes.shape[1]), self.PAD)
        speech = self.embedding(F.pad(codes, (1, 0), value=self.START_OF_SPEECH))
        count = text.shape[1]
        turn = rotation(self.positions(lengths, count, speech.shape[1]), self.blocks[0].head_width)
        mask = self.training_mask(lengths, count, speech.shape[1], prefix)
        x = torch.cat([text, speech], dim=1)
        *earlier, last = self.blocks
        for index, block in enumerate(earlier):
            x = block(x, turn, mask, prefix.layers[index] if prefix else None)
        text_turn = tuple(angles[:, :, :count] for angles in turn)
        speech_turn = tuple(angles[:, :, count:] for angles in turn)
        read = read_only(last, x[:, :count], text_turn, prefix.layers[-1] if prefix else None)
        return self.output(self.norm(last(x[:, count:], speech_turn, mask[:, :, count:], read)))

    def targets(self, codes: Tensor, code_lengths: Tensor) -> Tensor:
        """(batch, 1 + speech_tokens): the codes, END_OF_SPEECH right after each sample's last, then PAD."""
        places = torch.arange(codes.shape[1] + 1, device=codes.device)[None]
        ends = code_lengths[:, None]
        padded = F.pad(codes, (0, 1))
        return torch.where(places < ends, padded, torch.where(places == ends, self.END_OF_SPEECH, self.PAD))

    def read_text(
        self, text_vectors: Tensor, text_lengths: Tensor, characters: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[BEGIN_OF_TEXT, pre-network(projected text)]: (batch, 1 + text vectors, width), and how many are no padding.

        Raises ValueError if a decoder that spells gets no characters.
        """
        if self.preset.spelled and characters is None:
            raise ValueError("this speech decoder spells: give the characters of the text (text.Speller)")
        spelling = (characters,) if self.preset.spelled else ()
        text = self.text_projection(text_vectors, text_lengths, *spelling)
        counts = self.text_projection.counts(characters, text_lengths)
        if text.shape[1] and len(self.pre_network):
            mask = padding_mask(counts, text.shape[1])
            turn = rotation(torch.arange(text.shape[1], device=text.device), self.pre_network[0].head_width)
            for block in self.pre_network:
                text = block(text, turn, mask)
        begin = torch.full((len(text), 1), self.BEGIN_OF_TEXT, device=text.device)
        return torch.cat([self.embedding(begin), text], dim=1), 1 + counts

    def start_of_speech(self, lengths: Tensor) -> Tensor:
        """(batch,) the position of START_OF_SPEECH behind `lengths` text vectors; 0 if text and speech run together."""
        return torch.zeros_like(lengths) if self.preset.stretch else lengths

    def text_positions(self, text: int, device: torch.device | None = None) -> Tensor:
        """(text,) positions of BEGIN_OF_TEXT and what follows, `stretch` apart if text and speech run together."""
        return torch.arange(text, device=device) * (self.preset.stretch or 1)

    def positions(self, lengths: Tensor, text: int, speech: int) -> Tensor:
        """(batch, text + speech): speech goes on after each sample's own text, so padding moves nothing."""
        spoken = self.start_of_speech(lengths)[:, None] + torch.arange(speech, device=lengths.device)
        read = self.text_positions(text, lengths.device).expand(len(spoken), -1)
        return torch.cat([read, spoken.to(read.dtype)], dim=1)

    def training_mask(self, lengths: Tensor, text: int, speech: int, prefix: Prefix | None) -> Tensor:
        """decoder_mask without what is padded in prefix and text: bool (batch, 1, queries, keys).

        BEGIN_OF_TEXT is always seen, so no row is empty and padding stays finite. Padded speech needs no mask
        of its own: it stands after all that is valid.
        """
        visible = self.context_visible(lengths, text, prefix)
        allowed = decoder_mask(visible.shape[1] - text, text, speech).to(visible.device)
        return allowed & F.pad(visible, (0, speech), value=True)[:, None, None]

    def context_visible(self, lengths: Tensor, text: int, prefix: Prefix | None) -> Tensor:
        """Bool (batch, prefix + text positions): what is there to be seen before the first speech token."""
        visible = lengths_mask(lengths, text)
        return torch.cat([prefix.visible(), visible], dim=1) if prefix else visible

    # Speaking: nar prefill of the text, then ar steps on its cache.

    @torch.inference_mode()
    def prefill(
        self,
        text_vectors: Tensor,
        prefix: Prefix | None = None,
        text_lengths: Tensor | None = None,
        characters: Tensor | None = None,
    ) -> DecoderState:
        """Read a text (1, text_tokens, llm_width), or a padded batch with its lengths.

        Raises RuntimeError in train mode.
        """
        if self.training:
            raise RuntimeError(
                "the speech decoder is in train mode, so dropout would spoil speech: call .eval()"
            )
        if text_lengths is None:
            text_lengths = torch.full((len(text_vectors),), text_vectors.shape[1], device=text_vectors.device)
        text, lengths = self.read_text(text_vectors, text_lengths, characters)
        visible = self.context_visible(lengths, text.shape[1], prefix)
        visible = None if visible.all() else visible
        mask = None if visible is None else visible[:, None, None]
        caches = prefix_caches(prefix, len(self.blocks))
        turn = rotation(self.text_positions(text.shape[1], text.device), self.blocks[0].head_width)
        *earlier, last = zip(self.blocks, caches, strict=True)
        for block, cache in earlier:
            text = block(text, turn, mask, cache)
        read_only(last[0], text, turn, last[1])
        nobody = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        return DecoderState(caches, self.start_of_speech(lengths), lengths - 1, visible, nobody)

    @torch.inference_mode()
    def step(self, token: Tensor | int, state: DecoderState) -> Tensor:
        """Say `token` (an id, or (batch,) ids; START_OF_SPEECH first). Returns logits (batch, codes + 4)."""
        token = torch.as_tensor(token, device=state.start.device).expand(len(state.start))
        x = self.embedding(token[:, None])
        turn, mask = self.speech_turn(state), None
        state.spoken += 1
        if state.visible is not None:
            mask = F.pad(state.visible, (0, state.spoken), value=True)[:, None, None]
        for block, cache in zip(self.blocks, state.caches, strict=True):
            x = block(x, turn, mask, cache)
        return self.output(self.norm(x[:, 0]))

    def speech_turn(self, state: DecoderState) -> Rotation:
        """Rotary angles of the next speech token."""
        place = state.spoken % TURNS
        if place == 0:
            ahead = state.spoken + torch.arange(TURNS, device=state.start.device)
            state.turns = rotation(state.start[:, None] + ahead, self.blocks[0].head_width)
        return tuple(angles[:, :, place : place + 1] for angles in state.turns)

    def generate(
        self,
        text_vectors: Tensor,
        prefix: Prefix | None = None,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        max_speech_tokens: int | None = None,
        repetition_window: int | None = None,
        repetition_penalty: float | None = None,
        characters: Tensor | None = None,
    ) -> Utterance:
        """Speak a text (1, text_tokens, llm_width): an iterator of codes that the codec takes as they are.

        Settings left out are the preset's. The generator lives on the CPU: tokens are drawn there on any
        device. The text is read by this call, before the first code is asked for; each code costs one step.
        """
        state = self.prefill(text_vectors, prefix, characters=characters)
        settings = (top_k, generator, max_speech_tokens, repetition_window, repetition_penalty)
        return Utterance(state, self.draw(state, *settings))

    def generate_batch(
        self,
        text_vectors: Tensor,
        text_lengths: Tensor,
        prefix: Prefix | None = None,
        characters: Tensor | None = None,
        **settings,
    ) -> tuple[list[list[int]], list[bool]]:
        """Speak a padded batch at once, settings as in generate.

        Returns each row's codes, and whether it ended by itself.
        """
        state = self.prefill(text_vectors, prefix, text_lengths, characters)
        drawn = list(self.draw(state, **settings))
        rows = torch.stack(drawn, dim=1).tolist() if drawn else [[] for _ in text_lengths]
        return [[code for code in row if code < self.codebook_size] for row in rows], state.ended.tolist()

    def draw(
        self,
        state: DecoderState,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        max_speech_tokens: int | None = None,
        repetition_window: int | None = None,
        repetition_penalty: float | None = None,
    ) -> Iterator[Tensor]:
        """(batch,) tokens, step by step, until every row has ended or ran into its limit; it then repeats
        END_OF_SPEECH. Each row has limits of its own (`bounds`), so what stands beside it in a batch changes nothing.
        """
        top_k = self.preset.top_k if top_k is None else top_k
        window = self.preset.repetition_window if repetition_window is None else repetition_window
        penalty = self.preset.repetition_penalty if repetition_penalty is None else repetition_penalty
        limit = self.preset.max_speech_tokens if max_speech_tokens is None else max_speech_tokens
        least, most = (bound.cpu() for bound in self.bounds(state, limit))
        history: list[Tensor] = []
        ended = done = state.ended.cpu()
        token = torch.full_like(state.start, self.START_OF_SPEECH)
        for said in range(limit):
            logits = self.only_speakable(self.step(token, state).float().cpu())
            logits[said < least, self.END_OF_SPEECH] = -torch.inf
            if window and history:
                logits = discourage(logits, torch.stack(history[-window:], dim=1), penalty)
            drawn = sample(logits, top_k, generator).masked_fill(done, self.END_OF_SPEECH)
            ended = ended | ((drawn == self.END_OF_SPEECH) & ~done)
            done = ended | (said >= most)
            drawn = drawn.masked_fill(done, self.END_OF_SPEECH)
            state.ended = ended.to(token.device)
            if done.all():
                return
            token = drawn.to(token.device)
            history.append(drawn)
            yield drawn

    def bounds(self, state: DecoderState, limit: int) -> tuple[Tensor, Tensor]:
        """(batch,) the fewest and the most codes of each row, from how long its text should last; `limit` caps both.

        That is known where text positions are `stretch` speech tokens apart; else the limit alone holds.
        """
        expected = self.preset.stretch * state.read
        least = (self.preset.shortest * expected).floor()
        most = self.preset.longest * expected + (EXTRA_TOKENS if self.preset.stretch else limit)
        return least.clamp(max=limit), most.clamp(max=limit)

    def only_speakable(self, logits: Tensor) -> Tensor:
        """Special ids other than END_OF_SPEECH can never be drawn: the codec has no entry for them."""
        specials = torch.tensor([self.BEGIN_OF_TEXT, self.START_OF_SPEECH, self.PAD])
        return logits.index_fill(-1, specials, -torch.inf)


def blocks(preset: Preset, count: int) -> nn.ModuleList:
    """`count` gated blocks in the widths of a `decoder_nar_ar` preset."""
    sizes = (preset.width, preset.heads, preset.feed_forward_width)
    return nn.ModuleList(TransformerBlock(*sizes, gated=True, dropout=preset.dropout) for _ in range(count))


def read_only(
    block: TransformerBlock, x: Tensor, turn: Rotation, before: "KVCache | LayerPrefix | None" = None
) -> LayerPrefix:
    """What of x (batch, tokens, width) a block lets others see: keys and values, behind those of `before`.

    Of the text, the last block needs nothing more: nobody looks at what it would make of it.
    """
    keys, values = block.keys_and_values(block.attention_norm(x), turn)
    return LayerPrefix(*(before.append(keys, values) if before is not None else (keys, values)))


def padding_mask(lengths: Tensor, size: int) -> Tensor:
    """Bool (batch, 1, 1, size) of valid keys; an empty row may look at its first place, so it is finite."""
    return lengths_mask(lengths.clamp(min=1), size)[:, None, None]


def prefix_caches(prefix: Prefix | None, layers: int) -> list[KVCache]:
    """One cache for each layer, the prefix copied in first."""
    caches = [KVCache() for _ in range(layers)]
    for cache, layer in zip(caches, prefix.layers if prefix else (), strict=bool(prefix)):
        cache.append(layer.keys, layer.values)
    return caches


def discourage(logits: Tensor, recent: Tensor, penalty: float) -> Tensor:
    """Divide the odds of each recent token (batch, window) by `penalty`, once however often it occurred.

    (Dividing the logit itself, as is often done, makes a token with a negative logit likelier.)
    """
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, recent, True)
    return torch.where(seen, logits - torch.log(torch.tensor(penalty)), logits)


def sample(logits: Tensor, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw (batch,) ids from the top_k likeliest of (batch, ids), in proportion to their probabilities.

    Raises ValueError if top_k < 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected at least 1 (1 takes the likeliest token)")
    if top_k == 1:
        return logits.argmax(dim=-1)
    values, ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    chosen = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)
    return ids.gather(-1, chosen)[:, 0]


class KeyValueLayer(nn.Module):
    """The top of the prefix decoder: only what the cache keeps.

    Queries and a feed-forward layer would never get a gradient here.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> LayerPrefix:
        x = self.attention_norm(x)
        keys, values = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.key, self.value))
        return LayerPrefix(rotary(keys, turn), values)


class Keep:
    """Stands in for a block's cache and keeps what the block computed."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.layer = LayerPrefix(keys, values)
        return keys, values


class PrefixDecoder(nn.Module):
    """LLM hidden_states (batch, tokens, llm_width) -> Prefix: the first kv_cache entries of the shared stack.

    Paper: the NAR prefix speech decoder, decoder stage 3. Bidirectional, positions from 0, own parameters;
    block i writes for shared block i. Every parameter learns (in the released top block most are dead).
    """

    def __init__(self, preset: Preset, decoder: SpeechDecoder, llm_width: int) -> None:
        super().__init__()
        if preset.layers != len(decoder.blocks):
            raise StageMismatch(
                f"the prefix decoder has {preset.layers} layers, expected {len(decoder.blocks)}, one for "
                f"each of the speech decoder: set decoder_prefix.layers={len(decoder.blocks)}."
            )
        sizes = decoder.preset
        self.stretch = preset.stretch
        self.projection = TextProjection(llm_width, sizes.width, decoder.vectors)
        self.blocks = blocks(sizes, preset.layers - 1)
        self.last = KeyValueLayer(sizes.width, sizes.heads)

    @classmethod
    def from_preset(cls, preset: Preset, decoder: SpeechDecoder, llm_width: int) -> "PrefixDecoder":
        """A fresh one of a `decoder_prefix` preset. Raises StageMismatch if the depths differ."""
        return cls(preset, decoder, llm_width)

    def forward(self, hidden_states: Tensor, hidden_lengths: Tensor | None = None) -> Prefix:
        """Several positions for each hidden state; without lengths nothing is padding."""
        if hidden_lengths is None:
            size = hidden_states.shape[:1]
            hidden_lengths = torch.full(size, hidden_states.shape[1], device=hidden_states.device)
        x = self.projection(hidden_states, hidden_lengths)
        lengths = hidden_lengths * self.projection.vectors
        positions = torch.arange(x.shape[1], device=x.device) * (self.stretch or 1)
        turn = rotation(positions, x.shape[-1] // self.last.heads)
        mask, layers = padding_mask(lengths, x.shape[1]), []
        for block in self.blocks:
            keep = Keep()
            x = block(x, turn, mask, keep)
            layers.append(keep.layer)
        return Prefix([*layers, self.last(x, turn)], lengths)
