"""Dialogue states: what each 160 ms chunk means, how the labels are made, and the head that reads them.

Paper: "Chunk-level State Prediction". The label rules are ours, the paper gives none (DIFFERENCES.md); notebook 08
draws them. The head sits on the frozen LLM's hidden state at the last vector of every chunk.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .audio import CHUNK_MS, LLM_VECTORS_PER_CHUNK
from .frozen_llm import IGNORE


class DialogueState(IntEnum):
    """The paper's numbers."""

    KEEP_LISTENING = 0
    TAKE_TURN = 1
    NO_RESPONSE = 2


@dataclass(frozen=True)
class Timeline:
    """What happens in one recorded turn: all that the label rules need to know.

    last_voiced_seconds  end of the last voiced sample
    complete             the question is finished (False: broken off)
    addressed            it is meant for the system (False: others talking, noise, back-channel, echo)
    """

    duration_seconds: float
    last_voiced_seconds: float
    complete: bool
    addressed: bool


def label_chunks(
    timeline: Timeline,
    chunks: int,
    decision_delay_ms: int = 160,
    timeout_ms: int = 2000,
    decision_chunks: int = 1,
) -> Tensor:
    """Dialogue-state labels (chunks,) of one turn: 0, then the decision (1 or 2), then IGNORE.

    The decision stands on the first chunk that ends at least `decision_delay_ms` after the last voiced sample: 1 for
    a complete question to the system, 2 for anything not addressed to it. A question broken off stays 0 until
    `timeout_ms` of silence and is then dropped with 2. If the recording ends earlier, every chunk is 0.

    decision_chunks   the decision is repeated until it stands on so many chunks: a session decides on the first, but if
                      it was not sure there, it should be sure soon
    """
    broken_off = timeline.addressed and not timeline.complete
    wait_ms = timeout_ms if broken_off else decision_delay_ms
    takes_turn = timeline.addressed and timeline.complete
    labels = torch.zeros(chunks, dtype=torch.long)
    decided = decision_chunk(timeline.last_voiced_seconds, wait_ms)
    if decided < chunks:
        labels[decided:] = DialogueState.TAKE_TURN if takes_turn else DialogueState.NO_RESPONSE
        labels[decided + decision_chunks :] = IGNORE
    return labels


def decision_chunk(last_voiced_seconds: float, wait_ms: int) -> int:
    """Index of the first chunk that ends `wait_ms` or more after the last voiced sample."""
    due_ms = round(last_voiced_seconds * 1000) + wait_ms
    return max(0, -(-due_ms // CHUNK_MS) - 1)


class StateHead(nn.Module):
    """One linear layer from the LLM's width to the three states (the released head has a fourth, never used)."""

    def __init__(self, llm_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(llm_width, len(DialogueState))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> scores (..., 3)."""
        return self.linear(hidden.to(self.linear.weight.dtype))

    def probabilities(self, hidden: Tensor) -> Tensor:
        return self(hidden).softmax(dim=-1)


def chunk_states(hidden: Tensor) -> Tensor:
    """Of hidden states (batch, vectors, width) over whole chunks, those at the last vector of each chunk."""
    return hidden[:, LLM_VECTORS_PER_CHUNK - 1 :: LLM_VECTORS_PER_CHUNK]


def state_loss(scores: Tensor, labels: Tensor, decision_weight: float = 1.0) -> Tensor:
    """Cross-entropy of scores (..., 3) against labels (...), IGNORE left out.

    decision_weight  how much a decision (1 or 2) counts against a chunk of listening (0): a turn has about ten
                     chunks of 0 for each decision
    """
    weights = scores.new_tensor([1.0, decision_weight, decision_weight])
    return F.cross_entropy(
        scores.flatten(0, -2).float(), labels.flatten(), weights.float(), ignore_index=IGNORE
    )


def decide(p: Tensor, take_turn_threshold: float = 0.5, no_response_threshold: float = 0.5) -> DialogueState:
    """The state of one chunk from its probabilities (3,): ignore is asked first, then answer, else keep listening."""
    if float(p[DialogueState.NO_RESPONSE]) > no_response_threshold:
        return DialogueState.NO_RESPONSE
    if float(p[DialogueState.TAKE_TURN]) > take_turn_threshold:
        return DialogueState.TAKE_TURN
    return DialogueState.KEEP_LISTENING
