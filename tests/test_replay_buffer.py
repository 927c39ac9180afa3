"""replay_buffer.py: padding, masks from lengths, nothing dropped."""

import pytest
import torch

from replay_buffer import Experience, ReplayBuffer, batches, neighbours, pad_batch

END = PAD = 2  # the same id, and it stands inside the prompts too


def experiences():
    rows = [([7, END, 8], [5, END]), ([7], [5, 6, 9]), ([END, END, 8, 8], [END])]
    made = [Experience.of(p, c, returns=float(i), advantage=i / 2) for i, (p, c) in enumerate(rows)]
    return [
        Experience(**{**vars(e), "action_log_probs": -torch.arange(1.0, e.num_actions + 1)})
        for e in made
    ]


def test_padding_layout():
    batch = pad_batch(experiences())
    # Faults 1 and 2: `ids != pad` would hide the end tokens, of which every row here has one that is real.
    assert batch.sequences.tolist() == [
        [0, 7, 2, 8, 5, 2, 0],
        [0, 0, 0, 7, 5, 6, 9],
        [2, 2, 8, 8, 2, 0, 0],
    ]
    assert batch.attention_mask.int().tolist() == [
        [0, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0],
    ]
    assert batch.action_mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch.action_log_probs.tolist() == [[-1, -2, 0], [-1, -2, -3], [-1, 0, 0]]
    assert batch.advantages.tolist() == [0, 0.5, 1] and batch.returns.tolist() == [0, 1, 2]
    assert batch.log_probs_ref is None


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_mini_batches_hold_everything_once(size):
    """Fault 13: drop_last loses up to a batch of experiences a step, and trains nothing when the buffer is small."""
    buffer = ReplayBuffer()
    for i in range(7):
        buffer.append(Experience.of([1], [2] * (i + 1), returns=float(i), advantage=0.0))
    found = list(buffer.mini_batches(size, torch.Generator().manual_seed(0)))
    assert sorted(float(e.returns) for batch in found for e in batch) == list(range(7))
    assert all(len(batch) == size for batch in found[:-1])


def test_the_shuffle_is_seeded():
    buffer = ReplayBuffer()
    for i in range(50):
        buffer.append(Experience.of([1], [2], returns=float(i), advantage=0.0))

    def order(seed):
        return [
            float(e.returns)
            for b in buffer.mini_batches(8, torch.Generator().manual_seed(seed))
            for e in b
        ]

    assert order(1) == order(1) != order(2)


def test_batches_and_refusals():
    assert [len(b) for b in batches(experiences(), 2)] == [2, 1]
    with pytest.raises(AssertionError, match="at least one sampled token"):
        ReplayBuffer().append(Experience.of([1, 2], [], returns=0.0, advantage=0.0))
    with pytest.raises(AssertionError, match="single completions"):
        ReplayBuffer().append(pad_batch(experiences()))


def test_neighbours_stand_together_and_grow():
    """Two prompts with as many tokens in all are not mixed; the smallest group comes first."""
    rows = [([7, 7], [1] * 3), ([8, 8], [1] * 3), ([7, 7], [1]), ([8, 8], [1]), ([9], [1])]
    found = neighbours([Experience.of(*row, 0.0, 0.0) for row in rows])
    assert found == [4, 2, 0, 3, 1]
