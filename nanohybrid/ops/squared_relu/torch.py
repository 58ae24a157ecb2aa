"""The squared ReLU by torch's relu and square."""

import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 in x's dtype."""
    return F.relu(x).square()
