"""A draw's first two moments against the dense Gaussian's."""

from __future__ import annotations

import torch
from torch import Tensor

from abmll.draws import Signs, draw_factors, draw_signs
from abmll.layers import VariationalLinear
from abmll.posterior import Family, LayerPosterior, Posterior, PosteriorConfig, mean, standard_deviation
from tests.abmll.conftest import random_layer

DRAWS = 200_000


def covariance(layer: LayerPosterior, x: Tensor, y: Tensor) -> Tensor:
    """Cov[dW x, dW y] of independent Gaussian entries, of dW or of the core: in these, sum_j S_ij^2 x_j y_j."""
    variance = standard_deviation(layer) ** 2
    if layer.core is None:
        return torch.diag(variance @ (x * y))
    return layer.b @ torch.diag(variance @ ((layer.a @ x) * (layer.a @ y))) @ layer.b.T


def test_updates_have_the_dense_gaussians_mean_and_covariances(family: Family) -> None:
    layer = random_layer(family, 4, 6, 3)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    signs = Signs(*(torch.randint(0, 2, (DRAWS, n), generator=generator).double() * 2 - 1 for n in layer.noise_shape))
    linear = VariationalLinear(torch.nn.Linear(6, 4, bias=False, dtype=torch.float64))
    linear.posterior, linear.signs = layer, signs
    with torch.no_grad():
        z = linear(torch.stack([x, y]).expand(DRAWS, 2, 6)) - linear.base(torch.stack([x, y]))
    of_x, of_y = z[:, 0], z[:, 1]
    deviation = covariance(layer, x, x).diagonal().sqrt()
    torch.testing.assert_close(of_x.mean(0), mean(layer) @ x, atol=float(5 * deviation.max() / DRAWS**0.5), rtol=0)
    joint = torch.cov(torch.cat([of_x, of_y], 1).T)
    expected = torch.cat(
        [
            torch.cat([covariance(layer, x, x), covariance(layer, x, y)], 1),
            torch.cat([covariance(layer, y, x), covariance(layer, y, y)], 1),
        ]
    )
    torch.testing.assert_close(joint, expected, atol=0.01 * float(expected.abs().max()), rtol=0)


def test_stored_draws_entries_are_the_mean_plus_or_minus_the_deviation(family: Family) -> None:
    posterior = Posterior(PosteriorConfig(base_model="x"), {"layer": random_layer(family, 5, 7, 1)})
    layer = posterior.layers["layer"]
    updates: list[Tensor] = []
    for index in range(400):
        a, b = draw_factors(layer, draw_signs(posterior, 0, 2 * index)["layer"])
        updates.append(b @ a - mean(layer) if layer.core is None else torch.linalg.pinv(layer.b) @ b - layer.core)
    stacked = torch.stack(updates)
    torch.testing.assert_close(stacked.abs(), standard_deviation(layer).expand_as(stacked))
    share = (stacked > 0).double().mean(0)
    assert (share - 0.5).abs().max() < 5 * 0.5 / 400**0.5
