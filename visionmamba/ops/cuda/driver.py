"""Load the compiled kernels on a GPU and launch them: the CUDA driver, called through ctypes."""

import ctypes
import functools
import threading

import torch

from visionmamba.ops.cuda.build import compiled_kernels
from visionmamba.ops.kernel_cache import UnavailableError

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes of activations as they stand in the kernels' names."""
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_...: start before the kernel before


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identity, and 64 bytes of which only an int is used here."""

    _fields_ = (
        ("identity", ctypes.c_int),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int * 16),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


_EARLY_START = (_Attribute * 1)(
    _Attribute(
        identity=_PROGRAMMATIC_STREAM_SERIALIZATION, value=(ctypes.c_int * 16)(1, *([0] * 15))
    )
)


class Kernels:
    """The kernels of one source, loaded on one GPU.

    Args:
        source: one of build.SOURCES.
        device: index of the GPU.
    """

    def __init__(self, source: str, device: int) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.num_multiprocessors: int = properties.multi_processor_count
        self.shared_bytes: int = properties.shared_memory_per_block_optin
        """Most dynamic shared memory of a block."""
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        self._device = device
        self._driver = _driver()
        self._functions: dict[str, ctypes.c_void_p] = {}
        suffix = "a" if self.capability == (9, 0) else ""  # wgmma is of this architecture alone
        code = compiled_kernels(source, f"sm_{properties.major}{properties.minor}{suffix}")
        self._module = ctypes.c_void_p()
        make_context_current(device)
        with torch.cuda.device(device):
            _check(self._driver.cuModuleLoadData(ctypes.byref(self._module), code))

    def launch(
        self,
        name: str,
        problem: ctypes.Structure,
        blocks: int,
        threads: int,
        *,
        shared_bytes: int = 0,
        starts_early: bool = False,
    ) -> None:
        """Launch a kernel on torch's current stream.

        Args:
            name: of the kernel.
            problem: its only argument.
            blocks, threads: of the grid and of a block.
            shared_bytes: dynamic shared memory of a block.
            starts_early: start before the kernel before has ended (sm_90 and newer); the kernel
                itself waits for it.
        """
        make_context_current(self._device)
        config = _Config(
            grid=(blocks, 1, 1),
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            stream=torch._C._cuda_getCurrentRawStream(self._device),
        )
        if starts_early and self.capability >= (9, 0):
            config.attributes, config.num_attributes = _EARLY_START, 1
        function = self._functions.get(name) or self._function(name)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
        if torch.cuda.current_device() == self._device:
            status = self._driver.cuLaunchKernelEx(ctypes.byref(config), function, arguments, None)
        else:
            with torch.cuda.device(self._device):
                status = self._driver.cuLaunchKernelEx(
                    ctypes.byref(config), function, arguments, None
                )
        _check(status)

    def _function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        driver = self._driver
        _check(driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
        fixed = ctypes.c_int()
        _check(driver.cuFuncGetAttribute(ctypes.byref(fixed), 1, function))  # static shared memory
        most = self.shared_bytes - fixed.value
        _check(driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_SIZE, most))
        self._functions[name] = function
        return function


def kernels(source: str, device: torch.device) -> Kernels:
    """Return the kernels of a source on a GPU, compiled and loaded at the first call.

    Raises:
        UnavailableError: they cannot be had there; the message says why.
    """
    return _kernels(source, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _kernels(source: str, device: int) -> Kernels:
    return Kernels(source, device)


_thread = threading.local()


def make_context_current(device: int) -> None:
    """Let this thread use the driver, and cuBLAS without a warning, on a GPU.

    Threads of autograd start without a context until PyTorch launches a kernel of its own.
    """
    if not hasattr(_thread, "has_context"):
        torch.empty(1, device=torch.device("cuda", device)).zero_()
        _thread.has_context = True


def check_available(device: torch.device) -> None:
    """Compile and load the scans on a GPU.

    Raises:
        UnavailableError: they cannot be had there; the message says why.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0) or torch.version.hip is not None:
        raise UnavailableError(
            f"the kernels need an NVIDIA GPU of sm_80 or newer, not {major}.{minor}"
        )
    kernels("scan", device)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise UnavailableError(f"the CUDA driver library is missing ({error})") from error


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(text))
        name = text.value.decode() if text.value else str(status)
        raise RuntimeError(f"the CUDA driver fails with {name}")
