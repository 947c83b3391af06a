# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from curvlab import _host, ops
from curvlab.ops import norms, reference
from tests import contracts
from tests.ops.norm_samples import (
    DTYPES,
    SIZES,
    TOLERANCE,
    assert_filter_norms_right,
    assert_norms_right,
    layouts,
    random,
)

COLUMN = {name: i for i, name in enumerate(norms.COLUMNS)}


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_odd_sizes(dtype: torch.dtype, with_reference: bool) -> None:
    tensors = [random(n, dtype=dtype) for n in SIZES]
    references = [random(n, dtype=dtype, seed=1) for n in SIZES] if with_reference else []
    assert_norms_right(tensors, references, TOLERANCE[dtype])


@pytest.mark.parametrize("name", layouts("cpu"))
def test_norms_of_any_layout(name: str) -> None:
    tensors, references = layouts("cpu")[name]
    assert_norms_right(tensors, references, 1e-12)
    assert_norms_right(tensors, [], 1e-12)
    assert_filter_norms_right(tensors, 1e-12)


def test_mixed_dtypes_in_one_list() -> None:
    tensors = [random(1000 + i, dtype=dtype) for i, dtype in enumerate(DTYPES)]
    assert_norms_right(tensors, [t.flip(0) for t in tensors], 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    """All 65536 values, subnormals, infinities and NaN among them, one tensor each: conversions are exact."""
    tensors = list(torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype))
    got = norms.multi_tensor_norms(tensors)[:-1]
    values = torch.stack(tensors).double().abs()
    torch.testing.assert_close(got[:, COLUMN["linf"]], values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[:, COLUMN["l1"]], values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[:, COLUMN["nonzeros"]], (values != 0).double())
    got = norms.filter_norms([torch.stack(tensors)])
    torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)


def test_l2_only_is_the_column_l2() -> None:
    tensors = [random(n) for n in SIZES]
    out = norms.multi_tensor_norms(tensors, l2_only=True)
    contracts.assert_same_bits(out[:, 1], norms.multi_tensor_norms(tensors)[:, 1])
    assert out[:, [0, 2, 3, 4, 5, 6]].isnan().all()


def test_empty_list() -> None:
    contracts.assert_same_bits(norms.multi_tensor_norms([]), torch.zeros(1, 7, dtype=torch.float64))
    contracts.assert_same_bits(torch.ops.curvlab.multi_tensor_norms([], []), torch.zeros(1, 7, dtype=torch.float64))
    assert norms.filter_norms([]).shape == torch.ops.curvlab.filter_norms([]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 15, 16, 4999])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_propagate(dtype: torch.dtype, position: int, bad: float) -> None:
    x, clean = torch.ones(5000, dtype=dtype), torch.ones(3, dtype=dtype)
    x[position] = bad
    out = norms.multi_tensor_norms([clean, x, clean], [torch.ones_like(t) for t in (clean, x, clean)])
    want = math.nan if math.isnan(bad) else math.inf
    for row in (1, 3):
        for column in ("l1", "l2", "linf", "distance"):
            torch.testing.assert_close(out[row, COLUMN[column]].item(), want, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(out[row, COLUMN["inner"]].item(), bad, equal_nan=True, rtol=0, atol=0)
        assert out[row, COLUMN["reference_l2"]].isfinite()
    assert out[1, COLUMN["nonzeros"]] == 5000
    assert out[0].isfinite().all() and out[2].isfinite().all()
    by_filter = norms.filter_norms([x.reshape(2, 2500)])
    torch.testing.assert_close(by_filter[position // 2500].item(), want, equal_nan=True, rtol=0, atol=0)
    assert by_filter[1 - position // 2500].isfinite()


def test_infinite_reference_gives_infinite_distance() -> None:
    out = norms.multi_tensor_norms([torch.ones(3)], [torch.tensor([1.0, math.inf, 1.0])])
    assert out[0, COLUMN["distance"]] == math.inf and out[0, COLUMN["linf"]] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    tensors = [random(n, dtype=dtype) for n in (3, 500_001, 0, 40_000, 123_457)]
    references = [t.flip(0) for t in tensors]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            filters = norms.filter_norms([t[: len(t) // 9 * 9].reshape(-1, 9) for t in tensors])
            results.append((norms.multi_tensor_norms(tensors, references), filters))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        contracts.assert_same_bits(results[0][0], result[0])
        contracts.assert_same_bits(results[0][1], result[1])


def constant_norms(n: int, x: float, r: float) -> list[float]:
    return [n * x, math.sqrt(n) * x, x, n, math.sqrt(n) * abs(x - r), n * x * r, math.sqrt(n) * r]


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_data_keeps_its_digits(dtype: torch.dtype) -> None:
    """The worst case of a running sum: every addition rounds the same way. n is prime, so no tree hides it."""
    n = 3_000_017
    x, r = torch.full((n,), 0.1, dtype=dtype), torch.full((n,), 0.3, dtype=dtype)
    out = norms.multi_tensor_norms([x], [r])
    want = torch.tensor(constant_norms(n, x[0].item(), r[0].item()), dtype=torch.float64)
    torch.testing.assert_close(out[0], want, rtol=1e-14, atol=0)
    torch.testing.assert_close(out[1], want, rtol=1e-14, atol=0)
    torch.testing.assert_close(norms.filter_norms([x[None]])[0], want[1], rtol=1e-14, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_at_1e8_elements(dtype: torch.dtype) -> None:
    n = 10**8
    x = torch.full((n,), 0.1, dtype=dtype)
    want = torch.tensor(constant_norms(n, x[0].item(), x[0].item()), dtype=torch.float64)
    bound = 1e-7 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(norms.multi_tensor_norms([x], [x])[0], want, rtol=bound, atol=0)
    torch.manual_seed(0)
    x, total = torch.randn(n, dtype=dtype), ([], [])
    for part in x.split(1 << 16):
        p = part.double()
        total[0].append(p.abs().sum().item())
        total[1].append(p.square().sum().item())
    out = norms.multi_tensor_norms([x])[0]
    assert abs(out[0].item() / math.fsum(total[0]) - 1) < bound
    assert abs(out[1].item() / math.sqrt(math.fsum(total[1])) - 1) < bound


ISA_SCRIPT = """
import sys, torch
from curvlab import ops
from tests.ops.norm_samples import DTYPES, SIZES, layouts, random
out = []
for dtype in DTYPES:
    x, r = [random(n, dtype=dtype) for n in SIZES], [random(n, dtype=dtype, seed=1) for n in SIZES]
    for pair in [(x, r), (x, []), *layouts("cpu", dtype).values()]:
        out.append(ops.norms.multi_tensor_norms(*pair))
    out.append(ops.norms.multi_tensor_norms(x, l2_only=True))
    out.append(ops.norms.filter_norms([random(33, 77, dtype=dtype)]))
torch.save((ops.cpu_capability(), out), sys.argv[1])
"""


def run_with(capability: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CURVLAB_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True, timeout=240)


def test_every_instruction_set_agrees(tmp_path) -> None:
    best = ["default", "avx2", "avx512"].index(ops.cpu_capability())
    results = []
    for capability in ["default", "avx2", "avx512"][: best + 1]:
        file = tmp_path / capability
        script = "from curvlab.ops import norms\n" + ISA_SCRIPT
        done = run_with(capability, "-c", script, str(file))
        assert done.returncode == 0, done.stderr
        used, out = torch.load(file, weights_only=True)
        assert used == capability
        results.append(out)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_unknown_instruction_set_is_named() -> None:
    script = "import torch; from curvlab.ops import norms\nnorms.multi_tensor_norms([torch.ones(3)])"
    done = run_with("sse9", "-c", script)
    assert done.returncode != 0
    assert "CURVLAB_CPU_CAPABILITY must be default, avx2 or avx512, got 'sse9'" in done.stderr


def pair_of_lists() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [random(5, 3), random(1)[0], random(0, 2)], [random(5, 3, seed=1), random(1, seed=1)[0], random(0, 2)]


def test_registration() -> None:
    tensors, references = pair_of_lists()
    op = torch.ops.curvlab.multi_tensor_norms.default
    contracts.assert_registered_well(op, (tensors, references, False))
    contracts.assert_registered_well(op, (tensors, [], False), has_nan=True)
    contracts.assert_registered_well(op, (tensors, [], True), has_nan=True)
    contracts.assert_registered_well(torch.ops.curvlab.filter_norms.default, (tensors,))


def test_compiles_without_a_graph_break() -> None:
    tensors, references = pair_of_lists()
    contracts.assert_compiles(lambda x: norms.multi_tensor_norms(x, references) * 2, tensors)
    contracts.assert_compiles(lambda x: norms.multi_tensor_norms(x, l2_only=True)[-1], tensors)
    contracts.assert_compiles(lambda x: norms.filter_norms(x) + 1, tensors)


@pytest.mark.parametrize(
    "function",
    [
        norms.multi_tensor_norms,
        lambda x: norms.multi_tensor_norms(x, [torch.zeros(4, 3)]),
        lambda x: norms.multi_tensor_norms([torch.ones(4, 3)], x),
        norms.filter_norms,
    ],
    ids=["norms", "with a reference", "of the reference", "filters"],
)
def test_derivatives_are_refused(function) -> None:
    contracts.assert_refuses_derivatives(function)


def test_the_raw_op_refuses_tangents() -> None:
    """Behind the wrapper too: forward-mode AD through an op without a rule would give silent zeros."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(NotImplementedError, match="multi_tensor_norms: has no derivative"):
            torch.ops.curvlab.multi_tensor_norms([dual], [])


@pytest.mark.cuda_build
def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        cuda, cpu = torch.empty(3, 4, device="cuda"), torch.empty(3, 4)
        out = norms.multi_tensor_norms([cuda, cuda], [cuda, cuda])
        assert out.device.type == "cuda" and out.shape == (3, 7) and out.dtype == torch.float64
        out = norms.filter_norms([cuda, cuda[0], cuda[0, 0]])
        assert out.device.type == "cuda" and out.shape == (8,)
        for other in (cpu, cpu[0, 0]):
            with pytest.raises(ValueError, match="must be on one device, got cpu, cuda:0"):
                norms.multi_tensor_norms([cuda, other])
            with pytest.raises(ValueError, match="must be on one device, got cpu, cuda:0"):
                norms.multi_tensor_norms([cuda], [other])
            with pytest.raises(ValueError, match="must be on one device, got cpu, cuda:0"):
                norms.filter_norms([cuda, other])
        assert norms.multi_tensor_norms([]).shape == (1, 7) and norms.filter_norms([]).shape == (0,)
        with pytest.raises(TypeError, match="got int64"):
            norms.multi_tensor_norms([cuda.long()])
        with pytest.raises(ValueError, match=r"reference\[0\] must have shape \[3, 4\] like tensors\[0\], got \[4\]"):
            norms.multi_tensor_norms([cuda], [cuda[0]])


ONE = torch.ones(2)
BAD_CALLS = {
    "integer": (
        ([ONE, ONE.long()],),
        TypeError,
        r"tensors\[1\] must be float32, float64, bfloat16 or float16, got int",
    ),
    "complex": (([ONE.cfloat()],), TypeError, r"tensors\[0\] must be float32.*got complex64"),
    "bool": (([ONE.bool()],), TypeError, r"tensors\[0\] must be float32.*got bool"),
    "sparse": (([ONE.to_sparse()],), TypeError, r"tensors\[0\] must be a dense \(strided\) tensor, got layout Sparse"),
    "devices": (([ONE, ONE.to("meta")],), ValueError, r"tensors\[1\] must be on cpu like tensors\[0\], got meta"),
    "reference count": (([ONE, ONE], [ONE]), ValueError, "reference must have 2 tensors like tensors, got 1"),
    "reference of nothing": (([], [ONE]), ValueError, "reference must have 0 tensors like tensors, got 1"),
    "reference shape": (([ONE], [ONE[None]]), ValueError, r"must have shape \[2\] like tensors\[0\], got \[1, 2\]"),
    "reference dtype": (([ONE], [ONE.double()]), TypeError, r"reference\[0\] must be float32 like .* got float64"),
    "reference device": (([ONE], [ONE.to("meta")]), ValueError, r"reference\[0\] must be on cpu .* got meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_teach(name: str) -> None:
    args, kind, message = BAD_CALLS[name]
    with pytest.raises(kind, match=f"multi_tensor_norms: .*{message}"):
        norms.multi_tensor_norms(*args)
    with pytest.raises(kind, match=f"multi_tensor_norms: .*{message}"):
        norms.PreparedNorms(*args)
    if len(args) == 1:
        with pytest.raises(kind, match=f"filter_norms: .*{message}"):
            norms.filter_norms(*args)


def test_l2_only_takes_no_reference() -> None:
    with pytest.raises(ValueError, match="reference must be empty with l2_only=True, got 1 tensors"):
        norms.multi_tensor_norms([ONE], [ONE], l2_only=True)


def test_prepared_norms_see_new_values_and_new_memory() -> None:
    x, r = [random(5000), random(3)], [random(5000, seed=1), random(3, seed=1)]
    prepared = norms.PreparedNorms(x, r)
    contracts.assert_same_bits(prepared(), norms.multi_tensor_norms(x, r))
    x[0].mul_(3)
    x[1].data = random(3, seed=9)
    contracts.assert_same_bits(prepared(), norms.multi_tensor_norms(x, r))
    contracts.assert_same_bits(prepared(l2_only=True), norms.multi_tensor_norms(x, l2_only=True))
    assert_norms_right(x, r, 1e-12)
    x[0].resize_(9000).fill_(1)  # other sizes than the reference's now: refused, not read past the end
    with pytest.raises(ValueError, match=r"reference\[0\] must have shape \[9000\]"):
        prepared()
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda t: prepared()[0] + t)(torch.ones(2))


def test_filter_norms_of_odd_shapes() -> None:
    for dtype, rows, numel in itertools.product(DTYPES, (1, 2, 7, 33), (0, 1, 5, 16, 4097, 8193)):
        assert_filter_norms_right([random(rows, numel, dtype=dtype), random(3, dtype=dtype)], TOLERANCE[dtype])


def test_the_twin_knows_its_formulas() -> None:
    """The second opinion itself, on numbers that can be read."""
    out = reference.multi_tensor_norms([torch.tensor([3.0, -4.0, 0.0])], [torch.tensor([0.0, 0.0, 2.0])])
    assert out[0].tolist() == pytest.approx([7, 5, 4, 2, math.sqrt(29), 0, 2]) and torch.equal(out[0], out[1])
    assert reference.filter_norms([torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor(-2.0)]).tolist() == [5, 0, 2]


def test_build_facts_and_status() -> None:
    facts = ops.build_facts()
    assert facts["torch"].split(".")[:2] == torch.__version__.split(".")[:2] and "-O3" in facts["flags"]
    assert ops.cpu_capability() == _host.cpu_capability() in facts["instruction_sets"]
    assert ops.cuda_status().split(":")[0] in ("loaded", "not built", "built, but does not load")


@pytest.mark.parametrize(
    ("running", "same"),
    [
        ("2.13.0+cu130", True),
        ("2.13.1+cu126", True),
        ("2.14.0+cu130", False),
        ("2.13.0+cpu", False),
        ("2.13.0", False),
        ("3.13.0+cu130", False),
    ],
)
def test_another_torch_than_the_one_of_the_build_is_refused(running: str, same: bool, monkeypatch) -> None:
    monkeypatch.setattr(ops, "build_facts", lambda: {"torch": "2.13.0+cu130"})
    monkeypatch.setattr(torch, "__version__", running)
    if same:
        ops._check_torch()
        return
    with pytest.raises(ImportError, match=r"built with torch 2\.13\.0\+cu130.*pip install \.") as caught:
        ops._check_torch()
    assert f"this is torch {running}:" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("libcudart.so.13: cannot open: No such file", "libcudart.so.13: cannot open: No such file"),
        ("/home/ann/x/_C_cuda.so: undefined symbol: _Z1f", "_C_cuda.so: undefined symbol: _Z1f"),
        ("/home/ann lee/x/_C.so: undefined symbol: _Z1f", "_C.so: undefined symbol: _Z1f"),
        (
            "/lib/a.so.6: version `G_3' not found (required by /home/ann/b.so)",
            "a.so.6: version `G_3' not found (required by b.so)",
        ),
        ("home/ann/_C.so: file too short", "_C.so: file too short"),
    ],
)
def test_the_status_names_no_folders(said: str, shown: str, monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(said)

    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ops.importlib, "import_module", refuse)
    assert ops._load_cuda() == f"built, but does not load: {shown}"


def test_prepared_norms_refuse_fakes_on_several_devices() -> None:
    with FakeTensorMode():
        tensors = [torch.empty(3, device="cuda"), torch.empty(())]
        with pytest.raises(ValueError, match="multi_tensor_norms: tensors must be on one device, got cpu, cuda:0"):
            norms.PreparedNorms(tensors)
