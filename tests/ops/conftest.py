"""The backends every op is tested on."""

from collections.abc import Iterator

import pytest
import torch

from visionmamba.ops import cpu, cuda
from visionmamba.ops.cpu.build import compiled_library
from visionmamba.ops.kernel_cache import UnavailableError

BACKENDS = (
    "torch",
    "cpp",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("triton", marks=pytest.mark.gpu),
)


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of one backend: the CPU in plain PyTorch or C++, the GPU in CUDA C++ or Triton."""
    if request.param in ("cuda", "triton"):
        monkeypatch.setenv(cuda.ENVIRONMENT_VARIABLE, request.param)
        cuda.forget_choice()
        yield "cuda"
        cuda.forget_choice()
        return
    if request.param == "cpp":
        try:
            compiled_library()
        except UnavailableError as error:
            pytest.skip(f"no C++ kernels here: {error}")
    monkeypatch.setenv(cpu.ENVIRONMENT_VARIABLE, request.param)
    cpu.forget_choice()
    yield "cpu"
    cpu.forget_choice()


@pytest.fixture(params=(torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def half(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype
