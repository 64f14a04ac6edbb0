"""How alike two sets of pictures are, by their features: the mathematics of FID, sFID, inception score, precision and recall.

All of it is that of ADM's evaluator (Dhariwal & Nichol 2021, arXiv 2105.05233, ``evaluations/evaluator.py``), by which the
field publishes. Features come in as they are; what the results may be called is decided where they are made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from textok_fast.errors import InputError

SCORE_SPLIT = 5000  # pictures of one inception score; 50,000 give ten, whose mean is published
NEIGHBOURS = 3  # k of precision and recall
ROWS = 2048  # of a matrix of distances at a time


class Gaussian(NamedTuple):
    """What a Fréchet distance knows of a set of features, float64."""

    mean: np.ndarray  # (D,)
    covariance: np.ndarray  # (D, D), of n - 1


def gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance of (B, D), in float64. InputError for fewer than two rows, or rows that are not finite."""
    if features.ndim != 2 or len(features) < 2:
        raise InputError(f"a covariance needs features (B, D) of at least two pictures, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise InputError("the features have NaN or infinite values: the pictures or the network's weights are broken")
    mean = features.mean(dim=0, dtype=torch.float64)  # (D,)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in features.split(4096):  # all of them in float64 at once would be gigabytes
        centred = part.double() - mean
        covariance += centred.T @ centred
    return Gaussian(mean.numpy(), (covariance / (len(features) - 1)).numpy())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6).

    The trace of the root is that of (S1^(1/2) S2 S1^(1/2))^(1/2), which is symmetric: its eigenvalues are real also where the
    covariances are singular, as those of fewer pictures than features are. InputError for features of different numbers.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(f"features of {first.mean.size} and of {second.mean.size} numbers cannot be compared")
    # By torch, whose threads are counted; numpy's wait for each other on a machine that has other work.
    one, other = (torch.from_numpy(each.covariance) for each in (first, second))
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt()  # S1 = root root^T, so root^T S2 root has the eigenvalues of S1 S2
    inner = root.T @ other @ root
    trace = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    difference = first.mean - second.mean
    distance = difference @ difference + float(one.trace() + other.trace() - 2 * trace)
    return max(float(distance), 0.0)  # equal sets may come out at -1e-12


class InceptionScore(NamedTuple):
    """The mean over parts of :data:`SCORE_SPLIT` pictures, their standard deviation, and how many parts."""

    mean: float
    std: float
    splits: int


def inception_score(logits: Tensor, split: int = SCORE_SPLIT) -> InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498) of logits (B, classes), in the order given."""
    if logits.ndim != 2 or not len(logits):
        raise InputError(f"an inception score needs logits (B, classes), got {tuple(logits.shape)}")
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(dim=1)  # (b, classes)
        log_mean = log_p.logsumexp(dim=0) - math.log(len(part))  # (classes,)
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), len(scores))


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float  # of samples that lie in the reference's manifold
    recall: float  # of reference pictures that lie in the samples' manifold


def precision_recall(reference: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991) of features (R, D) and (S, D).

    A set's manifold is the union of balls around its points, each as large as the distance to the point's k-th neighbour in the
    set. ADM's evaluator takes all samples and the 10,000 pictures of the reference batch; it rounds distances to float16, which
    this does not, so the third decimal may differ. InputError for fewer points than a neighbour needs.
    """
    if min(len(reference), len(samples)) <= neighbours:
        raise InputError(
            f"{neighbours} neighbours need more than {neighbours} pictures in each set, got {len(reference)} and {len(samples)}"
        )
    reference_radii, sample_radii = _radii(reference, neighbours), _radii(samples, neighbours)
    within = [
        (distances <= reference_radii).any(dim=1) for distances in (_distances(rows, reference) for rows in samples.split(ROWS))
    ]
    covered = [
        (distances <= sample_radii).any(dim=1) for distances in (_distances(rows, samples) for rows in reference.split(ROWS))
    ]
    return PrecisionRecall(float(torch.cat(within).double().mean()), float(torch.cat(covered).double().mean()))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """The squared distance of each row to its k-th neighbour, itself not counted. (B,)"""
    nearest = (_distances(rows, features).topk(neighbours + 1, largest=False).values for rows in features.split(ROWS))
    return torch.cat([values[:, -1] for values in nearest])


def _distances(rows: Tensor, features: Tensor) -> Tensor:
    """Squared distances (b, B)."""
    products = rows @ features.T
    return (rows.square().sum(1, keepdim=True) - 2 * products + features.square().sum(1)).clamp_min(0)


class CodebookUse(NamedTuple):
    """How much of a codebook the tokens of a set of pictures use."""

    share: float  # of codes that occur at all
    perplexity: float  # exp(entropy of the codes): how many equally frequent codes would be as much
    size: int


def codebook_use(indices: Tensor, size: int) -> CodebookUse:
    """Of code indices (...), int64 in [0, size)."""
    if not indices.numel() or int(indices.min()) < 0 or int(indices.max()) >= size:
        raise InputError(f"code indices must be in [0, {size}), and at least one")
    counts = torch.bincount(indices.flatten(), minlength=size).double()
    p = counts[counts > 0] / counts.sum()
    return CodebookUse(float((counts > 0).double().mean()), float((-(p * p.log()).sum()).exp()), size)
