"""Who uses which block of the cache, and which prefixes are known."""

import numpy as np
from raylign.rollout.native.blocks import BLOCK, BlockPool, prefix_keys


def test_a_block_is_free_when_its_last_user_leaves():
    pool = BlockPool(2)
    block = pool.take()
    assert pool.free == 1
    pool.share(block)
    pool.release(block)
    assert pool.free == 1
    pool.release(block)
    assert pool.free == 2


def test_a_known_prefix_outlives_its_users_until_the_block_is_needed():
    pool = BlockPool(3)
    old, new, blank = pool.take(), pool.take(), pool.take()
    pool.remember(old, b"old")
    pool.remember(new, b"new")
    for block in (old, new, blank):
        pool.release(block)
    assert pool.take() == blank  # what nobody knows goes first, then the oldest prefix
    assert pool.find(b"new") == new
    assert pool.take() == old
    assert pool.find(b"old") is None
    pool.forget()
    assert pool.find(b"new") is None


def test_of_two_blocks_with_one_content_the_first_is_kept():
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.remember(first, b"same")
    pool.remember(second, b"same")
    pool.release(second)
    assert pool.find(b"same") == first


def test_a_key_stands_for_all_tokens_up_to_its_block_and_the_adapter():
    prompt = np.arange(3 * BLOCK, dtype=np.int32)
    keys = list(prefix_keys(prompt, None))
    assert len(keys) == 2  # the last token is always computed
    assert len(list(prefix_keys(np.arange(3 * BLOCK + 1), None))) == 3
    assert keys == list(prefix_keys(prompt.astype(np.int64), None))
    changed = prompt.copy()
    changed[0] += 1
    assert not set(keys) & set(prefix_keys(changed, None))
    assert not set(keys) & set(prefix_keys(prompt, "adapter"))
    changed = prompt.copy()
    changed[BLOCK] += 1
    first, second = prefix_keys(changed, None)
    assert first == keys[0]
    assert second != keys[1]
