"""The sample weight and the mutual-information term, worked out by hand."""

import pytest
import torch

from cbd.losses import Critic, derangement, sample_weight, wasserstein_dependence


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
