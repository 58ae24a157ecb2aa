"""Our logits in fp32 after the prompt of the check, with which the peers' logits are compared.

python benchmarks/peers/our_logits.py DIR FILE.npy
"""

import sys

import numpy as np
import torch
from child import CHECK_TOKENS, prompts

from nanohybrid import load


@torch.inference_mode()
def main() -> None:
    model = load(sys.argv[1], dtype=torch.float32)
    ids = torch.tensor(prompts(model.config.vocab_size, 1, CHECK_TOKENS))
    np.save(sys.argv[2], model(ids)[0, -1].numpy())
    print("ok")


if __name__ == "__main__":
    main()
