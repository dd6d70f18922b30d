"""Data ahead of the device: in order, one step ahead, thrown away where the plan changes, and copied without waiting."""

import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqlen_curriculum.errors import DataError
from seqlen_curriculum.training.prefetch import Prefetcher, to_device

CPU = torch.device("cpu")


class Reads:
    """Notes what is read and in which thread.

    A step in ``broken`` is an error. One in ``held`` sets ``reading`` and waits for ``go``.
    """

    def __init__(self, broken=(), held=()):
        self.broken, self.held, self.go, self.reading = broken, held, threading.Event(), threading.Event()
        self.begun, self.done, self.threads = [], [], set()

    def __call__(self, step):
        self.begun.append(step)
        self.threads.add(threading.current_thread())
        if step in self.held:
            self.reading.set()
            assert self.go.wait(60)
        if step in self.broken:
            raise DataError(f"step {step} is damaged")
        self.done.append(step)
        return 10 * step


@pytest.fixture
def started():
    """Prefetchers, all of which are closed in the end."""
    prefetchers = []

    def start(reads):
        prefetchers.append(Prefetcher(reads, CPU))
        return prefetchers[-1]

    yield start
    for prefetcher in prefetchers:
        prefetcher.close()


def test_each_step_is_read_once_and_in_one_thread_of_its_own(started):
    reads = Reads()
    prefetcher = started(reads)
    assert [prefetcher.take(step, step + 1 if step < 5 else None)[0] for step in range(1, 6)] == [10, 20, 30, 40, 50]
    assert reads.begun == [1, 2, 3, 4, 5]
    assert len(reads.threads) == 1
    assert threading.main_thread() not in reads.threads


def test_the_following_step_is_read_while_the_caller_computes(started):
    reads = Reads(held=[2])
    prefetcher = started(reads)
    result, _ = prefetcher.take(1, 2)  # returns although step 2 isn't read yet
    assert (result, reads.done) == (10, [1])
    reads.go.set()
    assert prefetcher.take(2, None)[0] == 20


def test_the_wait_for_the_data_is_measured(started, monkeypatch):
    clock = iter([100.0, 102.5])
    monkeypatch.setattr("seqlen_curriculum.training.prefetch.time.perf_counter", lambda: next(clock))
    assert started(Reads()).take(1, 2) == (10, 2.5)


def test_a_step_that_was_not_foreseen_is_read_when_it_is_taken(started):
    prefetcher = started(Reads())
    prefetcher.take(1, 2)
    assert prefetcher.take(7, 8)[0] == 70


def test_an_error_is_raised_in_the_step_that_needs_the_data(started):
    prefetcher = started(Reads(broken=[2]))
    assert prefetcher.take(1, 2)[0] == 10
    with pytest.raises(DataError, match="step 2 is damaged"):
        prefetcher.take(2, 3)


def test_what_was_read_ahead_is_thrown_away(started):
    reads = Reads(held=[2], broken=[2])
    prefetcher = started(reads)
    prefetcher.take(1, 2)
    assert reads.reading.wait(60)  # before that the read would be cancelled
    threading.Timer(0.1, reads.go.set).start()
    prefetcher.discard()  # neither raises the error nor leaves the thread reading
    assert reads.begun == [1, 2]
    reads.broken = ()
    assert prefetcher.take(2, None)[0] == 20
    assert reads.begun == [1, 2, 2]


class Copies(TorchDispatchMode):
    """Notes (device, non_blocking) of each copy to another device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.seen.append((str(kwargs["device"]), kwargs["non_blocking"]))
        return function(*args, **(kwargs or {}))


def test_a_batch_is_pinned_and_copied_without_waiting(monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with FakeTensorMode(), Copies() as copies:
        tokens = to_device(np.zeros((4, 8), np.uint16), torch.device("cuda:0"))
    assert (tokens.device.type, tokens.dtype, tuple(tokens.shape)) == ("cuda", torch.int64, (4, 8))
    assert pinned == [(torch.int64, (4, 8))]
    assert copies.seen == [("cuda:0", True)]


def test_on_a_cpu_nothing_is_pinned_or_copied_again(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pytest.fail("pinned"))
    tokens = to_device(np.array([[65535, 3]], np.uint16), CPU)
    assert tokens.tolist() == [[65535, 3]]
