"""How tightly the outputs of a class lie together, and how far from those of other classes; every exit by itself.

With P the softmax output of an image of class y, pi_y the share of the class and Q_y the mean output of the class:

    CMI    I(X; Yhat | Y) = sum_y pi_y E[ KL(P || Q_y) | y ] = sum_y pi_y H(Q_y) - E H(P)
    Gamma  E[ 1{y != v} H(P, P') ], the cross-entropy between the outputs of two independent images of classes y, v
           = - sum_{y != v} pi_y pi_v S_y . L_v, with S_y and L_v the class means of P and of ln P
    NCMI   CMI / Gamma

E.-H. Yang, S. M. Hamidi, L. Ye, R. Tan, B. Yang: conditional mutual information constrained deep learning, arXiv
2309.09123. Certain: CMI, its centroids, NCMI as the ratio. A reading: Gamma's definition, of which the authors'
public code has the estimate over a batch. Logarithms are natural: nats. One pass and E x C x C numbers suffice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mexit.train.distributed import SINGLE_PROCESS, ProcessGroup

FLOOR = 1e-8  # of a probability inside a logarithm, as in the authors' code


class ClassStatistics:
    """Sums over images from which centroids, CMI, Gamma and NCMI follow; float64.

    Args:
        exits, classes: E and C.
        device: where the sums lie.
    """

    def __init__(self, exits: int, classes: int, device: str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.counts = zeros(classes)
        self.outputs = zeros(exits, classes, classes)
        self.log_outputs = zeros(exits, classes, classes)
        self.entropy = zeros(exits)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in logits (E, B, C) of images of the classes (B,); no gradient flows."""
        logs = logits.detach().double().log_softmax(dim=-1)
        outputs = logs.exp()
        members = torch.nn.functional.one_hot(labels, len(self.counts)).double()
        self.counts += members.sum(dim=0)
        self.outputs += members.T @ outputs
        self.log_outputs += members.T @ logs.clamp_min(math.log(FLOOR))
        self.entropy -= (outputs * logs).sum(dim=(1, 2))

    def merge(self, other: ClassStatistics) -> None:
        """Take in what another one has taken in."""
        for name, value in self.state().items():
            value += other.state()[name]

    def pooled(self, team: ProcessGroup) -> ClassStatistics:
        """What all processes of a team have taken in together."""
        if team.size == 1:
            return self
        pooled = ClassStatistics(len(self.entropy), len(self.counts), str(self.counts.device))
        mine = self.state()
        pooled.load(dict(zip(mine, team.sum(list(mine.values())), strict=True)))
        return pooled

    def shares(self) -> Tensor:
        """pi, (C,)."""
        return self.counts / self.counts.sum()

    def centroids(self) -> Tensor:
        """Q, (E, C, C): row y is the mean output on images of class y; uniform for a class that was not seen."""
        means = self._means(self.outputs)
        return torch.where(self.counts[:, None] > 0, means, torch.full_like(means, 1 / len(self.counts)))

    def cmi(self) -> Tensor:
        """CMI of every exit, (E,), at least 0 but for rounding."""
        centroids = self.centroids()
        of_centroids = -torch.xlogy(centroids, centroids).sum(dim=-1)
        return of_centroids @ self.shares() - self.entropy / self.counts.sum()

    def gamma(self) -> Tensor:
        """Gamma of every exit, (E,)."""
        shares = self.shares()
        crossed = -self._means(self.outputs) @ self._means(self.log_outputs).mT
        pairs = torch.outer(shares, shares).fill_diagonal_(0)
        return (crossed * pairs).sum(dim=(1, 2))

    def ncmi(self) -> Tensor:
        """CMI / Gamma of every exit, (E,)."""
        return self.cmi() / self.gamma()

    def state(self) -> dict[str, Tensor]:
        """The sums, for a checkpoint."""
        return {
            "counts": self.counts,
            "outputs": self.outputs,
            "log_outputs": self.log_outputs,
            "entropy": self.entropy,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, value in self.state().items():
            value.copy_(state[name])

    def _means(self, sums: Tensor) -> Tensor:
        return sums / self.counts.clamp_min(1)[:, None]


def kl_to_centroids(logits: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """KL( P || Q_y ) of every exit and image; its mean is CMI where Q are the class means, and more elsewhere.

    Args:
        logits: (E, B, C); the gradient flows here alone.
        centroids: Q, (E, C, C), rows sum to 1; floored at `FLOOR`.
        labels: (B,) int64.

    Returns:
        (E, B), nats.
    """
    logs = logits.float().log_softmax(dim=-1)
    references = centroids.detach().to(logs.dtype).clamp_min(FLOOR).log()[:, labels]
    return (logs.exp() * (logs - references)).sum(dim=-1)


def cross_entropy_to_other_classes(logits: Tensor, labels: Tensor, team: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """What every image adds to Gamma_B, the estimate of Gamma over a batch; the mean over images is Gamma_B.

    Gamma_B is the mean of H(P_i, P_j) over the ordered pairs of different classes. It is larger than Gamma, which
    counts pairs of one class as 0, by 1 / (1 - sum_y pi_y^2). As in the authors' code no gradient flows through
    P_j, whose logarithm is floored at ln `FLOOR`. Sums over each class are all that is needed of the other images.

    Args:
        logits: (E, B, C).
        labels: (B,) int64.
        team: the processes that have a share of the batch each.

    Returns:
        (E, B), nats; 0 where the batch has one class only.
    """
    logs = logits.float().log_softmax(dim=-1)
    members = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logs.dtype)
    mine = members.sum(dim=0), members.T @ logs.detach().clamp_min(math.log(FLOOR))
    counts, log_outputs = team.sum(mine)  # (C,), (E, C, C)
    others = log_outputs.sum(dim=1, keepdim=True) - log_outputs
    pairs = counts.sum() ** 2 - counts.square().sum()
    return -(logs.exp() * others[:, labels]).sum(dim=-1) * (counts.sum() / pairs.clamp_min(1))
