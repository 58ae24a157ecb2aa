import pytest
import torch

from nanohybrid.config import HybridConfig
from nanohybrid.model.cache import HybridCache

CONFIG = HybridConfig(
    pattern="M-*M*", vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
    mamba_num_heads=2, mamba_head_dim=4, n_groups=1, ssm_state_size=8,
)  # fmt: skip


def filled(state):
    for pool in (*state.slot_pools, *state.page_pools):
        pool.copy_(torch.randn(pool.shape))
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_comes_back_bit_for_bit_in_another_place_and_nowhere_else(dtype):
    state = filled(HybridCache.allocate(CONFIG, slots=3, pages=7, page_size=4, dtype=dtype))
    saved = state.save(1, (5, 2, 0))
    old = [pool.clone() for pool in (*state.slot_pools, *state.page_pools)]
    filled(state)
    new = [pool.clone() for pool in (*state.slot_pools, *state.page_pools)]
    state.load(saved, 0, (6, 3, 1, 4))
    moved = {True: {0: 1}, False: {6: 5, 3: 2, 1: 0}}  # place: where it stood
    for index, pool in enumerate((*state.slot_pools, *state.page_pools)):
        places = moved[index < len(state.slot_pools)]
        for row in range(len(pool)):
            wanted = old[index][places[row]] if row in places else new[index][row]
            assert torch.equal(pool[row], wanted)


def test_pages_that_were_copied_already_are_not_copied_again():
    state = filled(HybridCache.allocate(CONFIG, slots=1, pages=3, page_size=4))
    first = state.save(0, (2,))
    both = state.save(0, (2, 1), first.pages)
    assert both.pages[0] is first.pages[0] and len(both.pages) == 2
    assert torch.equal(both.pages[1][0], state.page_pools[0][1])
