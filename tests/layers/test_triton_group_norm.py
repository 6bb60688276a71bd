"""The Triton kernels: on a GPU, or by Triton's interpreter; and compiled for two GPUs."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from gnpractical.layers import group_norm_op

triton = pytest.importorskip("triton", reason="Triton is not installed")

SHAPES = {
    "square": (2, 6, 5, 7),  # parts and tiles that are not full
    "one image, one row": (1, 8, 1, 9),
    "more channels than positions": (3, 9, 2, 2),
    "one position": (2, 6, 1, 1),
    "one channel": (2, 1, 6, 6),
}
DTYPES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(scope="module")
def kernels():
    """The module; without a GPU its kernels are interpreted, by tests/conftest.py."""
    from gnpractical.layers import triton_group_norm

    assert triton_group_norm.INTERPRETED or torch.cuda.is_available()
    return triton_group_norm


@pytest.fixture(autouse=True)
def on_the_gpu():
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def by_position(x, layout):
    x = x.contiguous(memory_format=layout)
    return x.view(*x.shape[:2], -1)


def expected(x, num_groups, weight, bias, relu, grad):
    inputs = [each.double().requires_grad_() for each in (x, weight, bias)]
    y = torch.group_norm(inputs[0], num_groups, *inputs[1:])
    y = y.relu() if relu else y
    return y.detach(), torch.autograd.grad(y, inputs, grad.double())


def some_counts(x):
    """One group, one in between, one for each channel; not those of a single value to a group."""
    divisors = [g for g in range(1, x.shape[1] + 1) if x.shape[1] % g == 0]
    counts = {divisors[0], divisors[len(divisors) // 2], divisors[-1]}
    return sorted(g for g in counts if g < x[0].numel())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "relu"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_interpreted_kernels_equal_pytorchs(kernels, shape, dtype, layout, relu):
    n, channels, *_ = SHAPES[shape]
    x = (2 * torch.randn(SHAPES[shape]) + 3).to(dtype)
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    grad = torch.randn_like(x)
    for num_groups in some_counts(x):
        y, (dx, dweight, dbias) = expected(x, num_groups, weight, bias, relu, grad)
        maps = by_position(x, layout)
        found = torch.empty_like(maps)
        mean, rstd = kernels.forward(maps, num_groups, weight, bias, 1e-5, relu, found)
        assert mean.shape == rstd.shape == (n, num_groups) and mean.dtype == torch.float32
        tolerance = {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
        torch.testing.assert_close(found.double(), y.flatten(2), **tolerance)
        gradients = kernels.backward(
            by_position(grad, layout), maps, mean, rstd, weight, bias, relu
        )
        assert gradients[0].dtype == dtype and gradients[0].stride() == maps.stride()
        torch.testing.assert_close(gradients[0].double(), dx.flatten(2), **tolerance)
        for one, other in zip(gradients[1:], (dweight, dbias), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-3)


INPUTS = {
    "channels_last": lambda: torch.randn(2, 6, 3, 4).to(memory_format=torch.channels_last),
    "a slice": lambda: torch.randn(2, 6, 5, 4)[:, :, ::2],
    "expanded": lambda: torch.randn(2, 6, 1, 4).expand(-1, -1, 3, -1),
    "vectors": lambda: torch.randn(3, 6),
    "volumes": lambda: torch.randn(1, 6, 2, 2, 3),
    "no images": lambda: torch.randn(0, 6, 3, 4),
}


@pytest.mark.parametrize("with_affine", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_through_the_operator(kernels, monkeypatch, name, with_affine):
    monkeypatch.setattr(group_norm_op, "_kernels", lambda input: kernels)
    x = INPUTS[name]().requires_grad_()
    affine = [torch.randn(6).requires_grad_() for _ in range(2)] if with_affine else [None, None]
    y, *_ = torch.ops.gnpractical.group_norm(x, 2, *affine, 1e-5, False)
    wanted = torch.group_norm(x, 2, *affine)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(y)
    inputs = [each for each in (x, *affine) if each is not None]
    for one, other in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_affine_of_any_strides(kernels, monkeypatch):
    monkeypatch.setattr(group_norm_op, "_kernels", lambda input: kernels)
    x, weight, bias = torch.randn(2, 6, 4), torch.randn(6, 2)[:, 0], torch.ones(1).expand(6)
    y, *_ = torch.ops.gnpractical.group_norm(x, 2, weight, bias, 1e-5, False)
    torch.testing.assert_close(y, torch.group_norm(x, 2, weight, bias), rtol=1e-5, atol=1e-5)


def test_outputs_share_no_memory(kernels, monkeypatch):
    monkeypatch.setattr(group_norm_op, "_kernels", lambda input: kernels)
    x, weight, bias = (torch.randn(2, 6, 4).requires_grad_(), *torch.randn(2, 6).unbind())
    results = torch.library.opcheck(
        torch.ops.gnpractical.group_norm, (x, 2, weight.clone(), bias.clone(), 1e-5, False),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    assert set(results.values()) == {"SUCCESS"}


def test_mean_far_above_the_deviation(kernels):
    x = torch.randn(2, 8, 6, 6) + 1000
    maps = by_position(x, torch.channels_last)
    y = torch.empty_like(maps)
    kernels.forward(maps, 2, torch.ones(8), torch.zeros(8), 1e-5, False, y)
    wanted = F.group_norm(x.double(), 2).flatten(2)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=5e-4)


def test_an_input_that_is_not_finite_shows(kernels):
    x = torch.randn(2, 4, 3, 3)
    x[0, 0, 0, 0] = torch.nan
    y = torch.empty(2, 4, 9)
    kernels.forward(x.flatten(2), 2, torch.ones(4), torch.zeros(4), 1e-5, True, y)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all() and y[1].isfinite().all()


@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_for_a_gpu(architecture, tmp_path):
    """To 16-byte accesses of the maps and nothing kept in local memory, in both layouts."""
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(architecture)],
        capture_output=True, text=True, env={"TRITON_CACHE_DIR": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    if "ptxas" in run.stderr and "not found" in run.stderr:
        pytest.skip("Triton has no assembler here")
    assert run.returncode == 0, run.stderr
    compiled = run.stdout.splitlines()
    assert len(compiled) == 5 * 2 * 2
    for line in compiled:
        if "join" in line or "ones" in line:
            continue  # no maps, or of one value
        assert re.search("loads 16 bytes True", line) and "local memory False" in line, line


# In a process of its own: the module is imported with its kernels to be compiled.
COMPILE = """
import itertools
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gnpractical.layers import triton_group_norm

POINTERS = {"x": "*bf16", "grad": "*bf16", "out": "*bf16"}
FLOATS = {"means", "squares", "mean", "rstd", "weight", "bias", "sums", "sums_x", "group_sums",
          "group_sums_x"}
ALIGNED = {"C", "P", "part_length", "stride_n", "stride_c", "stride_p"}
KERNELS = ("moments", "join", "normalize", "gradient_sums", "input_gradient")
ONES = {"P": 1, "parts": 1, "C": 1, "D": 1, "stride_n": 1}  # which Triton takes for constants
for kernel, contiguous, ones in itertools.product(KERNELS, ("stride_c", "stride_p"), ({}, ONES)):
    function = getattr(triton_group_norm, f"_{kernel}_kernel")
    if isinstance(function, triton.runtime.Autotuner):
        function = function.fn
    constants = {"RELU": True, "BLOCK_C": 64, "BLOCK_P": 32, "BLOCK": 1024, contiguous: 1, **ones}
    if contiguous == "stride_p":
        constants |= {"BLOCK_C": 4, "BLOCK_P": 512}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name in ("values", "eps"):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS.get(name) or ("*fp32" if name in FLOATS else "i32")
            if signature[name].startswith("*") or name in ALIGNED:
                attributes[(i,)] = [["tt.divisibility", 16]]
    ptx = compile(
        ASTSource(function, signature, values, attributes),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
    ).asm["ptx"]
    print(kernel, contiguous, "ones" if ones else "", "loads 16 bytes", "ld.global.v4.b32" in ptx,
          "local memory", "st.local" in ptx)
"""
