"""The one dial: every setting of every stage at tiny, laptop, gpu and paper scale, side by side.

A row reads: name = (tiny, laptop, gpu, paper, source of the paper value, what it is). Sources of the paper value:
stated (in the paper or its tables), config (a file shipped with the released checkpoint), code (the released
inference code), derived (arithmetic on those), ours (published nowhere; our choice).
Nothing outside this file asks which scale is in use.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from .errors import InputError

SCALES = ("tiny", "laptop", "gpu", "paper")
SOURCES = ("stated", "config", "code", "derived", "ours")
LLM = ("smollm2", "smollm2", "smollm2", "Qwen/Qwen2-7B-Instruct", "stated", "the text LLM that stays frozen")
CORPUS = (
    "synthetic",
    "synthetic",
    "synthetic",
    "manifest",
    "stated",
    "synthetic: voiced here; manifest: jsonl of real audio",
)
MANIFEST = ("", "", "", "", "ours", "path of the jsonl manifest, if corpus is manifest")


def fitting(
    steps: tuple, batch_seconds: tuple, learning_rate: tuple, warmup_steps: tuple, **more: tuple
) -> dict:
    """Rows that every trained stage shares; the caller's rows win."""
    rows = dict(
        steps=(*steps, "ours", "optimiser steps"),
        batch_seconds=(*batch_seconds, "ours", "audio in one batch of one rank, s"),
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        schedule=(
            "cosine",
            "cosine",
            "cosine",
            "warmup",
            "config",
            "after warm-up: cosine to a tenth, or inverse square root",
        ),
        accumulate=(1, 1, 1, 1, "config", "batches added up per optimiser step"),
        weight_decay=(0.01, 0.01, 0.01, 0.01, "config", "AdamW weight decay"),
        beta2=(0.99, 0.99, 0.99, 0.99, "config", "AdamW second momentum"),
        clip_norm=(5.0, 5.0, 5.0, 5.0, "config", "largest gradient norm"),
        report_every=(5, 50, 100, 500, "ours", "steps between progress lines"),
        save_every=(1000, 200, 1000, 1000, "ours", "steps between resume points"),
    )
    return rows | more


# fmt: off
STAGES: dict[str, dict[str, tuple]] = {
    "codec": dict(
        codebook_size=(64, 1024, 1024, 1024, "stated", "codes in the one codebook"),
        codebook_width=(16, 32, 32, 512, "config", "numbers in one code vector"),
        width=(48, 320, 512, 512, "ours", "channels of the ConvNeXt blocks (released: HiFi-GAN layout, 512)"),
        encoder_blocks=(1, 3, 6, 8, "ours", "ConvNeXt blocks from mel to latent"),
        token_blocks=(1, 3, 6, 8, "ours", "decoder blocks at 40 Hz"),
        frame_blocks=(1, 3, 6, 8, "ours", "decoder blocks at 120 Hz"),
        lookahead_tokens=(2, 2, 2, 2, "ours", "tokens of future the decoder waits for (released: windows with 10)"),
        mel_bins=(80, 100, 100, 80, "config", "mel bands of input and loss"),
        commitment_weight=(0.25, 0.25, 0.25, 0.25, "config", "pull of latents towards their code"),
        codebook_decay=(0.9, 0.95, 0.99, 0.99, "ours", "moving average of code vectors (released: plain gradient)"),
        discriminators=(
            "spectrogram",
            "spectrogram",
            "spectrogram period scale",
            "spectrogram period scale",
            "config",
            "kinds of discriminators (released: period scale)",
        ),
        discriminator_width=(4, 16, 32, 32, "config", "channels of their narrowest layers"),
        adversarial_start_step=(30, 500, 8_000, 40_000, "ours", "from this step on the codec must fool them, too"),
        adversarial_weight=(0.2, 0.2, 0.2, 0.2, "ours", "weight of fooling them (HiFi-GAN: 8 of them to 45 mel)"),
        feature_weight=(2.0, 2.0, 2.0, 2.0, "config", "weight of the distance inside the discriminators' layers"),
        segment_seconds=(1.0, 1.0, 1.0, 1.0, "config", "length of a training excerpt, s"),
        utterances=(24, 900, 20_000, 2_000_000, "derived", "sentences of the one voice (paper: about 3,000 h)"),
        test_utterances=(4, 20, 100, 1000, "ours", "unseen sentences"),
        corpus=CORPUS,
        manifest=MANIFEST,
        **fitting(
            (45, 850, 20_000, 400_000),
            (6.0, 16.0, 64.0, 20.0),
            (2e-3, 1e-3, 5e-4, 2e-4, "config", "Adam learning rate"),
            (5, 50, 500, 1000, "ours", "warm-up steps"),
        ),
    ),
    "encoder_ctc": dict(
        subsampling_channels=(4, 32, 128, 1024, "code", "channels of the two strided convolutions (4x)"),
        width=(64, 256, 512, 1024, "stated", "hidden size"),
        layers=(2, 6, 12, 24, "stated", "transformer blocks"),
        heads=(2, 4, 8, 16, "config", "attention heads"),
        feed_forward_width=(128, 1024, 2048, 4096, "config", "feed-forward size"),
        convolution_kernel=(15, 15, 15, 1, "code", "causal depthwise convolution in each block, frames; 1: none"),
        dropout=(0.0, 0.0, 0.1, 0.1, "config", "dropout"),
        chunk_frames=(4, 4, 4, 4, "config", "encoder frames (40 ms) in a chunk"),
        left_chunks=(16, 16, 16, 16, "config", "earlier chunks a frame may see"),
        dynamic_chunks=(False, False, False, False, "config", "draw the chunk size anew for every batch"),
        dynamic_chunk_frames_max=(25, 25, 25, 25, "code", "largest chunk of that draw"),
        ctc_units=(28, 28, 28, 5538, "config", "output units without the blank (characters at our scales)"),
        utterances=(48, 8000, 200_000, 100_000_000, "derived", "transcribed utterances (paper: 110,000 h)"),
        written=(0, 4000, 10_000, 0, "ours", "of these, sentences of open vocabulary, written by the LLM"),
        writer=(*LLM[:-1], "the LLM that writes them"),
        test_utterances=(8, 100, 300, 2620, "ours", "unseen sentences in unseen voices"),
        augment_share=(0.0, 0.5, 0.7, 0.7, "ours", "share with other room and noise; all: level, SpecAugment; 0: none"),
        clean_steps=(0, 600, 1000, 0, "ours", "first steps without it, until the alignment is found"),
        corpus=CORPUS,
        manifest=MANIFEST,
        **fitting(
            (240, 3600, 40_000, 400_000),
            (8.0, 24.0, 400.0, 1200.0),
            (6e-3, 1.5e-3, 1e-3, 2e-4, "stated", "AdamW learning rate"),
            (5, 100, 2000, 5000, "ours", "warm-up steps"),
            report_every=(20, 50, 100, 500, "ours", "steps between progress lines"),
        ),
    ),
    "encoder_adapter": dict(
        llm=LLM,
        adapter_width=(128, 512, 1024, 2048, "code", "channels of the strided convolution (2x)"),
        adapter_kernel=(5, 5, 5, 5, "code", "its kernel, encoder frames"),
        task_embeddings=(4, 4, 4, 20, "config", "trainable special tokens that ask for the task"),
        warm_start_steps=(20, 800, 10_000, 0, "ours", "first steps with token CTC only, before the LLM is asked"),
        naive_steps=(3, 45, 1000, 0, "ours", "steps with the LLM loss alone, trained beside it to be compared"),
        token_ctc_temperature=(15.0, 15.0, 15.0, 15.0, "ours", "scale of the cosine scores of token CTC"),
        token_ctc_weight=(0.1, 0.1, 0.1, 0.0, "ours", "weight of token CTC beside the LLM loss"),
        ctc_weight=(0.2, 0.2, 0.2, 0.0, "ours", "weight of character CTC beside the LLM loss"),
        system_prompt=(*["Write down what the user says."] * 3, "You are a helpful assistant.", "config", "system"),
        utterances=(32, 8000, 200_000, 100_000_000, "derived", "transcribed utterances (the corpus of stage 1)"),
        written=(0, 4000, 10_000, 0, "ours", "of these, sentences of open vocabulary, written by the LLM"),
        writer=(*LLM[:-1], "the LLM that writes them"),
        test_utterances=(2, 100, 300, 2620, "ours", "unseen sentences in unseen voices"),
        augment_share=(0.0, 0.5, 0.7, 0.7, "ours", "share with other room and noise; all: level, SpecAugment; 0: none"),
        corpus=CORPUS,
        manifest=MANIFEST,
        **fitting(
            (27, 920, 14_000, 400_000),
            (4.0, 48.0, 200.0, 600.0),
            (3e-3, 1e-3, 3e-4, 1e-4, "stated", "AdamW learning rate"),
            (2, 50, 1000, 5000, "ours", "warm-up steps"),
            schedule=("constant", "cosine", "cosine", "warmup", "config", "after warm-up, see above"),
        ),
    ),
    "encoder_prompt": dict(
        llm=LLM,
        prompt_embeddings=(25, 25, 25, 25, "config", "trainable vectors before every question"),
        state_weight=(1.0, 1.0, 1.0, 1.0, "ours", "weight of the state loss beside the answer loss (paper: unknown)"),
        decision_weight=(5.0, 5.0, 5.0, 5.0, "ours", "weight of a decision (1, 2) against a listening chunk (0)"),
        max_turns=(2, 4, 4, 4, "ours", "turns of one dialogue"),
        answer_tokens=(12, 32, 64, 128, "code", "longest answer, LLM tokens"),
        system_prompt=(
            "Answer in one short sentence.",
            "Answer in one short sentence.",
            "Answer in one short sentence.",
            "You are a helpful assistant.",
            "config",
            "system text, cached before the first turn",
        ),
        dialogues=(8, 300, 20_000, 60_000, "stated", "multi-turn dialogues"),
        state_scenes=(7, 700, 10_000, 60_000, "ours", "duplex scenes whose states train beside the answers; 0: none"),
        test_questions=(3, 60, 300, 300, "ours", "unseen questions"),
        **fitting(
            (8, 110, 5000, 20_000),
            (12.0, 40.0, 200.0, 400.0),
            (6e-3, 6e-3, 2e-3, 6e-4, "stated", "AdamW learning rate"),
            (1, 10, 200, 200, "config", "warm-up steps"),
            report_every=(1, 10, 100, 500, "ours", "steps between progress lines"),
        ),
    ),
    "duplex": dict(
        llm=LLM,
        complete=(9, 600, 10_000, 60_000, "ours", "complete questions (answer: state 1)"),
        not_addressed=(6, 300, 5_000, 30_000, "ours", "talk to others, noise, back-channels (ignore: state 2)"),
        unfinished=(3, 150, 2_500, 15_000, "ours", "questions broken off (0, after 2 s of silence 2)"),
        test_samples=(14, 120, 500, 1000, "ours", "unseen scenes"),
        take_turn_threshold=(0.5, 0.5, 0.5, 0.5, "code", "p1 above which the system answers"),
        no_response_threshold=(0.9, 0.5, 0.5, 0.5, "code", "p2 above which the turn is dropped (asked first)"),
        decision_delay_ms=(160, 160, 160, 160, "ours", "silence after the last voiced sample before the label"),
        decision_chunks=(3, 3, 3, 3, "ours", "chunks on which the decision is learned: the first, and some more"),
        decision_weight=(5.0, 5.0, 5.0, 5.0, "ours", "weight of a decision (1, 2) against a listening chunk (0)"),
        timeout_ms=(2000, 2000, 2000, 2000, "code", "silence after which an unfinished turn is dropped"),
        **fitting(
            (120, 1500, 10_000, 20_000),
            (60.0, 200.0, 400.0, 400.0),
            (1e-2, 3e-3, 1e-3, 6e-4, "stated", "AdamW learning rate"),
            (5, 50, 200, 200, "config", "warm-up steps"),
            report_every=(20, 100, 500, 500, "ours", "steps between progress lines"),
        ),
    ),
    "speech_tokens": dict(
        llm=LLM,
        sentences=(24, 3600, 20_000, 2_000_000, "derived", "free sentences, voiced and tokenised (about 3,000 h)"),
        written=(0, 500, 10_000, 0, "ours", "of these, sentences of open vocabulary, written by the LLM"),
        writer=(*LLM[:-1], "the LLM that writes them"),
        answers=(8, 600, 5_000, 60_000, "stated", "answers of the frozen LLM voiced and tokenised"),
        test_sentences=(4, 30, 200, 1000, "stated", "unseen sentences (T2: 1,000)"),
        answer_tokens=(12, 32, 64, 128, "code", "longest answer, LLM tokens"),
        shard_utterances=(16, 500, 1000, 1000, "ours", "utterances in one shard file"),
        corpus=CORPUS,
        manifest=MANIFEST,
    ),
    "decoder_nar_ar": dict(
        llm=LLM,
        width=(64, 384, 512, 896, "stated", "hidden size"),
        heads=(2, 6, 8, 14, "config", "attention heads"),
        feed_forward_width=(128, 1024, 2048, 4864, "config", "feed-forward size"),
        layers=(2, 4, 4, 4, "stated", "blocks shared by NAR prefill and AR steps"),
        pre_network_layers=(1, 2, 2, 2, "code", "bidirectional blocks on the text before the NAR prefill; 0: none"),
        vectors_per_text_token=(2, 2, 2, 4, "code", "decoder positions per text token (released: 3584 = 4 x 896)"),
        spelled=(False, True, True, False, "code", "one text vector for each character instead of those"),
        stretch=(0.0, 2.75, 2.75, 0.0, "code", "speech positions a text vector, both from 0; 0.0: text, then speech"),
        dropout=(0.0, 0.0, 0.1, 0.1, "config", "dropout"),
        pair_steps=(2, 30, 100, 0, "ours", "steps of two short trainings, plain and spelled, to be compared"),
        corpus_share=(1.0, 1.0, 1.0, 1.0, "ours", "share of the corpus that is learned (a study of hours)"),
        top_k=(2, 2, 2, 2, "config", "AR sampling keeps the k likeliest tokens"),
        repetition_window=(0, 0, 0, 0, "config", "recent tokens that are made less likely; 0: off"),
        repetition_penalty=(1.1, 1.1, 1.1, 1.1, "config", "by how much"),
        max_speech_tokens=(240, 1000, 1000, 1000, "code", "longest segment, speech tokens (40 a second)"),
        shortest=(0.45, 0.45, 0.45, 0.45, "ours", "of text vectors x stretch: no end before (stretch 0.0: no bound)"),
        longest=(1.8, 1.8, 1.8, 1.8, "ours", "likewise: the longest, and a second more"),
        **fitting(
            (60, 880, 20_000, 300_000),
            (20.0, 40.0, 800.0, 6400.0),
            (5e-3, 1e-3, 5e-4, 5e-5, "stated", "AdamW learning rate"),
            (5, 80, 500, 4000, "config", "warm-up steps"),
        ),
    ),
    "decoder_prefix": dict(
        llm=LLM,
        layers=(2, 4, 4, 4, "stated", "prefix blocks, one for each shared block"),
        judged=(4, 10, 40, 200, "ours", "unseen answers that are spoken for a judge"),
        most_top_k=(2, 2, 5, 5, "ours", "and say with every top_k up to this"),
        stretch=(0.0, 5.7, 5.7, 0.0, "code", "speech positions a prefix vector, to run beside the text; 0.0: as paper"),
        **fitting(
            (60, 300, 5_000, 100_000),
            (20.0, 40.0, 400.0, 3200.0),
            (3e-3, 1e-3, 5e-4, 5e-5, "stated", "AdamW learning rate"),
            (5, 30, 200, 4000, "config", "warm-up steps"),
        ),
    ),
}
# fmt: on


@dataclass(frozen=True)
class Preset:
    """The settings of one stage at one scale, read as attributes: `preset.learning_rate`."""

    stage: str
    scale: str
    changes: dict[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Every setting by name, changes applied."""
        column = SCALES.index(self.scale)
        return {name: row[column] for name, row in STAGES[self.stage].items()} | self.changes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for special methods
            raise AttributeError(name)
        try:
            return MappingProxyType(self.values())[name]
        except KeyError:
            raise AttributeError(
                f"stage {self.stage} has no setting {name!r}{nearest(name, self.values())}"
            ) from None

    def show(self) -> None:
        """Print the table of this stage, its own column marked, changed values with a star."""
        print(table(self.stage, self.scale, self.changes))


def load(stage: str, scale: str, **changes: Any) -> Preset:
    """The preset of `stage` at `scale`, with single fields changed.

    Raises InputError for an unknown stage, scale or field, naming near misses, and for a value of another type.
    """
    check(stage, STAGES, "stage")
    check(scale, SCALES, "scale")
    preset = Preset(stage, scale, {})
    known = preset.values()
    for name, value in changes.items():
        check(name, known, f"setting of stage {stage}")
        changes[name] = fitted(f"{stage}.{name}", value, known[name])
    return Preset(stage, scale, changes)


def fitted(name: str, value: Any, example: Any) -> Any:
    """`value` in the type of `example`; whole numbers pass as floats. Raises InputError for any other type."""
    if isinstance(example, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(example):
        raise InputError(
            f"{name} is {value!r}, expected {type(example).__name__} such as {example!r}: change the value."
        )
    return value


def check(name: str, known: Any, what: str) -> None:
    """Raise InputError unless `name` is in `known`."""
    if name not in known:
        raise InputError(f"unknown {what} {name!r}{nearest(name, known)}: use one of {', '.join(known)}.")


def nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=2)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def table(stage: str, scale: str | None = None, changes: dict[str, Any] | None = None) -> str:
    """The settings of a stage as aligned text, one row each, with the source of the paper value."""
    changes = changes or {}
    head = [f"[{name}]" if name == scale else name for name in SCALES]
    rows = [[stage, *head, "paper value", "what it is"]]
    for name, (*values, source, meaning) in STAGES[stage].items():
        cells = [brief(value) for value in values]
        if name in changes and scale:
            cells[SCALES.index(scale)] = f"{brief(changes[name])}*"
        rows.append([name, *cells, source, meaning])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def brief(value: Any) -> str:
    """A value short enough for a table cell."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 22 else text[:19] + "..."
