"""A fingerprint of tensors changes with any byte of them, and with nothing else."""

import pytest
import torch

from ftfast.extension import load_extension
from ftfast.ops.fingerprint import fingerprint

pytestmark = pytest.mark.skipif(load_extension()[0] is None, reason="the extension reads the contents")


@pytest.mark.parametrize("size", [1, 7, 8, 63, 64, 65, 5000, 40001])
def test_every_byte_and_bit_counts(size):
    memory = torch.randint(0, 256, (size,), dtype=torch.uint8)
    found = {fingerprint([memory])}
    places = torch.unique(torch.cat([torch.arange(min(size, 70)), torch.randint(0, size, (70,)), torch.tensor([-1])]))
    for place in places:
        for bit in (1, 128):
            memory[place] ^= bit
            assert fingerprint([memory]) not in found
            memory[place] ^= bit
    assert fingerprint([memory]) in found


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.neg_,
        lambda it: it.mul_(2),
        lambda it: it.zero_(),
        lambda it: it.copy_(it.flip(0).clone()),
        lambda it: it.copy_(it.roll(8192, 1).clone()),
        lambda it: it.view(torch.int64).add_(1),
    ],
    ids=["signs", "exponents", "zeros", "rows change places", "blocks change places", "all words"],
)
def test_changes_to_all_words_do_not_cancel(change):
    tensor = torch.randn(4, 16384)
    before = fingerprint([tensor.clone()])
    change(tensor)
    assert fingerprint([tensor]) != before


def test_values_count_and_places_of_memory_do_not():
    tensor = torch.randn(6, 5, 3, 3)
    threads = torch.get_num_threads()
    expected = fingerprint([tensor, tensor[0]])
    try:
        torch.set_num_threads(1)
        assert fingerprint([tensor.clone(), tensor[0].clone()]) == expected
    finally:
        torch.set_num_threads(threads)
    assert fingerprint([tensor[0], tensor]) != expected
    sparse_rows = torch.zeros(6, 10, 3, 3)[:, ::2].copy_(tensor)
    assert fingerprint([sparse_rows, tensor[0]]) == expected
    assert fingerprint([torch._neg_view(-tensor), tensor[0]]) == expected


def test_what_is_not_in_the_cpus_memory_has_none():
    assert fingerprint([torch.empty(3, device="meta")]) is None
    assert fingerprint([torch.eye(3).to_sparse()]) is None
