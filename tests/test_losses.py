"""The sample weight and the mutual-information term, worked out by hand."""

from collections.abc import Callable

import pytest
import torch

from cbd.losses import Critic, derangement, distance_correlation, hsic, sample_weight, wasserstein_dependence

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def test_the_weight_is_worked_out_by_hand() -> None:
    weight = sample_weight(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([3.0, 2.0, 1.0]))
    assert weight.tolist() == pytest.approx([0.25, 0.0, 0.75])


def test_the_normalised_weight_has_mean_one_and_keeps_proportions() -> None:
    weight = sample_weight(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0]), normalise=True)
    assert weight.tolist() == pytest.approx([0.5, 1.5])


def test_no_gradient_flows_through_the_weight() -> None:
    own = torch.tensor([1.0, 2.0], requires_grad=True)
    (sample_weight(torch.ones(2), own) * own).sum().backward()
    assert own.grad is not None
    assert own.grad.tolist() == pytest.approx([1 / 2, 1 / 3])


def trained_critic() -> Critic:
    torch.manual_seed(0)
    critic = Critic(8, 8)
    optimizer, generator = torch.optim.Adam(critic.parameters(), lr=0.05), torch.Generator().manual_seed(0)
    r = torch.randn(64, 8)
    for _ in range(100):
        optimizer.zero_grad()
        (-wasserstein_dependence(critic, r, r + 0.1 * torch.randn(64, 8), derangement(64, generator=generator))).backward()
        optimizer.step()
    return critic


def test_the_trained_critic_is_one_lipschitz() -> None:
    critic = trained_critic()
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) for layer in critic.layers]
    assert max(norms) <= 1 + 1e-3
    a, b = torch.randn(500, 16), torch.randn(500, 16)
    with torch.no_grad():
        slopes = (critic(a[:, :8], a[:, 8:]) - critic(b[:, :8], b[:, 8:])).abs() / (a - b).norm(dim=1)
    assert float(slopes.max()) <= 1 + 1e-3


def test_the_trained_critic_tells_dependent_embeddings_from_independent_ones() -> None:
    critic, generator = trained_critic(), torch.Generator().manual_seed(1)
    r, others = torch.randn(2000, 8), derangement(2000, generator=generator)
    with torch.no_grad():
        dependent = float(wasserstein_dependence(critic, r, r, others))
        independent = float(wasserstein_dependence(critic, r, torch.randn(2000, 8), others))
    assert dependent > 10 * abs(independent)


@pytest.mark.parametrize("size", [2, 3, 64])
def test_a_derangement_moves_every_index(size: int) -> None:
    for seed in range(20):
        moved = derangement(size, generator=torch.Generator().manual_seed(seed))
        assert sorted(moved.tolist()) == list(range(size))
        assert not (moved == torch.arange(size)).any()


def test_the_distance_correlation_of_three_numbers_is_worked_out_by_hand() -> None:
    """x = 0, 1, 2 and y = 0, 1, 0.

    a = |x_i - x_j| has row means 1, 2/3, 1 and mean 8/9; b = |y_i - y_j| has row means 1/3, 2/3, 1/3 and mean 4/9.
    A = [[-10, 2, 8], [2, -4, 2], [8, 2, -10]] / 9 and B = [[-2, 4, -2], [4, -8, 4], [-2, 4, -2]] / 9.
    sum AB = (20 + 8 - 16 + 8 + 32 + 8 - 16 + 8 + 20) / 81 = 72 / 81, sum AA = 360 / 81, sum BB = 144 / 81; 72 / sqrt(360 * 144) = 0.3162.
    """
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [0.0]])
    assert float(distance_correlation(x, y)) == pytest.approx(72 / (360 * 144) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("measure", [distance_correlation, hsic])
def test_a_statistic_of_dependence_is_one_for_equal_and_small_for_independent_embeddings(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    r, z = (torch.randn(400, 4, generator=generator) for _ in range(2))
    assert float(measure(r, r)) == pytest.approx(1, abs=1e-4)
    assert float(measure(r, z)) < 0.1 < 0.5 < float(measure(r, r + 0.3 * z))


@pytest.mark.parametrize("measure", [distance_correlation, hsic])
def test_a_statistic_of_dependence_has_finite_gradients(measure: Measure) -> None:
    generator = torch.Generator().manual_seed(0)
    r, z = torch.randn(16, 4, generator=generator), torch.randn(16, 4, generator=generator).requires_grad_()
    measure(r, z).backward()
    assert z.grad is not None and torch.isfinite(z.grad).all() and z.grad.abs().max() > 0
