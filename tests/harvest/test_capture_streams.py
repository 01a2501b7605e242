"""Copies to the host wait for the stream that carries them, also where the current device is another GPU.

No GPU is needed: streams are queues, and a copy is done when somebody waits for its stream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harvest.capture import HostCopies
from matryoshka.devices import resolve_device

MODELS_DEVICE = torch.device("cuda:1")


class Stream:
    """A queue of work, done in order when somebody waits."""

    def __init__(self) -> None:
        self._todo: list[Callable[[], object]] = []
        self.n_issued = 0
        self._n_done = 0

    def issue(self, work: Callable[[], object]) -> None:
        self._todo.append(work)
        self.n_issued += 1

    def wait_for(self, n: int) -> None:
        """Until the first `n` pieces of work are done."""
        for work in self._todo[: n - self._n_done]:
            work()
        self._todo, self._n_done = self._todo[max(0, n - self._n_done) :], max(n, self._n_done)


class Cuda:
    """What torch.cuda says and does with two devices, of which the first is current until someone sets it."""

    def __init__(self) -> None:
        self.streams = (Stream(), Stream())
        self.current = 0

    def current_stream(self, device: torch.device | None = None) -> Stream:
        index = self.current if device is None or device.index is None else device.index
        return self.streams[index]

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None
        self.current = device.index

    def event(self) -> Event:
        return Event(self)


class Event:
    """As torch.cuda.Event: recorded with no stream, it is recorded on that of the CURRENT device."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda

    def record(self, stream: Stream | None = None) -> None:
        self._stream = self._cuda.current_stream() if stream is None else stream
        self._n_before = self._stream.n_issued

    def synchronize(self) -> None:
        self._stream.wait_for(self._n_before)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Two devices, and host memory that need not be pinned."""
    stub, empty = Cuda(), torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:  # noqa: ARG001
        return empty(*size, **options)

    monkeypatch.setattr(torch.cuda, "Event", stub.event)
    monkeypatch.setattr(torch.cuda, "current_stream", stub.current_stream)
    monkeypatch.setattr(torch.cuda, "set_device", stub.set_device)
    monkeypatch.setattr(torch, "empty", unpinned)
    return stub


def on_second_gpu(values: Tensor, cuda: Cuda) -> Tensor:
    """The same values, as a tensor that says it is on cuda:1 and is copied when its stream gets to it."""

    class OnSecondGpu(Tensor):
        is_cuda = True
        device = MODELS_DEVICE

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.copy_ and (kwargs or {}).get("non_blocking"):
                into, source = args
                cuda.streams[1].issue(lambda: into.copy_(source.as_subclass(Tensor)))
                return into
            return super().__torch_function__(func, types, args, kwargs or {})

    return values.as_subclass(OnSecondGpu)


@pytest.mark.parametrize("current", [0, 1])
def test_the_last_batch_is_not_that_of_before(cuda: Cuda, current: int) -> None:
    cuda.current = current
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(3, 5, 7, generator=generator) for _ in range(5)]
    shard = torch.zeros(5, 15, 7, dtype=torch.bfloat16)
    copies = HostCopies(staged=True)
    for number, values in enumerate(batches):
        copies.put(on_second_gpu(values, cuda), shard[:, 3 * number : 3 * number + 3])
        copies.next_batch()
    copies.finish()
    assert torch.equal(shard, torch.cat(batches).transpose(0, 1).bfloat16())


def test_the_device_of_a_process_is_its_current_one(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not told a device, as an event or a collective, then takes the one that was asked for."""
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # both devices exist
    assert resolve_device("cuda:1") == MODELS_DEVICE
    assert cuda.current == 1
    resolve_device("cuda")  # whichever is current
    assert cuda.current == 1
