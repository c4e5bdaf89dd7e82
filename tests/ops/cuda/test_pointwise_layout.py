"""Python's structures are those of the pointwise kernels' sources, as the compiler sees them."""

import ctypes

import pytest

from visionmamba.ops.cuda import build, conv, gate, norm, patches

STRUCTURES = [
    ("norm", "Norm", norm._Norm),
    ("norm", "NormBackward", norm._NormBackward),
    ("norm", "Sum", norm._Sum),
    ("conv", "Convolution", conv._Convolution),
    ("conv", "Sum", conv._Sum),
    ("gate", "Gate", gate._Gate),
    ("patches", "Patches", patches._Patches),
]


@pytest.mark.parametrize("source, name, structure", STRUCTURES)
def test_structures_are_those_of_the_source(source, name, structure):
    checks = [f"sizeof({name}) == {ctypes.sizeof(structure)}"]
    for field, *_ in structure._fields_:
        offset = getattr(structure, field).offset
        checks.append(f"__INTADDR__(&(({name} *)0)->{field}) == {offset}")
    text = build.source_text(source).decode()
    text = text[: text.index("#define KERNEL")]
    text += "".join(f'\nstatic_assert({check}, "{name}");' for check in checks)
    text += '\nextern "C" __global__ void nothing_kernel() {}'
    assert build.compile_kernels(text.encode(), "sm_80")
