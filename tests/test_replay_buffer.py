"""replay_buffer.py: padding, masks from lengths, nothing dropped."""

from dataclasses import replace

import pytest
import torch

from replay_buffer import Experience, ReplayBuffer, batches, pad_batch
from support.shared_prompts import order_by_prompt

END = PAD = 2  # the same id, and it stands inside the prompts too


def experiences():
    rows = [([7, END, 8], [5, END]), ([7], [5, 6, 9]), ([END, END, 8, 8], [END])]
    made = [
        replace(Experience.of(*row), action_log_probs=-torch.arange(1.0, len(row[1]) + 1))
        for row in rows
    ]
    buffer = ReplayBuffer()
    buffer.fill(made, torch.arange(3.0), torch.arange(3) / 2)
    return buffer.items


def test_padding_layout():
    batch = pad_batch(experiences())
    # `ids != pad` would hide the end tokens, of which every row here has one that is real.
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


def filled(count):
    """A buffer whose items are numbered by their returns, and by half of that as advantages."""
    buffer = ReplayBuffer()
    items = [Experience.of([1], [2] * (i + 1)) for i in range(count)]
    buffer.fill(items, torch.arange(float(count)), torch.arange(float(count)) / 2)
    return buffer


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_mini_batches_hold_everything_once(size):
    """To drop the last, smaller batch loses experiences, and trains nothing at all when the buffer is small."""
    buffer = filled(7)
    found = list(buffer.mini_batches(size, 1, torch.Generator().manual_seed(0)))
    assert sorted(float(e.returns) for batch in found for e in batch) == list(range(7))
    assert all(
        e.num_actions == e.returns + 1 and e.advantages == e.returns / 2
        for batch in found
        for e in batch
    )
    assert all(len(batch) == size for batch in found[:-1])


def test_the_shuffle_is_seeded():
    buffer = filled(50)

    def order(seed, epochs=1):
        generator = torch.Generator().manual_seed(seed)
        return [float(e.returns) for b in buffer.mini_batches(8, epochs, generator) for e in b]

    assert order(1) == order(1) != order(2)
    twice = order(1, epochs=2)
    assert (
        twice[:50] == order(1) and sorted(twice[50:]) == sorted(order(1)) and twice[50:] != order(1)
    )


def test_batches_and_refusals():
    assert [len(b) for b in batches(experiences(), 2)] == [2, 1]
    with pytest.raises(AssertionError, match="at least one sampled token"):
        Experience.of([1, 2], [])
    with pytest.raises(AssertionError, match="a prompt"):
        Experience.of([], [1])
    for counts in ((2, 3), (3, 2)):
        with pytest.raises(ValueError, match="zip"):
            ReplayBuffer().fill(experiences(), *(torch.zeros(n) for n in counts))


def test_filling_forgets_what_was_there():
    buffer = filled(7)
    buffer.fill(experiences()[:1], torch.zeros(1), torch.zeros(1))
    assert [e.sequences.tolist() for e in buffer.items] == [[7, END, 8, 5, END]]
    buffer.fill([], torch.zeros(0), torch.zeros(0))
    assert not list(buffer.mini_batches(4, 2, torch.Generator()))


def test_neighbours_stand_together_and_grow():
    """Two prompts with as many tokens in all are not mixed; the smallest group comes first."""
    rows = [([7, 7], [1] * 3), ([8, 8], [1] * 3), ([7, 7], [1]), ([8, 8], [1]), ([9], [1])]
    assert order_by_prompt([Experience.of(*row) for row in rows]) == [4, 2, 0, 3, 1]
