"""The losses of deconfounded training (Zhang et al., CVPR 2023): the sample weight and the mutual-information term."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def sample_weight(confounder_loss: Tensor, own_loss: Tensor, *, normalise: bool = False) -> Tensor:
    """w = l_b / (l_b + l_c + 1e-8), float [N] in [0, 1]: little for a sample that the confounder finds easy and the model does not.

    Source: Zhang et al., CVPR 2023, section 3 (re-weighting). With `normalise` w is divided by its batch mean, as the released code does.
    No gradient flows through w.
    """
    weight = (confounder_loss / (confounder_loss + own_loss + 1e-8)).detach()
    return weight / weight.mean().clamp_min(1e-8) if normalise else weight


class Critic(nn.Module):
    """T(r, z), a 1-Lipschitz function of a pair of embeddings: spectral norm on every weight, never on a bias, and 1-Lipschitz ReLUs."""

    def __init__(self, confounder_size: int, model_size: int, hidden: int = 128) -> None:
        super().__init__()
        layers = [nn.Linear(confounder_size + model_size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
        # 15 power iterations at each forward: one alone can leave the top singular value well above 1 while the weights move
        self.layers = nn.ModuleList(spectral_norm(layer, n_power_iterations=15) for layer in layers)

    def forward(self, r: Tensor, z: Tensor) -> Tensor:
        """T(r, z): float [N] for r [N, R] and z [N, Z]."""
        x = torch.cat((r, z), 1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x).squeeze(1)


def wasserstein_dependence(critic: Critic, r: Tensor, z: Tensor, derangement: Tensor) -> Tensor:
    """E T(r_i, z_i) - E T(r_i, z_j), a scalar: how far apart the critic holds true pairs and pairs of different samples.

    The critic maximises it on detached embeddings, the model minimises it; at its supremum it is the Wasserstein distance between the
    joint distribution and the product of the margins (Ozair et al., NeurIPS 2019, Wasserstein dependency measure).
    """
    return critic(r, z).mean() - critic(r, z[derangement]).mean()


def derangement(size: int, *, generator: torch.Generator) -> Tensor:
    """A random permutation int64 [size] without a fixed point (size >= 2): a random cycle through all indices."""
    order = torch.randperm(size, generator=generator)
    result = torch.empty_like(order)
    result[order] = order.roll(-1)
    return result
