"""Presets and overrides end in a valid Config, or in one line that names the key."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from rpg.config import (
    Config,
    DenoiserKind,
    Normalisation,
    RecurrentKind,
    generator_config_from_yaml,
    load_config,
    save_config,
    to_plain,
)
from rpg.errors import RPGError

CONFIGS = Path(__file__).parents[2] / "configs"


class TestLoading:
    def test_defaults_preset_and_overrides(self, preset: Path) -> None:
        config = load_config(
            preset,
            [
                "train.learning_rate=1",
                "generator.denoiser.kind=unet",
                "generator.denoiser.channels=[1,8,16,8,1]",
                "shard.normalisation=zscore",
                "ray.num_cpus=2",
                "ray.num_cpus=null",
            ],
        )
        assert config.train.steps == 7
        assert config.train.learning_rate == 1.0
        assert type(config.train.learning_rate) is float
        assert config.generator.recurrent.kind is RecurrentKind.lstm
        assert config.generator.denoiser.kind is DenoiserKind.unet
        assert config.generator.denoiser.channels == [1, 8, 16, 8, 1]
        assert config.shard.normalisation is Normalisation.zscore
        assert config.ray.num_cpus is None
        assert config.output == "runs/test"

    def test_an_empty_preset_is_all_defaults(self, tmp_path: Path) -> None:
        (tmp_path / "empty.yaml").write_text("")
        assert load_config(tmp_path / "empty.yaml") == dataclasses.replace(Config(), output="runs/run")

    def test_the_last_override_wins(self, preset: Path) -> None:
        assert load_config(preset, ["seed=1", "seed=2"]).seed == 2

    def test_a_value_may_be_a_mapping(self, preset: Path) -> None:
        config = load_config(preset, ["tune.space={generator.denoiser.width: [16, 64], seed: [1]}"])
        assert config.tune.space == {"generator.denoiser.width": [16, 64], "seed": [1]}

    def test_a_value_may_hold_an_equals_sign(self, preset: Path) -> None:
        assert load_config(preset, ["name=a=b"]).name == "a=b"

    def test_saved_and_loaded(self, preset: Path, tmp_path: Path) -> None:
        config = load_config(preset, ["generator.sampling.solver=ddpm", "train.weight_decay=0.1"])
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        save_config(config.generator, tmp_path / "config.yaml")
        assert generator_config_from_yaml(tmp_path / "config.yaml") == config.generator

    def test_plain_values(self) -> None:
        plain = to_plain(Config())
        assert plain["generator"]["denoiser"]["kind"] == DenoiserKind.adaln_mlp.name
        assert type(plain["generator"]["denoiser"]["kind"]) is str
        assert plain["output"] == "runs/run"

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_preset_is_valid(self, path: Path) -> None:
        load_config(path)


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("train.step=3", "unknown key 'train.step'; did you mean 'train.steps'?"),
            ("trian.steps=3", "unknown key 'trian.steps'; did you mean 'train'?"),
            ("generator.recurent.kind=lstm", "did you mean 'generator.recurrent'?"),
            ("train.steps.x=3", "unknown key 'train.steps.x'"),
            ("zzz=3", "expected one of name, output, seed"),
            ("=3", "unknown key ''"),
            ("train=3", "'train' is a section; expected one of its keys, such as 'train.steps'"),
            ("train.steps", "override 'train.steps': expected key=value"),
        ],
    )
    def test_of_overrides(self, preset: Path, override: str, words: str, refusal: Callable[..., str]) -> None:
        assert words in refusal(preset, override)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("train: {step: 3}", "unknown key 'train.step'; did you mean 'train.steps'?"),
            ("trian: {steps: 3}", "unknown key 'trian'; did you mean 'train'?"),
            ("generator: {denoiser: {widht: 3}}", "did you mean 'generator.denoiser.width'?"),
            ("train: 3", "'train' is a section"),
            ("train:", "'train' is a section"),
            ("1: 2", "unknown key '1'"),
            ("- a\n- b", "expected a mapping of sections"),
            ("just text", "unknown key 'just text'"),
        ],
    )
    def test_of_files(self, tmp_path: Path, content: str, words: str, refusal: Callable[..., str]) -> None:
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        message = refusal(path)
        assert message.startswith(f"{path}: ")
        assert words in message


class TestBadFiles:
    @pytest.mark.parametrize(
        "content",
        [b"a: [", b"\tx", b": :", b"name: a\nname: b\n", b"\xff\xfe\x00", b"a: &a [*a]", b"name: ${nope}"],
    )
    def test_not_yaml(self, tmp_path: Path, content: bytes, refusal: Callable[..., str]) -> None:
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: ")
        with pytest.raises(RPGError, match=r"bad\.yaml: "):
            generator_config_from_yaml(path)

    def test_yaml_tags_are_not_executed(self, tmp_path: Path, refusal: Callable[..., str]) -> None:
        path, harm = tmp_path / "bad.yaml", tmp_path / "harm"
        path.write_text(f"name: !!python/object/apply:os.mkdir ['{harm}']")
        assert "not valid YAML" in refusal(path)
        assert not harm.exists()

    def test_missing_or_a_directory(self, tmp_path: Path, refusal: Callable[..., str]) -> None:
        assert "not found; expected a YAML config" in refusal(tmp_path / "none.yaml")
        assert str(tmp_path) in refusal(tmp_path)
        with pytest.raises(RPGError, match="not found; expected a generator's configuration"):
            generator_config_from_yaml(tmp_path / "none.yaml")

    @pytest.mark.parametrize("content", ["- a", "3", "recurrent: 3", "train: {steps: 3}"])
    def test_not_a_generators_configuration(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(RPGError, match=r"config\.yaml: "):
            generator_config_from_yaml(tmp_path / "config.yaml")


class TestValues:
    @pytest.mark.parametrize(
        "override",
        [
            "train.steps=abc",
            "train.steps=2.5",
            "train.steps=true",
            "train.steps=",
            "train.steps=[1",
            "train.steps={a: 1}",
            "evaluate.noise_levels=[a]",
            "evaluate.noise_levels=3",
            "generator.recurrent.kind=gru",
            "name=null",
            "output=${output}",
            "output=${nope}",
        ],
    )
    def test_of_the_wrong_type(self, preset: Path, override: str, refusal: Callable[..., str]) -> None:
        assert override.partition("=")[0] in refusal(preset, override)
