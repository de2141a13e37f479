"""Conditional mutual information of a network's outputs: concentration within classes, separation between them.

Every exit is measured separately. With P the softmax output of an image of class y, pi_y the share of the class and
Q_y the mean output of the class (its centroid):

    CMI    I(X; Yhat | Y) = sum_y pi_y E[ KL(P || Q_y) | y ] = sum_y pi_y H(Q_y) - E H(P)
    Gamma  E[ 1{y != v} H(P, P') ], the cross-entropy between the outputs of two independent images of classes y, v
           = - sum_{y != v} pi_y pi_v S_y . L_v, with S_y and L_v the class means of P and of ln P
    NCMI   CMI / Gamma

E.-H. Yang, S. M. Hamidi, L. Ye, R. Tan, B. Yang: conditional mutual information constrained deep learning, arXiv
2309.09123. Published: CMI, its centroids, and NCMI as the ratio. Our reading: the definition of Gamma, of which the
authors' code has the estimate over a batch. Logarithms are natural, so the unit is nats. One pass over the images
and E x C x C numbers are enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup

FLOOR = 1e-8  # smallest probability inside a logarithm, as in the authors' code


class ClassStatistics:
    """Float64 sums over images, from which centroids, CMI, Gamma and NCMI follow.

    Args:
        exits, classes: E and C.
        device: the torch device of the sums.
    """

    def __init__(self, exits: int, classes: int, device: str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.counts = zeros(classes)
        self.outputs = zeros(exits, classes, classes)
        self.log_outputs = zeros(exits, classes, classes)
        self.entropy = zeros(exits)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add images with logits (E, B, C) and classes (B,); no gradient flows."""
        logs = logits.detach().double().log_softmax(dim=-1)
        outputs = logs.exp()
        members = torch.nn.functional.one_hot(labels, len(self.counts)).double()
        self.counts += members.sum(dim=0)
        self.outputs += members.T @ outputs
        self.log_outputs += members.T @ logs.clamp_min(math.log(FLOOR))
        self.entropy -= (outputs * logs).sum(dim=(1, 2))

    def merge(self, other: ClassStatistics) -> None:
        """Add the images of other statistics."""
        for name, value in self.state_dict().items():
            value += other.state_dict()[name]

    def summed_over(self, process_group: ProcessGroup) -> ClassStatistics:
        """The statistics of the images of all processes."""
        if process_group.size == 1:
            return self
        total = ClassStatistics(len(self.entropy), len(self.counts), str(self.counts.device))
        own = self.state_dict()
        total.load_state_dict(dict(zip(own, process_group.sum(list(own.values())), strict=True)))
        return total

    def class_shares(self) -> Tensor:
        """pi, (C,)."""
        return self.counts / self.counts.sum()

    def centroids(self) -> Tensor:
        """Q, (E, C, C): row y is the mean output on images of class y; uniform for a class without images."""
        means = self._means(self.outputs)
        return torch.where(self.counts[:, None] > 0, means, torch.full_like(means, 1 / len(self.counts)))

    def cmi(self) -> Tensor:
        """CMI of every exit, (E,), at least 0 up to rounding."""
        centroids = self.centroids()
        entropy_of_centroids = -torch.xlogy(centroids, centroids).sum(dim=-1)
        return entropy_of_centroids @ self.class_shares() - self.entropy / self.counts.sum()

    def gamma(self) -> Tensor:
        """Gamma of every exit, (E,)."""
        shares = self.class_shares()
        cross_entropy = -self._means(self.outputs) @ self._means(self.log_outputs).mT
        pairs = torch.outer(shares, shares).fill_diagonal_(0)
        return (cross_entropy * pairs).sum(dim=(1, 2))

    def ncmi(self) -> Tensor:
        """CMI / Gamma of every exit, (E,)."""
        return self.cmi() / self.gamma()

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint."""
        return {
            "counts": self.counts,
            "outputs": self.outputs,
            "log_outputs": self.log_outputs,
            "entropy": self.entropy,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def _means(self, sums: Tensor) -> Tensor:
        return sums / self.counts.clamp_min(1)[:, None]


def kl_to_centroids(logits: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """KL( P || Q_y ) of every exit and image. Its mean is CMI if Q are the class means, and larger otherwise.

    Args:
        logits: (E, B, C); the gradient flows through them alone.
        centroids: Q, (E, C, C); rows sum to 1, values below `FLOOR` count as `FLOOR`.
        labels: (B,) int64.

    Returns:
        (E, B), nats.
    """
    logs = logits.float().log_softmax(dim=-1)
    references = centroids.detach().to(logs.dtype).clamp_min(FLOOR).log()[:, labels]
    return (logs.exp() * (logs - references)).sum(dim=-1)


def cross_entropy_to_other_classes(
    logits: Tensor, labels: Tensor, process_group: ProcessGroup = SINGLE_PROCESS
) -> Tensor:
    """The contribution of every image to Gamma_B, the estimate of Gamma over a batch; their mean is Gamma_B.

    Gamma_B is the mean of H(P_i, P_j) over the ordered pairs of different classes. It is larger than Gamma, which
    counts pairs of one class as 0, by the factor 1 / (1 - sum_y pi_y^2). As in the authors' code no gradient flows
    through P_j, and its logarithm is at least ln `FLOOR`. Of the other images only the sums over each class enter.

    Args:
        logits: (E, B, C).
        labels: (B,) int64.
        process_group: the processes that share the batch.

    Returns:
        (E, B), nats; 0 in a batch of one class.
    """
    logs = logits.float().log_softmax(dim=-1)
    members = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logs.dtype)
    own = members.sum(dim=0), members.T @ logs.detach().clamp_min(math.log(FLOOR))
    counts, log_outputs = process_group.sum(own)  # (C,), (E, C, C)
    others = log_outputs.sum(dim=1, keepdim=True) - log_outputs
    pairs = counts.sum() ** 2 - counts.square().sum()
    return -(logs.exp() * others[:, labels]).sum(dim=-1) * (counts.sum() / pairs.clamp_min(1))
