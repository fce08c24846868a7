"""LoRA adapters: PEFT says which are equal, and linear algebra what their canonical factors are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rpg.collection.adapter import canonical_factors, check_same_function, factor_pairs, product_distances
from rpg.collection.collection import Collection
from rpg.collection.register import BadCheckpointsError, register
from rpg.errors import RPGError


def adapter(
    seed: int, rank: int = 3, layers: int = 2, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random factors as PEFT names them; layer i maps 5 + i values to 4."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in range(layers):
        name = f"base_model.model.{i}"
        found[f"{name}.lora_A.weight"] = torch.randn(rank, 5 + i, generator=generator).to(dtype)
        found[f"{name}.lora_B.weight"] = torch.randn(4, rank, generator=generator).to(dtype)
    return found


def turned(state_dict: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same products in other factors: B M and M⁻¹ A."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for a, b in factor_pairs(state_dict):
        mixed = torch.randn(state_dict[a].shape[0], state_dict[a].shape[0], generator=generator).double()
        found[a] = (torch.linalg.inv(mixed) @ state_dict[a].double()).to(state_dict[a].dtype)
        found[b] = (state_dict[b].double() @ mixed).to(state_dict[b].dtype)
    return found


def products(state_dict: dict[str, Tensor]) -> list[Tensor]:
    return [
        state_dict[b].double().flatten(1) @ state_dict[a].double().flatten(1)
        for a, b in factor_pairs(state_dict)
    ]


class TestCanonicalFactors:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 6))
    def test_products_stay_and_alone_decide(self, seed: int, rank: int) -> None:
        original = adapter(seed, rank, dtype=torch.float64)
        found = canonical_factors(original, None)
        assert list(found) == list(original)
        for name in original:
            assert found[name].shape == original[name].shape
            assert found[name].dtype == original[name].dtype
        for one, other in zip(products(found), products(original), strict=True):
            torch.testing.assert_close(one, other)
        if rank <= 4:
            again = canonical_factors(turned(original, seed + 1), None)
            for name in found:
                torch.testing.assert_close(again[name], found[name], rtol=1e-4, atol=1e-6)

    def test_they_are_the_singular_vectors_of_the_product(self) -> None:
        original = adapter(0)
        found = canonical_factors(original, None)
        for (a, b), product in zip(factor_pairs(original), products(original), strict=True):
            _, values, _ = torch.linalg.svd(product)
            for factor in (found[b].double(), found[a].double().T):
                gram = factor.T @ factor
                torch.testing.assert_close(gram, torch.diag(values[:3]), rtol=1e-4, atol=1e-5)
            largest = found[b].gather(0, found[b].abs().argmax(dim=0, keepdim=True))
            assert bool((largest > 0).all())

    def test_convolutions_embeddings_and_ranks_above_the_widths(self) -> None:
        torch.manual_seed(0)
        original = {
            "c.lora_A.weight": torch.randn(2, 3, 3, 3),
            "c.lora_B.weight": torch.randn(5, 2, 1, 1),
            "e.lora_embedding_A": torch.randn(2, 11),
            "e.lora_embedding_B": torch.randn(4, 2),
            "wide.lora_down.weight": torch.randn(9, 4),
            "wide.lora_up.weight": torch.randn(3, 9),
            "wide.alpha": torch.tensor(8.0),
            "zero.lora_A.weight": torch.randn(2, 6),
            "zero.lora_B.weight": torch.zeros(3, 2),
        }
        found = canonical_factors(original, None)
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in original.items()}
        for one, other in zip(products(found), products(original), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert not found["zero.lora_A.weight"].any()
        assert found["wide.alpha"] is original["wide.alpha"]

    @pytest.mark.parametrize(
        ("tensors", "config", "words"),
        [
            ({"w": torch.ones(2)}, None, "found none"),
            (adapter(0), {"target_parameters": ["experts"]}, "target_parameters"),
            ({"lora_A.w": torch.ones(2, 3), "lora_B.w": torch.ones(3, 4)}, None, r"expected \[r, in\] and"),
            ({"lora_A.w": torch.ones(2, 3) * torch.nan, "lora_B.w": torch.ones(3, 2)}, None, "NaN"),
        ],
    )
    def test_what_has_none_is_refused(self, tensors: Any, config: Any, words: str) -> None:
        with pytest.raises(RPGError, match=words):
            canonical_factors(tensors, config)


def test_distances_are_those_of_the_whole_matrices() -> None:
    one, other = adapter(0), adapter(1)
    difference = sum(
        float((a - b).square().sum()) for a, b in zip(products(one), products(other), strict=True)
    )
    size = sum(float(p.square().sum()) for p in [*products(one), *products(other)])
    found, factors = product_distances(one, other)
    assert found == pytest.approx((difference / (size / 2)) ** 0.5)
    assert 1.1 < factors < 1.7
    same, apart = product_distances(one, turned(one, 3))
    assert same < 1e-3 < 0.5 < apart
    assert product_distances(one, one) == (pytest.approx(0, abs=1e-6), 0)


def peft_adapter(path: Path, seed: int, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["0", "1"], "init_lora_weights": False, **options}
    torch.manual_seed(seed)
    model = peft.get_peft_model(network, peft.LoraConfig(**config))
    model.save_pretrained(path)
    return model


class TestConfigurations:
    @pytest.mark.parametrize(
        ("options", "key"),
        [
            ({"lora_alpha": 16}, "lora_alpha: expected 8, found 16: another scale"),
            ({"use_rslora": True}, "use_rslora: expected None, found True: another scale"),
            ({"alpha_pattern": {"0": 4}}, "alpha_pattern: expected None, found {'0': 4}: another scale"),
            ({"target_modules": ["0", "1", "2"]}, "target_modules: expected ['0', '1'], found"),
            ({"base_model_name_or_path": "other"}, "base_model_name_or_path: expected None, found 'other'"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out: expected None, found True"),
        ],
    )
    def test_adapters_of_another_function_are_refused(
        self, tmp_path: Path, options: dict[str, Any], key: str
    ) -> None:
        for i, name in enumerate(("a", "b", "c")):
            peft_adapter(tmp_path / name, i)
        path = tmp_path / "b" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        with pytest.raises(BadCheckpointsError, match="1 of 3") as caught:
            register(tmp_path)
        (line,) = caught.value.problems
        assert line.startswith(f"{tmp_path / 'b'}: {key}")
        assert line.endswith("(as in a)")

    def test_what_changes_no_function_may_differ(self, tmp_path: Path) -> None:
        peft_adapter(tmp_path / "a", 0)
        peft_adapter(tmp_path / "b", 1, lora_dropout=0.5, target_modules=["1", "0"])
        collection, _ = register(tmp_path)
        assert len(collection) == 2

    def test_keys_that_older_versions_lack_count_as_unset(self) -> None:
        new = {
            "peft_type": "LORA",
            "r": 4,
            "use_dora": False,
            "rank_pattern": {},
            "layers_to_transform": None,
        }
        check_same_function({"peft_type": "LORA", "r": 4}, new)
        with pytest.raises(RPGError, match="use_dora: expected None, found True"):
            check_same_function({**new, "use_dora": True}, {"peft_type": "LORA", "r": 4})


class TestRegistering:
    def save(self, root: Path) -> list[Any]:
        """Three adapters, two of which have the same products."""
        from safetensors.torch import load_file, save_file

        models = [peft_adapter(root / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
        weights = root / "b" / "adapter_model.safetensors"
        save_file(turned(load_file(weights), 5), weights)
        return models

    def test_equal_products_in_other_factors_are_told(self, tmp_path: Path) -> None:
        self.save(tmp_path)
        notes: list[str] = []
        register(tmp_path, note=notes.append)
        (line,) = notes
        assert line.startswith("b and a: the factors of these adapters differ more (")
        assert "(0.00; 0 is equal" in line
        assert "--canonical-factors" in line

    def test_canonical_factors_hold_later_and_do_what_peft_says(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        models = self.save(tmp_path)
        notes: list[str] = []
        register(tmp_path, canonical_factors=True, note=notes.append)
        assert notes == []
        collection = Collection.load(tmp_path)
        found = {entry.file: collection.read_checked(entry) for entry in collection.entries}
        for name, tensor in found["a"].items():
            torch.testing.assert_close(found["b"][name], tensor, rtol=1e-4, atol=1e-5)
        values = torch.randn(7, 6)
        expected = models[2](values)
        assert (expected - models[2].get_base_model()(values)).abs().max() == 0
        peft.set_peft_model_state_dict(models[2], found["c"])
        torch.testing.assert_close(models[2](values), expected, rtol=1e-4, atol=1e-5)
        register(tmp_path)
        assert Collection.load(tmp_path).reading.canonical_factors
        register(tmp_path, canonical_factors=False)
        assert not Collection.load(tmp_path).reading.canonical_factors
