"""The threads that write shards leave the cores to the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from harvest.background import background


def test_one_core_for_each_writer_and_as_many_as_before_for_everybody_else() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with background(2) as executor:
            assert [executor.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
            assert torch.get_num_threads() == 3
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
