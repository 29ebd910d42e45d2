"""EPE-NAS: Jacobian covariance, class by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .evidence import Evidence
from .jacov import OFFSET, correlation
from .proxy import Proxy, UnavailableError

MANY = 100
"""The number of classes, as the network has logits, up to which the sums of the classes are added."""


@dataclass(frozen=True)
class EpeNas(Proxy):
    """The correlations of the Jacobian's rows within each class, as one number (equations 3 and 4).

    For class c with n samples in the batch, e_c = sum over its [n, n] correlations r of log(|r| + 1e-5). Networks of up
    to 100 classes have sum over c of |e_c|. Networks of more have e_c / n in its place, and the sum over all pairs
    (c, c') of |e_c - e_c'|, divided by the number of classes in the batch.

    Where the paper counts a pair once, its code, NASLib and NAS-Bench-Suite-Zero count it twice, and so does this. As
    in that code, the number of classes is that of the logits; a class of one sample has e_c = log(1 + 1e-5), and with
    more than 100 classes it is left out. The rows are those of `jacov`, in float32; all else is float64. Where all
    pairs of images correlate alike, as in AutoFormer at initialisation, both fall with that correlation and rank alike.
    """

    name: ClassVar[str] = "epe_nas"
    source: ClassVar[str] = "Lopes, Alirezazadeh, Alexandre, ICANN 2021, equations 3 and 4"
    gradient_based: ClassVar[bool] = True

    def value(self, evidence: Evidence) -> float:
        """Returns the value for one network.

        Raises UnavailableError where labels are no classes [S], no class has two samples, a network of more than 100
        classes sees fewer than two such classes, or a row has no correlations.
        """
        network = evidence.network
        labels = _classes(network.labels, len(network.images))
        with torch.no_grad():
            many = network.logits(network.run(network.images[:2])).shape[1] > MANY
        groups = [torch.nonzero(labels == c).flatten() for c in sorted(set(labels.tolist()))]
        if max(len(group) for group in groups) < 2:
            raise UnavailableError("it compares images of one class, and no class has two in the batch; score more")
        if many:
            groups = [group for group in groups if len(group) > 1]
        if many and len(groups) < 2:
            raise UnavailableError("it compares classes with two images or more, and the batch holds only one such")
        jacobian = network.input_jacobian
        sums = torch.stack([(correlation(jacobian[group]).abs() + OFFSET).log().sum() for group in groups])
        if not many:
            return float(sums.abs().sum())
        sums = sums / torch.tensor([len(group) for group in groups], device=sums.device)
        return float((sums[:, None] - sums[None, :]).abs().sum() / len(groups))


def _classes(labels: Any, samples: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or tuple(labels.shape) != (samples,):
        raise UnavailableError("it is defined on integer class labels [S]")
    return labels
