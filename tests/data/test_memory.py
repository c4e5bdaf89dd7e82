"""A batch that does not fit into memory."""

import pytest
import torch

from visionmamba.data import BatchTooLargeError, explain_out_of_memory

TOO_MANY_BYTES = 1 << 60


def test_cpu_out_of_memory_names_batch_and_remedy() -> None:
    with (
        pytest.raises(BatchTooLargeError) as caught,
        explain_out_of_memory(64),
    ):
        torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
    assert str(caught.value) == (
        "a batch of 64 images does not fit into the memory of the CPU; "
        "lower batch_size, for example to 32"
    )


def test_remedy_names_the_option_that_the_caller_has() -> None:
    with (
        pytest.raises(BatchTooLargeError, match="lower device_batch_size, for example to 4"),
        explain_out_of_memory(8, option="device_batch_size"),
    ):
        raise MemoryError


def test_gpu_out_of_memory_is_explained() -> None:
    with pytest.raises(BatchTooLargeError, match="memory of a GPU"), explain_out_of_memory(2):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_single_image_has_another_remedy() -> None:
    with pytest.raises(BatchTooLargeError, match="use smaller images"), explain_out_of_memory(1):
        raise MemoryError


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), explain_out_of_memory(64):
        raise RuntimeError("shape mismatch")
