"""The speech decoder: mask equals prefill + steps, padding moves nothing, stage 3 trains the prefix only."""

import copy

import pytest
import torch

from freeze_omni_lite import scales
from freeze_omni_lite.errors import StageMismatch
from freeze_omni_lite.speech_decoder import (
    EXTRA_TOKENS,
    PrefixDecoder,
    SpeechDecoder,
    decoder_mask,
    discourage,
    sample,
)
from freeze_omni_lite.text import SPELLING_IDS

CODES, LLM_WIDTH = 64, 24


def make(**changes):
    torch.manual_seed(1)
    preset = scales.load("decoder_nar_ar", "tiny", **changes)
    decoder = SpeechDecoder.from_preset(preset, CODES, LLM_WIDTH).eval()
    stage = scales.load("decoder_prefix", "tiny", layers=preset.layers)
    return decoder, PrefixDecoder.from_preset(stage, decoder, LLM_WIDTH).eval()


def batch(text_lengths=(5, 2, 0), code_lengths=(7, 11, 4)):
    """Random samples, with wild values in every padded place."""
    torch.manual_seed(2)
    text_lengths, code_lengths = torch.tensor(text_lengths), torch.tensor(code_lengths)
    text = torch.randn(len(text_lengths), int(text_lengths.max()), LLM_WIDTH)
    codes = torch.randint(CODES, (len(code_lengths), int(code_lengths.max())))
    for row, (tokens, spoken) in enumerate(zip(text_lengths, code_lengths, strict=True)):
        text[row, tokens:] = torch.nan
        codes[row, spoken:] = -100
    return text, text_lengths, codes, code_lengths


def single(data, row):
    text, text_lengths, codes, code_lengths = data
    one = slice(row, row + 1)
    tokens, spoken = text_lengths[row], code_lengths[row]
    return text[one, :tokens], text_lengths[one], codes[one, :spoken], code_lengths[one]


@pytest.fixture(params=[False, True], ids=["plain", "prefix"])
def with_prefix(request):
    return request.param


def hidden_states(rows):
    torch.manual_seed(3)
    lengths = torch.tensor([3, 6, 1])[:rows]
    return torch.randn(rows, 6, LLM_WIDTH), lengths


# ---- spelled, stretched, bounded ----

SPELLED = dict(spelled=True, stretch=2.75, shortest=0.5, longest=2.0)


def spelling(text_lengths=(5, 2, 0), longest=4):
    """Character ids (batch, tokens, longest), one to four a token, with wild values behind each text."""
    generator = torch.Generator().manual_seed(4)
    found = torch.randint(
        1, SPELLING_IDS, (len(text_lengths), max(text_lengths), longest), generator=generator
    )
    counts = torch.randint(1, longest + 1, found.shape[:2], generator=generator)
    found[torch.arange(longest) >= counts[..., None]] = 0
    for row, tokens in enumerate(text_lengths):
        found[row, tokens:] = 7
    return found


def test_every_character_gets_its_own_and_its_tokens_vector():
    decoder, _ = make(**SPELLED)
    text, lengths, *_ = batch()
    characters, projection = spelling(), decoder.text_projection
    found = projection(text, lengths, characters)
    assert projection.counts(characters, lengths).tolist() == [
        int((characters[row, :tokens] > 0).sum()) for row, tokens in enumerate(lengths)
    ]
    tokens = projection.token(text, lengths)
    for row, count in enumerate(lengths):
        pairs = [(t, int(c)) for t in range(count) for c in characters[row, t] if c]
        for place, (token, character) in enumerate(pairs):
            expected = tokens[row, token] + projection.character.weight[character]
            torch.testing.assert_close(found[row, place], expected)


def test_spelled_mask_equals_prefill_and_steps(with_prefix):
    decoder, prefix_decoder = make(**SPELLED)
    data, characters = single(batch(), 0), spelling()[:1]
    prefix = prefix_decoder(hidden_states(1)[0]) if with_prefix else None
    expected = decoder.logits(*data, prefix, characters)
    state = decoder.prefill(data[0], prefix, characters=characters)
    tokens = [decoder.START_OF_SPEECH, *data[2][0].tolist()]
    stepped = torch.stack([decoder.step(token, state) for token in tokens], dim=1)
    torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=0)


def test_a_spelled_batch_equals_its_samples(with_prefix):
    decoder, prefix_decoder = make(**SPELLED)
    data, characters = batch(), spelling()
    hidden, lengths = hidden_states(3)
    prefix = prefix_decoder(hidden, lengths) if with_prefix else None
    together = decoder.logits(*data, prefix, characters)
    spoken, ended = decoder.generate_batch(*data[:2], prefix, characters, top_k=1, max_speech_tokens=60)
    for row in range(3):
        alone = prefix_decoder(hidden[row, None, : lengths[row]]) if with_prefix else None
        one, own = single(data, row), characters[row, None, : data[1][row]]
        logits = decoder.logits(*one, alone, own)[0]
        torch.testing.assert_close(together[row, : one[3] + 1], logits, atol=1e-4, rtol=0)
        utterance = decoder.generate(one[0], alone, top_k=1, max_speech_tokens=60, characters=own)
        assert list(utterance) == spoken[row] and utterance.ended == ended[row]


def test_each_row_has_limits_of_its_own():
    decoder, _ = make(**SPELLED)
    text, lengths, *_ = batch()
    characters = spelling()
    counts = decoder.text_projection.counts(characters, lengths)
    with torch.no_grad():
        decoder.output.bias[decoder.END_OF_SPEECH] = -100.0
    spoken, ended = decoder.generate_batch(text, lengths, None, characters)
    most = (2 * 2.75 * counts + EXTRA_TOKENS).ceil()
    assert [len(row) for row in spoken] == most.tolist() and ended == [False] * 3
    spoken, _ = decoder.generate_batch(text, lengths, None, characters, max_speech_tokens=45)
    assert [len(row) for row in spoken] == most.clamp(max=45).tolist()
    with torch.no_grad():
        decoder.output.bias[decoder.END_OF_SPEECH] = 100.0
    spoken, ended = decoder.generate_batch(text, lengths, None, characters)
    assert [len(row) for row in spoken] == (0.5 * 2.75 * counts).floor().tolist() and ended == [True] * 3


def test_text_and_speech_run_side_by_side():
    decoder, _ = make(**SPELLED)
    positions = decoder.positions(torch.tensor([3, 2]), 3, 2)
    assert positions.tolist() == [[0.0, 2.75, 5.5, 0.0, 1.0]] * 2
    plain, _ = make()
    assert plain.positions(torch.tensor([3, 2]), 3, 2).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 3]]


def test_a_spelling_decoder_asks_for_characters_and_trains_all():
    decoder, prefix_decoder = make(**SPELLED)
    with pytest.raises(ValueError, match="give the characters"):
        decoder(*batch())
    decoder(*batch(), prefix_decoder(*hidden_states(3)), spelling())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_special_ids_follow_the_codes():
    decoder, _ = make()
    specials = [decoder.BEGIN_OF_TEXT, decoder.START_OF_SPEECH, decoder.END_OF_SPEECH, decoder.PAD]
    assert specials == [64, 65, 66, 67]
    assert decoder.output.out_features == decoder.embedding.num_embeddings == 68


@pytest.mark.parametrize("pre_network_layers", [0, 1])
def test_training_mask_equals_prefill_and_steps(with_prefix, pre_network_layers):
    decoder, prefix_decoder = make(pre_network_layers=pre_network_layers)
    data = single(batch(), 0)
    prefix = prefix_decoder(hidden_states(1)[0]) if with_prefix else None
    expected = decoder.logits(*data, prefix)
    state = decoder.prefill(data[0], prefix)
    tokens = [decoder.START_OF_SPEECH, *data[2][0].tolist()]
    stepped = torch.stack([decoder.step(token, state) for token in tokens], dim=1)
    torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=0)


def test_a_padded_batch_equals_its_samples(with_prefix):
    decoder, prefix_decoder = make()
    data = batch()
    hidden, lengths = hidden_states(3)
    prefix = prefix_decoder(hidden, lengths) if with_prefix else None
    together = decoder.logits(*data, prefix)
    assert together.isfinite().all()
    losses, targets = [], data[3] + 1
    for row in range(3):
        alone = prefix_decoder(hidden[row, None, : lengths[row]]) if with_prefix else None
        one = single(data, row)
        torch.testing.assert_close(
            together[row, : one[3] + 1], decoder.logits(*one, alone)[0], atol=1e-4, rtol=0
        )
        losses.append(decoder(*one, alone)["loss"])
    mean = (torch.stack(losses) * targets).sum() / targets.sum()
    torch.testing.assert_close(decoder(*data, prefix)["loss"], mean)


def test_batched_speech_equals_single_speech(with_prefix):
    decoder, prefix_decoder = make()
    text, lengths, *_ = data = batch()
    hidden, hidden_lengths = hidden_states(3)
    prefix = prefix_decoder(hidden, hidden_lengths) if with_prefix else None
    spoken, ended = decoder.generate_batch(text, lengths, prefix, top_k=1, max_speech_tokens=12)
    for row in range(3):
        alone = prefix_decoder(hidden[row, None, : hidden_lengths[row]]) if with_prefix else None
        utterance = decoder.generate(single(data, row)[0], alone, top_k=1, max_speech_tokens=12)
        assert list(utterance) == spoken[row]
        assert utterance.ended == ended[row]


def test_long_speech_keeps_its_positions():
    decoder, _ = make()
    data = single(batch((2,), (150,)), 0)
    state = decoder.prefill(data[0])
    tokens = [decoder.START_OF_SPEECH, *data[2][0].tolist()]
    stepped = torch.stack([decoder.step(token, state) for token in tokens], dim=1)
    torch.testing.assert_close(stepped, decoder.logits(*data), atol=1e-4, rtol=0)


def test_mask_and_targets_by_hand():
    seen = decoder_mask(prefix=2, text=2, speech=3).int().tolist()
    assert seen == [
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    decoder, _ = make()
    targets = decoder.targets(torch.tensor([[5, 6, 7], [8, -1, -1]]), torch.tensor([3, 1]))
    assert targets.tolist() == [[5, 6, 7, 66], [8, 66, 67, 67]]


def test_the_past_never_hears_the_future():
    decoder, _ = make()
    text, lengths, codes, code_lengths = single(batch(), 1)
    changed = codes.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % CODES
    before = decoder.logits(text, lengths, codes, code_lengths)
    after = decoder.logits(text, lengths, changed, code_lengths)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_mixed_precision_stays_close():
    decoder, prefix_decoder = make()
    exact = decoder(*batch(), prefix_decoder(*hidden_states(3)))["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = decoder(*batch(), prefix_decoder(*hidden_states(3)))["loss"]
    torch.testing.assert_close(mixed, exact, atol=0.02, rtol=0)


def test_every_trained_parameter_gets_a_gradient():
    decoder, prefix_decoder = make()
    decoder(*batch())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    decoder.requires_grad_(False)
    decoder(*batch(), prefix_decoder(*hidden_states(3)))["loss"].backward()
    dead = [n for n, p in prefix_decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


def test_the_prefix_stage_leaves_the_decoder_bit_identical():
    decoder, prefix_decoder = make()
    decoder.requires_grad_(False)
    before = copy.deepcopy(decoder.state_dict())
    optimiser = torch.optim.AdamW(prefix_decoder.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = decoder(*batch(), prefix_decoder(*hidden_states(3)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in decoder.state_dict().items())


def test_special_ids_never_reach_the_codec():
    decoder, _ = make()
    with torch.no_grad():
        decoder.output.bias[[decoder.BEGIN_OF_TEXT, decoder.START_OF_SPEECH, decoder.PAD]] = 100.0
        decoder.output.bias[decoder.END_OF_SPEECH] = -100.0
    generator = torch.Generator().manual_seed(0)
    utterance = decoder.generate(
        torch.randn(1, 3, LLM_WIDTH), top_k=200, generator=generator, max_speech_tokens=30
    )
    codes = list(utterance)
    assert len(codes) == 30 and not utterance.ended
    assert all(0 <= code < CODES for code in codes)


def test_it_stops_by_itself_and_says_so():
    decoder, _ = make()
    with torch.no_grad():
        decoder.output.bias[decoder.END_OF_SPEECH] = 100.0
    utterance = decoder.generate(torch.randn(1, 3, LLM_WIDTH))
    assert not utterance.ended
    assert list(utterance) == [] and utterance.ended
    spoken, ended = decoder.generate_batch(torch.randn(2, 3, LLM_WIDTH), torch.tensor([3, 1]))
    assert spoken == [[], []] and ended == [True, True]


def test_the_same_seed_says_the_same():
    decoder, _ = make()
    text = torch.randn(1, 3, LLM_WIDTH)
    runs = [
        list(
            decoder.generate(
                text, top_k=20, generator=torch.Generator().manual_seed(seed), max_speech_tokens=20
            )
        )
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_and_repetition():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]])
    assert sample(logits, 1).tolist() == [1]
    drawn = {int(sample(logits, 2)) for _ in range(50)}
    assert drawn == {1, 2}
    with pytest.raises(ValueError, match="top_k"):
        sample(logits, 0)
    penalised = discourage(logits, torch.tensor([[3, 3, 1]]), penalty=2.0)
    odds = (logits - penalised).exp()
    torch.testing.assert_close(odds, torch.tensor([[1.0, 2.0, 1.0, 2.0]]))
    decoder, _ = make()
    text = torch.randn(1, 3, LLM_WIDTH)
    settings = dict(top_k=1, max_speech_tokens=40, repetition_window=3, repetition_penalty=1e9)
    codes = list(decoder.generate(text, **settings))
    assert all(code not in codes[max(0, i - 3) : i] for i, code in enumerate(codes))


def test_train_mode_and_a_prefix_of_another_depth_are_refused():
    decoder, _ = make()
    with pytest.raises(RuntimeError, match="train mode"):
        decoder.train().prefill(torch.randn(1, 3, LLM_WIDTH))
    with pytest.raises(StageMismatch, match="3 layers"):
        PrefixDecoder.from_preset(scales.load("decoder_prefix", "tiny", layers=3), decoder, LLM_WIDTH)


def test_overfit_four_pairs_to_exact_codes():
    """Four random texts learn four random code sequences by heart, and greedy speech gives them back."""
    decoder, _ = make()
    _, _, codes, code_lengths = data = batch((4, 6, 3, 5), (20, 15, 24, 18))
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    decoder.train()
    for _ in range(400):
        result = decoder(*data)
        optimiser.zero_grad()
        result["loss"].backward()
        optimiser.step()
        if result["loss"] < 0.02:
            break
    assert result["token_accuracy"] == 1.0
    decoder.eval()
    for row in range(4):
        utterance = decoder.generate(single(data, row)[0], top_k=1)
        assert list(utterance) == codes[row, : code_lengths[row]].tolist() and utterance.ended
