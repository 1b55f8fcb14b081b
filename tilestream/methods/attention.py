"""Attention over the crops of a photograph (Ilse et al. 2018, gated): one decision from a bag of feature vectors."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Floats = npt.NDArray[np.float32]


class AttentionPooling(nn.Module):
    """Weights the vectors of a bag, sums, classifies: a_k = softmax_k(w (tanh(V h_k) * sigmoid(U h_k))), equation 9."""

    mean: Tensor
    spread: Tensor

    def __init__(self, features: int, hidden: int = 32, num_classes: int = 2) -> None:
        super().__init__()
        self.tanh, self.gate = nn.Linear(features, hidden), nn.Linear(features, hidden)
        self.weight, self.classify = nn.Linear(hidden, 1), nn.Linear(features, num_classes)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    def forward(self, bags: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, num_classes) and attention (N, K) of bags (N, K, features); `there` (N, K) says which are real."""
        h = (bags - self.mean) / self.spread
        scores = self.weight(torch.tanh(self.tanh(h)) * torch.sigmoid(self.gate(h)))[..., 0]
        attention = scores.masked_fill(~there, -torch.inf).softmax(1)
        return self.classify((attention[..., None] * h).sum(1)), attention


@dataclass(frozen=True)
class Bags:
    """Vectors of photographs: `features` (n, d) float32, and for each the number of its bag, from 0 on, ascending."""

    features: Floats
    bag: npt.NDArray[np.int64]

    def padded(self) -> tuple[Tensor, Tensor]:
        """(N, K, d), filled up with zeros, and (N, K), what is no filling."""
        sizes = np.bincount(self.bag)
        place = np.arange(len(self.bag)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        bags = torch.zeros((len(sizes), int(sizes.max()), self.features.shape[1]))
        there = torch.zeros(bags.shape[:2], dtype=torch.bool)
        bags[self.bag, place], there[self.bag, place] = torch.from_numpy(self.features), True
        return bags, there


def fit_attention(
    train: Bags, labels: npt.ArrayLike, validation: Bags, validation_labels: npt.ArrayLike, seed: int = 0,
    steps: int = 300,
) -> AttentionPooling:  # fmt: skip
    """Trains attention on frozen features, both classes weighing alike; the step of the least validation loss is kept.

    All bags at once, AdamW. ValueError unless the training bags are of both classes.
    """
    y, y_validation = torch.as_tensor(np.asarray(labels)), torch.as_tensor(np.asarray(validation_labels))
    counts = torch.bincount(y, minlength=2)
    if len(counts) != 2 or not counts.all():
        raise ValueError(f"attention needs training crops of both classes, got {counts.tolist()} photographs of each")
    weights = len(y) / (2 * counts.float())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AttentionPooling(train.features.shape[1])
    net.mean.copy_(torch.from_numpy(train.features.mean(0)))
    net.spread.copy_(torch.from_numpy(train.features.std(0)).clamp(min=1e-6))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    bags, there = train.padded()
    held_out = validation.padded()
    best, least = copy.deepcopy(net.state_dict()), float("inf")
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(bags, there)[0], y, weights).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            loss = float(cross_entropy(net(*held_out)[0], y_validation, weights))
        if loss < least:
            best, least = copy.deepcopy(net.state_dict()), loss
    net.load_state_dict(best)
    return net.eval()


def attend(net: AttentionPooling, bags: Bags) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The probability of the second class of each bag, (N,), and each vector's share of attention, (n,)."""
    padded, there = bags.padded()
    with torch.inference_mode():
        logits, attention = net(padded, there)
    return logits.double().softmax(1)[:, 1].numpy(), attention[there].double().numpy()
