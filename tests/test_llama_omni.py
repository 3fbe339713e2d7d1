"""The second system's speech decoder: collapse, feasibility, streaming, padding, and that it learns."""

from itertools import pairwise

import pytest
import torch

from freeze_omni_lite.chunk import assert_past_never_changes, assert_streaming_equals_offline
from freeze_omni_lite.errors import InputError
from freeze_omni_lite.llama_omni import (
    CTCCollapse,
    CTCSpeechDecoder,
    ctc_collapse,
    expand,
    feasible,
    merge_repeats,
    upsample,
)

LLM_WIDTH, UNITS, RATIO = 12, 20, 4


def make():
    torch.manual_seed(1)
    sizes = dict(width=32, heads=2, feed_forward_width=64)
    return CTCSpeechDecoder(LLM_WIDTH, UNITS, RATIO, **sizes).eval()


def batch():
    """Hidden states, lengths, targets, lengths: wild values in every padded place."""
    torch.manual_seed(2)
    lengths, target_lengths = torch.tensor([6, 3, 5]), torch.tensor([9, 5, 12])
    hidden, targets = torch.randn(3, 6, LLM_WIDTH), torch.randint(UNITS, (3, 12))
    for row in range(3):
        hidden[row, lengths[row] :] = torch.nan
        targets[row, target_lengths[row] :] = -100
    return hidden, lengths, targets, target_lengths


def single(data, row):
    hidden, lengths, targets, target_lengths = data
    one = slice(row, row + 1)
    return hidden[one, : lengths[row]], lengths[one], targets[one, : target_lengths[row]], target_lengths[one]


def test_upsampling_repeats_each_row():
    hidden = torch.randn(2, 3, 5)
    stretched, lengths = upsample(hidden, torch.tensor([3, 2]), 4)
    assert stretched.shape == (2, 12, 5) and lengths.tolist() == [12, 8]
    assert all(torch.equal(stretched[:, j], hidden[:, j // 4]) for j in range(12))


def test_collapse_and_durations():
    assert ctc_collapse([9, 4, 4, 9, 9, 4, 5, 5, 9], blank=9) == [4, 4, 5]
    assert ctc_collapse([], blank=9) == ctc_collapse([9, 9], blank=9) == []
    codes = torch.randint(3, (200,)).tolist()
    assert expand(*merge_repeats(codes)) == codes
    assert merge_repeats([]) == ([], [])


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_collapse_of_a_stream_is_collapse_of_the_whole(piece):
    ids = torch.randint(3, (100,), generator=torch.Generator().manual_seed(4)).tolist()
    collapse = CTCCollapse(blank=2)
    streamed = [unit for i in range(0, 100, piece) for unit in collapse.push(ids[i : i + piece])]
    assert streamed == ctc_collapse(ids, blank=2)


def test_feasibility_is_where_the_loss_becomes_finite():
    for target in ([1, 2, 3], [1, 1, 1], [4, 4, 5, 5]):
        needed = next(n for n in range(20) if feasible(n, target))
        assert needed == len(target) + sum(a == b for a, b in pairwise(target))
        for places in (needed - 1, needed):
            loss = torch.nn.functional.ctc_loss(
                torch.zeros(places, 1, 10).log_softmax(-1), torch.tensor([target]), [places], [len(target)], 9
            )
            assert loss.isfinite() == feasible(places, target)


def test_too_few_places_are_refused_before_training():
    decoder = make()
    hidden, lengths = torch.randn(2, 2, LLM_WIDTH), torch.tensor([2, 2])
    targets = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 1, 2, 3, 4, 4]])
    decoder(hidden, lengths, targets, torch.tensor([6, 6]))  # 8 places: just enough for the second
    with pytest.raises(InputError, match="item 1 has 8 places for units that need 9"):
        decoder(hidden, lengths, torch.tensor([[1] * 7, [1, 2, 2, 3, 4, 4, 5]]), torch.tensor([2, 7]))


@pytest.mark.parametrize("omega", [1, 2, 5])
def test_streaming_equals_offline(omega):
    decoder = make()
    hidden = torch.randn(1, 11, LLM_WIDTH)
    lengths = torch.tensor([11])
    assert_streaming_equals_offline(decoder, hidden, omega, offline=lambda x: decoder.logits(x, lengths)[0])
    state, collapse = decoder.start(), CTCCollapse(decoder.blank)
    units = []
    for piece in hidden.split(omega, dim=1):
        units += collapse.push(decoder.step(piece, state)[0].argmax(-1).tolist())
    assert units == decoder.units(hidden, lengths)[0] != []


def test_new_states_never_change_old_places():
    decoder = make()
    lengths = torch.tensor([8])
    logits = lambda x: decoder.logits(x, lengths)[0]  # noqa: E731
    assert_past_never_changes(logits, torch.randn(1, 8, LLM_WIDTH), cut=5, kept=5 * RATIO)


def test_a_padded_batch_equals_its_samples():
    decoder, data = make(), batch()
    together, places = decoder.logits(*data[:2])
    sums = []
    for row in range(3):
        one = single(data, row)
        alone = decoder.logits(*one[:2])[0]
        torch.testing.assert_close(together[row, : places[row]], alone[0], atol=1e-5, rtol=0)
        sums.append(decoder(*one)["loss"] * one[3].sum())
    torch.testing.assert_close(decoder(*data)["loss"], torch.stack(sums).sum() / data[3].sum())
    assert [decoder.units(*single(data, row)[:2])[0] for row in range(3)] == decoder.units(*data[:2])


def test_the_places_of_the_first_state_can_differ():
    """They are copies of one vector: without the learned beginning, rotary attention cannot tell them apart."""
    logits, _ = make().logits(torch.randn(1, 1, LLM_WIDTH), torch.tensor([1]))
    assert not torch.allclose(logits[0, 0], logits[0, 1], atol=1e-4)


def test_only_the_decoder_learns():
    decoder, (hidden, *rest) = make(), batch()
    hidden = hidden.nan_to_num().requires_grad_()
    decoder(hidden.detach(), *rest)["loss"].backward()
    assert hidden.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_overfit_a_few_to_exact_units():
    """Blank collapse is watched too: the blank rate must leave 1."""
    decoder, data = make(), batch()
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    for _ in range(300):
        result = decoder(*data)
        optimiser.zero_grad()
        result["loss"].backward()
        optimiser.step()
        if result["loss"] < 0.02:
            break
    assert result["blank_rate"] < 0.9
    wanted = [row[:size].tolist() for row, size in zip(data[2], data[3], strict=True)]
    assert decoder.units(*data[:2]) == wanted
