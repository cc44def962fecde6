"""The compiled CUDA module: it imports anywhere, and on a device its noise is the specification's, bit for bit."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import noise

cuda = pytest.importorskip("engine.kernels._cuda", reason="engine.kernels._cuda is not built here (no nvcc)")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_it_says_so() -> None:
    assert cuda.unavailable()
    with pytest.raises(RuntimeError, match="CUDA says"):
        cuda.device_info(0)


@pytest.mark.gpu
@needs_gpu
def test_it_sees_the_device_that_torch_sees() -> None:
    assert cuda.unavailable() is None
    info, properties = cuda.device_info(0), torch.cuda.get_device_properties(0)
    assert (info["name"], info["num_sms"]) == (properties.name, properties.multi_processor_count)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("vocab_size", [1, 7, 1024, 1_000_003])
def test_noise_has_the_bits_of_the_specification(vocab_size: int) -> None:
    seeds = torch.tensor([0, -1, 1 << 62, 12345])
    positions, streams = torch.tensor([0, 1, 2**31 - 1, -5], dtype=torch.int32), torch.tensor([3, 0, -1, 9], dtype=torch.int32)
    out = torch.full((4, vocab_size), torch.nan, device="cuda")
    on_device = [t.cuda() for t in (seeds, positions, streams)]
    stream = torch.cuda.current_stream().cuda_stream
    cuda.noise(out.data_ptr(), *(t.data_ptr() for t in on_device), 4, vocab_size, 0, stream)
    assert torch.equal(out.cpu(), noise.noise(seeds, positions, streams, vocab_size).log_exponential)
