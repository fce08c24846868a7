"""Which arithmetic a step uses, and that the settings are restored."""

from pathlib import Path

import pytest
import torch

from rpg.config import Precision
from rpg.training import arithmetic as arithmetic_module
from rpg.training.arithmetic import arithmetic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "is_better", "dtype", "matmul"),
    [
        (Precision.float32, True, torch.float32, "highest"),
        (Precision.auto, True, torch.float32, "medium"),
        (Precision.auto, False, torch.float32, "highest"),
        (Precision.bfloat16, True, torch.bfloat16, "highest"),
    ],
)
def test_arithmetic_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, is_better: bool, dtype: torch.dtype, matmul: str
) -> None:
    monkeypatch.setattr(arithmetic_module, "onednn_is_better", lambda: is_better)
    a = torch.randn(4, 4)
    assert torch.get_float32_matmul_precision() == "highest"
    with arithmetic(precision, CPU):
        assert (a @ a).dtype == dtype
        assert torch.get_float32_matmul_precision() == matmul
    assert (a @ a).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("cpu", "rounding", "is_better"),
    [
        ("AuthenticAMD", 0.0, True),
        ("AuthenticAMD", 1e-3, False),
        ("GenuineIntel", 0.0, False),
        (None, 0.0, False),
    ],
)
def test_onednn_is_taken_on_amd_processors_where_it_is_as_exact(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cpu: str | None, rounding: float, is_better: bool
) -> None:
    info = tmp_path / "cpuinfo"
    if cpu is not None:
        info.write_text(f"processor\t: 0\nvendor_id\t: {cpu}\n")
    monkeypatch.setattr(arithmetic_module, "_CPU_INFO", info)

    class Rounded(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            is_medium = torch.get_float32_matmul_precision() == "medium"
            return out * (1 + rounding) if is_medium and func is torch.ops.aten.mm.default else out

    arithmetic_module.onednn_is_better.cache_clear()
    try:
        with Rounded():
            assert arithmetic_module.onednn_is_better() == is_better
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        arithmetic_module.onednn_is_better.cache_clear()


def test_an_error_restores_the_earlier_settings() -> None:
    for precision in Precision:
        with pytest.raises(ZeroDivisionError), arithmetic(precision, CPU):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_is_bfloat16_on_a_gpu() -> None:
    device = torch.device("cuda")
    a = torch.randn(4, 4, device=device)
    with arithmetic(Precision.auto, device):
        assert (a @ a).dtype == torch.bfloat16
    with arithmetic(Precision.float32, device):
        assert (a @ a).dtype == torch.float32
