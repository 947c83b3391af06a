# SPDX-License-Identifier: Apache-2.0
"""Random ReLU features with minimum-norm least squares: double descent where everything is known.

    φ(x) = √(2/N) max(0, W x̃),   W [N, d] standard normal,   x̃ = (x − mean)/s,   s = mean ‖x − mean‖
    A    = Φ⁺ Y                  (Φ [n, N], Y [n, C] one-hot minus 1/C, Φ⁺ the pseudo-inverse; training set)

Least squares below N = n, interpolation of smallest norm above. At N = n the smallest singular value of Φ is of order
1/n of its neighbors', and test error peaks there whatever the data (Belkin, Hsu, Ma, Mandal 2019; Mei, Montanari 2019).
The Hessian of the loss ‖ΦA − Y‖²/(2n) in each column of A is ΦᵀΦ/n: all its eigenvalues are known, not estimated.
Centering matters: images share a bright mean, half of all features would be dead, and the peak would move to N > n.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvlab.data import Dataset
from curvlab.training.seeding import generator


def inputs(data: Dataset) -> tuple[Tensor, Tensor]:
    """x̃ of the training and of the test set, float64 ``[n, d]``."""
    train, test = (x.flatten(1).double() for x in (data.train_x, data.test_x))
    mean = train.mean(0)
    scale = (train - mean).norm(dim=1).mean()
    return (train - mean) / scale, (test - mean) / scale


def targets(labels: Tensor, num_classes: int) -> Tensor:
    """One-hot minus 1/C, float64 ``[n, C]``."""
    return torch.nn.functional.one_hot(labels, num_classes).double() - 1.0 / num_classes


def sweep(
    data: Dataset, noisy_labels: Tensor, counts: Sequence[int], seed: int
) -> Iterator[tuple[int, dict[str, float], dict[str, float], dict[str, float]]]:
    """For each number of features N: ``(N, curvature, clean, noisy)``.

    The features are nested: those of a smaller N are the first of the larger's. One decomposition serves both label
    sets. curvature: ``lambda_max`` and ``lambda_min`` (over the min(n, N) singular values of Φ) and ``trace`` of ΦᵀΦ/n.
    clean, noisy: ``train_mse`` (mean over samples of ‖ΦA − Y‖²), ``test_mse``, ``test_accuracy`` (true test labels),
    ``norm`` ‖A‖_F.
    """
    train, test = inputs(data)
    drawn = torch.randn(max(counts), train.shape[1], generator=generator(seed, "features"), dtype=torch.float64)
    weights = drawn.to(train.device)
    goal = targets(data.test_y, data.num_classes)
    wanted = torch.cat([targets(labels, data.num_classes) for labels in (data.train_y, noisy_labels)], 1)
    for count in counts:
        factor = (2.0 / count) ** 0.5
        phi, phi_test = (factor * (x @ weights[:count].T).relu() for x in (train, test))
        u, s, vt = torch.linalg.svd(phi, full_matrices=False)
        keep = s > s[0] * max(phi.shape) * torch.finfo(s.dtype).eps  # the pseudo-inverse's usual cut
        u, s, vt = u[:, keep], s[keep], vt[keep]
        solution = vt.T @ ((u.T @ wanted) / s[:, None])
        fitted, told = phi @ solution, phi_test @ solution
        curvature = {
            "lambda_max": (s[0] ** 2).item() / len(train),
            "lambda_min": (s[-1] ** 2).item() / len(train),
            "trace": s.square().sum().item() / len(train),
        }
        clean, noisy = (
            {
                "train_mse": (fitted - wanted)[:, columns].square().sum(1).mean().item(),
                "test_mse": (told[:, columns] - goal).square().sum(1).mean().item(),
                "test_accuracy": (told[:, columns].argmax(1) == data.test_y).double().mean().item(),
                "norm": solution[:, columns].norm().item(),
            }
            for columns in (slice(0, data.num_classes), slice(data.num_classes, None))
        )
        yield count, curvature, clean, noisy
