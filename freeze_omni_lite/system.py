"""The whole of Freeze-Omni, assembled from stage folders: each part is loaded when it is first asked for.

Parts are stateless and shared; whatever belongs to one conversation lives in dialogue.Session.
"""

from functools import cached_property

import torch

from . import stages
from .adapter import Adapter, PromptEmbedding, TaskEmbedding
from .audio import LogMel
from .codec import Codec
from .duplex import StateHead
from .encoder import CTCHead, Encoder
from .frozen_llm import FrozenLLM
from .speech_decoder import PrefixDecoder, SpeechDecoder
from .text import ChatLayout, CTCUnits, Speller
from .training import device as pick_device

LISTENING = ("encoder_ctc", "encoder_adapter", "encoder_prompt", "duplex")
SPEAKING = ("codec", "decoder_nar_ar", "decoder_prefix")


class System:
    """Trained parts by name; `needs` lists the stages that must come from one place."""

    def __init__(self, source: stages.Source, device: torch.device | str | None = None) -> None:
        self.source, self.device = source, pick_device(device)

    @classmethod
    def load(
        cls,
        scale: str | None = None,
        runs: str = "runs",
        needs: tuple[str, ...] = LISTENING + SPEAKING,
        device: str | None = None,
    ) -> "System":
        """The best chain of stages that is there (see stages.source), or the one at `scale`. Raises StageMissing."""
        return cls(stages.source(needs, runs, scale), device)

    def stage(self, name: str) -> stages.Stage:
        return self.source.stage(name)

    def provenance(self) -> dict[str, dict[str, str]]:
        """The stages used so far, for a trace."""
        return self.source.provenance()

    def ready(self, module: torch.nn.Module) -> torch.nn.Module:
        """Frozen, in evaluation mode, on the device."""
        return module.requires_grad_(False).eval().to(self.device)

    def restore(self, stage: str, **modules: torch.nn.Module) -> torch.nn.Module:
        """Fill modules from a stage folder; returns the first one, ready."""
        self.stage(stage).restore(**modules)
        return next(self.ready(module) for module in modules.values())

    @cached_property
    def llm(self) -> FrozenLLM:
        name = next(preset.llm for preset in self.source.presets() if "llm" in preset.values())
        return FrozenLLM.load(name, self.device)

    @cached_property
    def layout(self) -> ChatLayout:
        """The chat of stage 3: questions and answers."""
        return ChatLayout.from_tokenizer(
            self.llm.tokenizer, self.stage("encoder_prompt").preset.system_prompt
        )

    @cached_property
    def transcript_layout(self) -> ChatLayout:
        """The chat of stage 2: speech and its transcript."""
        return ChatLayout.from_tokenizer(
            self.llm.tokenizer, self.stage("encoder_adapter").preset.system_prompt
        )

    @cached_property
    def speller(self) -> Speller:
        """The characters of the LLM's tokens, for a speech decoder that spells."""
        return Speller(self.llm.tokenizer)

    @cached_property
    def features(self) -> LogMel:
        return self.ready(LogMel())

    @cached_property
    def stage1_encoder(self) -> Encoder:
        """The encoder as CTC alone left it; `transcribe --through ctc` reads with it."""
        return self.restore("encoder_ctc", encoder=Encoder.from_preset(self.stage("encoder_ctc").preset))

    @cached_property
    def stage1_ctc_head(self) -> CTCHead:
        return self.restore("encoder_ctc", ctc_head=CTCHead(self.stage1_encoder.width, len(self.units)))

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder as stage 2 left it: it speaks to the LLM, and stage 3 keeps it frozen."""
        return self.restore("encoder_adapter", encoder=Encoder.from_preset(self.stage("encoder_ctc").preset))

    @cached_property
    def units(self) -> CTCUnits:
        return CTCUnits.from_json(self.stage("encoder_ctc").extra["units"])

    @cached_property
    def ctc_head(self) -> CTCHead:
        """The character head as stage 2 left it, for a transcript of what the LLM is hearing."""
        return self.restore("encoder_adapter", ctc_head=CTCHead(self.encoder.width, len(self.units)))

    @cached_property
    def adapter(self) -> Adapter:
        preset = self.stage("encoder_adapter").preset
        adapter = Adapter.from_preset(preset, self.encoder.width, self.llm.width, self.llm.embedding_rms)
        return self.restore("encoder_adapter", adapter=adapter)

    @cached_property
    def task_embedding(self) -> TaskEmbedding:
        count = self.stage("encoder_adapter").preset.task_embeddings
        return self.restore("encoder_adapter", task_embedding=TaskEmbedding(count, self.llm.width))

    @cached_property
    def prompt_embedding(self) -> PromptEmbedding:
        count = self.stage("encoder_prompt").preset.prompt_embeddings
        return self.restore("encoder_prompt", prompt_embedding=PromptEmbedding(count, self.llm.width))

    @cached_property
    def state_head(self) -> StateHead:
        return self.restore("duplex", state_head=StateHead(self.llm.width))

    @cached_property
    def codec(self) -> Codec:
        return self.restore("codec", codec=Codec.from_preset(self.stage("codec").preset))

    @cached_property
    def speech_decoder(self) -> SpeechDecoder:
        preset = self.stage("decoder_nar_ar").preset
        codes = self.stage("codec").preset.codebook_size
        decoder = SpeechDecoder.from_preset(preset, codes, self.llm.width)
        return self.restore("decoder_nar_ar", speech_decoder=decoder)

    @cached_property
    def prefix_decoder(self) -> PrefixDecoder:
        preset = self.stage("decoder_prefix").preset
        prefix = PrefixDecoder.from_preset(preset, self.speech_decoder, self.llm.width)
        return self.restore("decoder_prefix", prefix_decoder=prefix)
