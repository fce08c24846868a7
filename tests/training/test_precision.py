"""Which arithmetic a step uses, and that the settings are restored."""

import pytest
import torch

from rpg.config import Precision
from rpg.training.gradients import arithmetic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype", "matmul"),
    [
        (Precision.float32, torch.float32, "highest"),
        (Precision.auto, torch.float32, "medium"),
        (Precision.bfloat16, torch.bfloat16, "highest"),
    ],
)
def test_arithmetic_on_a_cpu(precision: Precision, dtype: torch.dtype, matmul: str) -> None:
    a = torch.randn(4, 4)
    assert torch.get_float32_matmul_precision() == "highest"
    with arithmetic(precision, CPU):
        assert (a @ a).dtype == dtype
        assert torch.get_float32_matmul_precision() == matmul
    assert (a @ a).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


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
