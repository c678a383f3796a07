"""The losses of deconfounded training (Zhang et al., CVPR 2023): the sample weight and the mutual-information term."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, register_parametrization


def sample_weight(confounder_loss: Tensor, own_loss: Tensor, *, normalise: bool = False) -> Tensor:
    """w = l_b / (l_b + l_c + 1e-8), float [N] in [0, 1]: little for a sample that the confounder finds easy and the model does not.

    Source: Zhang et al., CVPR 2023, section 3 (re-weighting). With `normalise` w is divided by its batch mean, as the released code does.
    No gradient flows through w.
    """
    weight = (confounder_loss / (confounder_loss + own_loss + 1e-8)).detach()
    return weight / weight.mean().clamp_min(1e-8) if normalise else weight


class UnitSpectralNorm(nn.Module):
    """A weight divided by its largest singular value, exactly.

    The usual power iteration follows the weight by one step at a time: after 100 Adam steps it was up to 5 % off, and 2 % with 15
    iterations a step. For matrices this small the exact norm costs no more.
    """

    def forward(self, weight: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(weight, 2)
        return weight / norm


class Critic(nn.Module):
    """T(r, z), a 1-Lipschitz function of a pair of embeddings: unit spectral norm of every weight, never of a bias, and ReLUs."""

    def __init__(self, confounder_size: int, model_size: int, hidden: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(confounder_size + model_size, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
        for layer in layers:
            register_parametrization(layer, "weight", UnitSpectralNorm())
        self.layers = nn.ModuleList(layers)

    def forward(self, r: Tensor, z: Tensor) -> Tensor:
        """T(r, z): float [N] for r [N, R] and z [N, Z]."""
        x = torch.cat((r, z), 1)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        values: Tensor = self.layers[-1](x).squeeze(1)
        return values


def wasserstein_dependence(critic: Critic, r: Tensor, z: Tensor, derangement: Tensor) -> Tensor:
    """E T(r_i, z_i) - E T(r_i, z_j), a scalar: how far apart the critic holds true pairs and pairs of different samples.

    The critic maximises it on detached embeddings, the model minimises it; at its supremum it is the Wasserstein distance between the
    joint distribution and the product of the margins (Ozair et al., NeurIPS 2019, Wasserstein dependency measure).
    """
    with cached():  # one norm for both passes
        return critic(r, z).mean() - critic(r, z[derangement]).mean()  # type: ignore[no-any-return]


def distance_correlation(r: Tensor, z: Tensor) -> Tensor:
    """Squared sample distance correlation of r [N, R] and z [N, Z], a scalar in [0, 1]: 0 only if they are independent, in the limit.

    Source: Szekely, Rizzo and Bakirov, Annals of Statistics 2007. It needs no critic.
    """
    of_r, of_z = _double_centred(torch.cdist(r, r)), _double_centred(torch.cdist(z, z))
    spread = (of_r.square().mean() * of_z.square().mean()).sqrt()
    return (of_r * of_z).mean() / spread.clamp_min(1e-8)


def hsic(r: Tensor, z: Tensor) -> Tensor:
    """Normalised Hilbert-Schmidt independence criterion of r [N, R] and z [N, Z], a scalar in [0, 1], with Gaussian kernels.

    Source: Gretton et al., ALT 2005; each kernel's width is the median distance of the batch. It needs no critic.
    """
    of_r, of_z = _double_centred(_gaussian(r)), _double_centred(_gaussian(z))
    spread = (of_r.square().mean() * of_z.square().mean()).sqrt()
    return (of_r * of_z).mean() / spread.clamp_min(1e-8)


def _gaussian(x: Tensor) -> Tensor:
    squared = torch.cdist(x, x).square()
    return torch.exp(-squared / (2 * squared.detach().median().clamp_min(1e-8)))


def _double_centred(matrix: Tensor) -> Tensor:
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def derangement(size: int, *, generator: torch.Generator) -> Tensor:
    """A random permutation int64 [size] without a fixed point (size >= 2): a random cycle through all indices."""
    order = torch.randperm(size, generator=generator)
    result = torch.empty_like(order)
    result[order] = order.roll(-1)
    return result
