"""The text LLM that stays frozen, behind five verbs: embed, hidden, prefill, step, fingerprint.

Paper: the backbone is 100 % frozen in every stage. Any Hugging Face causal LLM works: an id, a local folder, or
"smollm2", the 135 M parameter model that set-up fetches. No width, vocabulary or template is baked in.

Convention, used everywhere: the hidden state OF a token is the last-layer, post-norm state at the position that
predicts it, in training (`predicting_states`) and in generation alike.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .attention import KVCache
from .errors import InputError
from .fingerprint import fingerprint
from .parts import smollm2_folder
from .thin_llama import ThinLlama

IGNORE = -100  # a label that no loss counts
UNKNOWN: Any = object()  # whether the model can be made thin


class CachedLayer(DynamicLayer):
    """One transformers cache layer on our KVCache: appends in place instead of copying the history every step."""

    def __init__(self, entries: KVCache | None = None) -> None:
        super().__init__()
        self.entries = entries or KVCache()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.entries.append(key_states, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return len(self.entries)


class LLMCache(Cache):
    """The keys and values of one conversation, layer by layer: grow, crop, fork."""

    def __init__(self, layers: list[CachedLayer]) -> None:
        super().__init__(layers=layers)

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return len(self.layers[0].entries)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on."""
        for layer in self.layers:
            layer.entries.crop(length)

    def fork(self, length: int | None = None) -> "LLMCache":
        """An independent cache with the same content, or its first `length` positions."""
        return LLMCache([CachedLayer(layer.entries.fork(length)) for layer in self.layers])

    def shared(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer as a batch of equal rows, without copying them."""
        keys, values = self.layers[layer].entries.view()
        return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)

    def nbytes(self) -> int:
        return sum(layer.entries.nbytes() for layer in self.layers)


class FrozenLLM(nn.Module):
    """A causal LLM without gradients, in evaluation mode for good."""

    def __init__(self, model: nn.Module, tokenizer, name: str = "") -> None:
        super().__init__()
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.thin_model: ThinLlama | None = UNKNOWN
        self.model.requires_grad_(False)
        self.train(False)

    @classmethod
    def load(
        cls, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "FrozenLLM":
        """Load "smollm2", a Hugging Face id, or a local folder. Raises InputError if there is no such model."""
        source = smollm2_folder() if name == "smollm2" else name
        try:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"no language model {name!r} ({reason}): give a Hugging Face id or a folder."
            ) from None
        return cls(model, tokenizer, name)

    def train(self, mode: bool = True) -> "FrozenLLM":
        """Stays in evaluation mode whatever a parent module does."""
        return super().train(False)

    @property
    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def positions(self) -> int:
        """Longest context, in positions."""
        return self.model.config.max_position_embeddings

    @property
    def embedding_table(self) -> Tensor:
        """The input embeddings (vocabulary, width)."""
        return self.model.get_input_embeddings().weight

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the embedding table: the level that the LLM expects of its input vectors."""
        return float(self.embedding_table.float().square().mean().sqrt())

    def embed(self, token_ids: Tensor | list[int]) -> Tensor:
        """Token ids (...,) -> vectors (..., width)."""
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        return self.model.get_input_embeddings()(ids)

    def hidden(self, vectors: Tensor, after: LLMCache | None = None) -> Tensor:
        """(batch, positions, width) -> last-layer, post-norm states of the same shape, with gradients to the input.

        Rows may be padded on the right: a causal model never looks there.

        after   what stands before every row, computed once (`prefill` of one row): a system text that all rows share
        """
        vectors = vectors.to(self.embedding_table.dtype)
        shared = None
        if after is not None:
            shared = DynamicCache([after.shared(number, len(vectors)) for number in range(len(after.layers))])
        out = self.model.base_model(
            inputs_embeds=vectors, past_key_values=shared, use_cache=shared is not None
        )
        return out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> scores of the next token (..., vocabulary)."""
        return self.model.get_output_embeddings()(hidden)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy, nats, where `labels` (batch, positions) is not IGNORE; 0 if that is nowhere.

        labels[b, i] is the token to be predicted AT position i. Scores are computed at those places only.
        """
        wanted = labels != IGNORE
        if not wanted.any():
            return hidden.sum() * 0.0
        return F.cross_entropy(self.logits(hidden[wanted]).float(), labels[wanted])

    def new_cache(self) -> LLMCache:
        return LLMCache([CachedLayer() for _ in range(self.model.config.num_hidden_layers)])

    @torch.inference_mode()
    def prefill(self, vectors: Tensor, cache: LLMCache) -> Tensor:
        """Append (1, positions, width) to the conversation and return its hidden states.

        Raises InputError if the conversation would outgrow the LLM's positions.
        """
        after = cache.length + vectors.shape[1]
        if after > self.positions:
            raise InputError(
                f"the conversation needs {after} positions, the language model has {self.positions}: "
                "start a new conversation or speak more briefly."
            )
        vectors = vectors.to(self.embedding_table.dtype)
        if self.thin is not None:
            return self.thin(vectors, [layer.entries for layer in cache.layers])
        return self.model.base_model(inputs_embeds=vectors, past_key_values=cache).last_hidden_state

    @property
    def thin(self) -> ThinLlama | None:
        """The same layers with less around them, where the architecture allows it; made at first use."""
        if self.thin_model is UNKNOWN or (self.thin_model is not None and not self.thin_model.current):
            self.thin_model = ThinLlama.of(self.model.base_model)
        return self.thin_model

    def step(self, token_id: int, cache: LLMCache) -> Tensor:
        """Append one token and return its hidden state (1, 1, width)."""
        return self.prefill(self.embed([[token_id]]), cache)

    @torch.inference_mode()
    def generate(
        self,
        hidden: Tensor,
        cache: LLMCache,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int = 20,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Continue a conversation whose last hidden state is `hidden` (1, 1, width), until an end token.

        Yields (token id, the state (width,) that predicted it). The end token is never appended: the next turn
        opens with it, so that an answer may be interrupted anywhere.
        """
        for _ in range(max_tokens):
            token = sample(self.logits(hidden[0, -1]), temperature, top_k, generator)
            if token in self.end_tokens:
                return
            yield token, hidden[0, -1]
            hidden = self.step(token, cache)

    @torch.inference_mode()
    def answers(self, prompts: list[list[int]], max_tokens: int, batch: int = 16) -> list[list[int]]:
        """Greedy continuations of many token lists, batched by length with left padding; end tokens left out."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(order), batch):
            rows = order[first : first + batch]
            for row, tokens in zip(
                rows, self._answer_batch([prompts[i] for i in rows], max_tokens), strict=True
            ):
                results[row] = tokens
        return results

    def _answer_batch(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor(
            [[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=self.device
        )
        out = self.model.generate(
            ids,
            attention_mask=(torch.arange(longest)[None] >= torch.tensor(padding)[:, None])
            .long()
            .to(self.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(self.end_tokens),
            pad_token_id=min(self.end_tokens),
        )
        return [list(until(row[longest:].tolist(), self.end_tokens)) for row in out]

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer: the tokenizer's and the model's own."""
        configured = self.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return {token for token in [self.tokenizer.eos_token_id, *configured] if token is not None}

    def fingerprint(self) -> dict[str, str]:
        """A hash of every tensor by name: equal before and after training, or something was not frozen."""
        return fingerprint(self.model)


def predicting_states(hidden: Tensor, start: int, count: int) -> Tensor:
    """States (count, width) that predict the `count` tokens at positions start, start + 1, … of (positions, width)."""
    return hidden[start - 1 : start - 1 + count]


def sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator | None = None) -> int:
    """One token id from scores (vocabulary,): the best at temperature 0, else among the `top_k` best."""
    if temperature <= 0:
        return int(logits.argmax())
    best = (logits.float() / temperature).topk(min(top_k, logits.numel()))
    choice = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator)
    return int(best.indices[int(choice)])


def until(tokens: list[int], ends: set[int]) -> Iterator[int]:
    """The tokens before the first end token."""
    for token in tokens:
        if token in ends:
            return
        yield token
