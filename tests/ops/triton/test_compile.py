"""The Triton kernels compiled for AMD GPUs, which needs none; running them would."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from visionmamba.ops.triton import kernels, scan  # noqa: E402

pytestmark = pytest.mark.once

CDNA3 = GPUTarget("hip", "gfx942", 64)
PARAMETERS = ("A_ptr", "D_ptr", "dt_bias_ptr", "ends_ptr", "adjoints_ptr", "step_sums_ptr")
STATES = ("first_ptr", "entering_ptr", "arriving_ptr", "tile_states_ptr", "last_state_ptr")
SUMS = ("dA_ptr", "dB_ptr", "dC_ptr", "dD_ptr", "ddt_bias_ptr", "dinitial_state_ptr")


def signature_of(kernel, constants):
    """The types of a bfloat16 scan's arguments, by name."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name in PARAMETERS + STATES + SUMS else "*bf16"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    return types


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", ["chunk_ends", "fold_chunks", "scan_forward", "scan_backward"])
def test_compiles_for_amd_without_spilling(private_cache, monkeypatch, name):
    monkeypatch.setattr(scan, "machine", lambda device: (304, CDNA3.warp_size))
    kernel = getattr(kernels, f"{name}_kernel")
    tiling = scan.FORWARD if name == "scan_forward" else scan.BACKWARD
    x, B = torch.empty(8, 6085, 384), torch.empty(8, 6085, 16)
    constants = scan._cut(tiling, x, B, B).constants
    options = {option: constants.pop(option) for option in ("num_warps", "enable_fp_fusion")}
    constants |= {"SOFTPLUS": True, "REVERSE": True, "FROM_LAST": True, **scan._FOLD}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    source = ASTSource(kernel, signature_of(kernel, constants), constants)
    assembly = triton.compile(source, target=CDNA3, options=options).asm["amdgcn"]
    assert ".vgpr_spill_count: 0\n" in assembly
