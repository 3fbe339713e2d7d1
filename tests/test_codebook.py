"""The codebook: nearest code, learning by moving average, revival, and the gradient that passes straight through."""

import math

import pytest
import torch

from freeze_omni_lite.codebook import Codebook, perplexity, unit
from freeze_omni_lite.errors import InputError

SIZE, WIDTH = 16, 8


@pytest.fixture
def book() -> Codebook:
    torch.manual_seed(1)
    return Codebook(SIZE, WIDTH, decay=0.9)


def latents_around(directions: torch.Tensor, count: int, noise: float = 0.05) -> torch.Tensor:
    """(1, count, width): latents of random length about randomly chosen directions (codes, width)."""
    chosen = directions[torch.randint(len(directions), (count,))]
    return ((chosen + noise * torch.randn(count, directions.shape[1])) * (0.5 + torch.rand(count, 1)))[None]


def test_code_vectors_encode_to_themselves(book):
    codes = torch.arange(SIZE)
    assert torch.equal(book.codes_of(book.vectors_of(codes)), codes)
    assert torch.equal(book.codes_of(7 * book.vectors_of(codes)), codes), "only the direction counts"
    torch.testing.assert_close(book.vectors.norm(dim=-1), torch.ones(SIZE))


def test_nearest_code_is_the_one_of_a_naive_search(book):
    latents = torch.randn(2, 5, WIDTH)
    for latent, code in zip(latents.flatten(0, 1), book.codes_of(latents).flatten(), strict=True):
        cosines = [torch.cosine_similarity(latent, vector, dim=0) for vector in book.vectors]
        assert int(code) == max(range(SIZE), key=lambda i: cosines[i])


def test_nearest_code_is_the_one_of_vector_quantize_pytorch(book):
    oracle = pytest.importorskip("vector_quantize_pytorch").VectorQuantize(
        dim=WIDTH, codebook_size=SIZE, use_cosine_sim=True
    )
    oracle.eval()
    oracle.codebook = book.vectors.clone()
    latents = torch.randn(3, 20, WIDTH)
    quantized, codes, _ = oracle(latents)
    assert torch.equal(book.codes_of(latents), codes)
    torch.testing.assert_close(book.eval()(latents)[0], quantized)


def test_gradient_passes_straight_to_the_directions(book):
    latents, weights = torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)
    gradients = []
    for function in (lambda x: book.eval()(x)[0], unit):
        leaf = latents.clone().requires_grad_()
        (function(leaf) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert not list(book.parameters())


def test_commitment_pulls_a_latent_to_its_code_and_leaves_padding_alone(book):
    latents = torch.randn(1, 4, WIDTH, requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    vectors, _, commitment = book.eval()(latents, mask)
    torch.testing.assert_close(commitment, (unit(latents) - vectors).square().sum(-1)[0, :3].mean())
    commitment.backward()
    assert latents.grad[0, 3].abs().sum() == 0 < latents.grad[0, :3].abs().sum()
    closer = latents.detach() - 0.1 * latents.grad
    assert book(closer, mask)[2] < commitment


def test_evaluation_changes_nothing_and_padding_never_teaches(book):
    before = {name: value.clone() for name, value in book.state_dict().items()}
    book.eval()(torch.randn(1, 9, WIDTH))
    assert all(torch.equal(value, before[name]) for name, value in book.state_dict().items())

    latents, mask = torch.randn(1, 9, WIDTH), torch.tensor([[True] * 6 + [False] * 3])
    states = []
    for padding in (0.0, 100.0):
        torch.manual_seed(3)
        other = Codebook(SIZE, WIDTH).train()
        other(torch.where(mask[..., None], latents, padding), mask)
        states.append(other.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)


def test_first_batch_seeds_every_code_from_latents(book):
    latents = latents_around(unit(torch.randn(3, WIDTH)), 40, noise=0.0)
    book.train()(latents)
    nearest = (book.vectors @ unit(latents[0]).T).amax(dim=1)
    assert bool(book.seeded) and nearest.min() > 0.99


def test_vectors_learn_the_directions_of_the_latents(book):
    centres = unit(torch.randn(SIZE, WIDTH))
    book.train()
    for _ in range(60):
        commitment = book(latents_around(centres, 200))[2]
    found = (centres @ book.vectors.T).amax(dim=1)
    assert found.mean() > 0.95 and found.median() > 0.99  # two close centres may share a code, as in k-means
    assert commitment < 0.1
    assert book.uses.sum().item() == pytest.approx(1, abs=0.2)


def test_dead_codes_come_back(book):
    centres = unit(torch.randn(SIZE, WIDTH))
    book.train()(latents_around(centres, 200))
    dead = torch.arange(SIZE // 2)
    book.vectors[dead] = book.sums[dead] = -unit(centres.mean(dim=0))  # where no latent ever is
    book.uses[dead] = 0.0
    for _ in range(60):
        codes = book(latents_around(centres, 200))[1]
    assert set(dead.tolist()) & set(codes.flatten().tolist())
    assert book.perplexity(codes) > 0.7 * SIZE


def test_learning_repeats_under_the_same_seed():
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        book = Codebook(SIZE, WIDTH).train()
        for _ in range(30):
            book(torch.randn(1, 10, WIDTH))
        states.append(book.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_perplexity_is_between_one_and_the_size(book):
    assert book.perplexity(torch.zeros(50, dtype=torch.long)).item() == pytest.approx(1)
    assert book.perplexity(torch.arange(SIZE)).item() == pytest.approx(SIZE)
    assert 1 <= book.perplexity(torch.randint(SIZE, (2, 30))) <= SIZE
    assert perplexity(torch.tensor([0, 0, 1, 1]), 4).item() == pytest.approx(math.exp(math.log(2)))


def test_statistics_stay_in_single_precision_under_autocast(book):
    with torch.autocast("cpu", torch.bfloat16):
        vectors, _, commitment = book.train()(torch.randn(1, 9, WIDTH, dtype=torch.bfloat16))
    assert {vectors.dtype, commitment.dtype, book.vectors.dtype, book.sums.dtype, book.uses.dtype} == {
        torch.float32
    }


@pytest.mark.parametrize("wrong", [-1, SIZE, SIZE + 2])
def test_special_ids_are_refused_with_a_sentence(book, wrong):
    with pytest.raises(
        InputError, match=rf"^{wrong} is no code of this codec, expected 0 to {SIZE - 1}: .*\.$"
    ):
        book.vectors_of(torch.tensor([[3, wrong]]))


def test_codes_must_be_whole_numbers(book):
    with pytest.raises(InputError, match="whole numbers"):
        book.vectors_of(torch.rand(1, 3))


def test_two_ranks_learn_the_same_book_as_one_process(tmp_path):
    latents, mask = torch.randn(2, 30, WIDTH), torch.ones(2, 30, dtype=torch.bool)
    alone = train_book(latents, mask)
    torch.multiprocessing.spawn(train_rank, (str(tmp_path), latents, mask), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), f"ranks differ in {name}"
    torch.testing.assert_close(ranks[0]["sums"], alone["sums"])


def train_book(latents: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """One update of a book that is seeded already, so that nothing random is in it."""
    torch.manual_seed(2)
    book = Codebook(SIZE, WIDTH).train()
    book.seeded.fill_(True)
    book(latents, mask)
    return book.state_dict()


def train_rank(rank: int, folder: str, latents: torch.Tensor, mask: torch.Tensor) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    state = train_book(latents[rank : rank + 1], mask[rank : rank + 1])
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
