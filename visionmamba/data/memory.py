"""What to say when a batch does not fit into memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class BatchTooLargeError(MemoryError):
    """A batch did not fit into the device's memory; the message says its size and the remedy."""


@contextmanager
def explain_out_of_memory(batch_size: int, *, option: str = "batch_size") -> Iterator[None]:
    """Turns every kind of out-of-memory error in its body into one sentence.

    Args:
        batch_size: images in the batch that is being run.
        option: what the caller can lower, as its message calls it.

    Raises:
        BatchTooLargeError: the body ran out of memory on a GPU or on the CPU.
    """
    try:
        yield
    except BatchTooLargeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_large(batch_size, option, "a GPU" if _is_gpu(error) else "the CPU") from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _too_large(batch_size, option, "the CPU") from error


def _is_gpu(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _too_large(batch_size: int, option: str, where: str) -> BatchTooLargeError:
    remedy = (
        f"lower {option}, for example to {batch_size // 2}"
        if batch_size > 1
        else "use smaller images or a smaller model"
    )
    images = "image" if batch_size == 1 else "images"
    return BatchTooLargeError(
        f"a batch of {batch_size} {images} does not fit into the memory of {where}; {remedy}"
    )
