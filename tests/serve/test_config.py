"""The service's config: what is refused, and with which words."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpg.errors import RPGError
from serve.command import main
from serve.config import load_serve_config

DIGEST = hashlib.sha256(b"secret").hexdigest()


def written(directory: Path, **changes: Any) -> Path:
    (directory / "roots" / "small").mkdir(parents=True, exist_ok=True)
    config = {
        "storage": str(directory / "storage"),
        "roots": [str(directory / "roots")],
        "generators": [{"name": "small", "path": str(directory / "roots" / "small"), "num_gpus": 0}],
        "tokens": [{"sha256": DIGEST, "owner": "alice"}],
    }
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}))
    return path


def test_defaults(tmp_path: Path) -> None:
    config = load_serve_config(written(tmp_path))
    assert (config.http.host, config.auth, config.tokens[0].scopes) == ("127.0.0.1", True, ["submit", "read"])
    assert load_serve_config(written(tmp_path, auth=False, tokens=[])).auth is False


def test_off_is_a_word_of_yaml(tmp_path: Path) -> None:
    path = written(tmp_path, tokens=[])
    path.write_text(path.read_text() + "auth: off\n")
    assert load_serve_config(path).auth is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storrage": "x"}, "unknown key 'storrage'; did you mean 'storage'?"),
        ({"limits": {"step": 1}}, "unknown key 'limits.step'; did you mean 'limits.steps'?"),
        (
            {"generators": [{"name": "a", "pth": "x"}]},
            "unknown key 'generators[0].pth'; did you mean 'generators[0].path'?",
        ),
        ({"generators": ["a"]}, "'generators[0]': expected a mapping, got 'a'"),
        ({"storage": ""}, "storage: expected a directory or URI"),
        ({"cache": {"gigabytes": float("inf")}}, "cache.gigabytes: expected a finite value above 0, got inf"),
        ({"generators": []}, "generators: expected at least one"),
        ({"generators": [{"name": "A"}]}, "generators[0].name: expected small letters"),
        ({"generators": [{"name": "a"}]}, "generators[0].path: expected a directory or URI"),
        (
            {"generators": [{"name": "a", "path": "/etc"}]},
            "generators[0].path: /etc lies below none of roots",
        ),
        ({"tokens": []}, "tokens: expected at least one; 'auth: off' asks for none"),
        (
            {"tokens": [{"sha256": "secret", "owner": "a"}]},
            "tokens[0].sha256: expected 64 hexadecimal digits",
        ),
        ({"tokens": [{"sha256": DIGEST}]}, "tokens[0].owner: expected a name"),
        (
            {"tokens": [{"sha256": DIGEST, "owner": "a", "scopes": ["write"]}]},
            "tokens[0].scopes: expected submit, read, admin, got 'write'",
        ),
        (
            {"tokens": [{"sha256": DIGEST, "owner": "a", "expires": "2027-01-01T00:00:00"}]},
            "tokens[0].expires: expected a time with its zone",
        ),
        (
            {"tokens": [{"sha256": DIGEST, "owner": "a", "expires": "soon"}]},
            "tokens[0].expires: expected an ISO 8601 time, got 'soon'",
        ),
        ({"auth": False, "http": {"host": "0.0.0.0"}}, "http.host: with 'auth: off' expected 127.0.0.1"),
        ({"limits": {"steps": 0}}, "limits.steps: expected at least 1, got 0"),
        ({"limits": {"queued_models": 5}}, "limits.models_per_job: expected at most queued_models = 5"),
        ({"retention": {"days": -1}}, "retention.days: expected at least 0, got -1"),
        ({"http": {"port": 70000}}, "http.port: expected 1 to 65535, got 70000"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(RPGError) as refusal:
        load_serve_config(path)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("way_out", ["roots/../outside", "roots/link"])
@pytest.mark.parametrize("key", ["path", "collection", "images"])
def test_what_lies_outside_the_roots_is_refused(tmp_path: Path, way_out: str, key: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / "link").symlink_to(tmp_path / "outside")
    entry = {"name": "a", "path": str(tmp_path / "roots"), key: str(tmp_path / way_out)}
    path = written(tmp_path, generators=[entry])
    with pytest.raises(RPGError, match=rf"generators\[0\]\.{key}: .* lies below none of roots"):
        load_serve_config(path)


def test_the_command_tells_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    line = capsys.readouterr().err
    assert line == f"serve: error: {tmp_path}/none.yaml: not found; expected the service's YAML config\n"


def run_command(path: Path) -> subprocess.CompletedProcess[str]:
    """`rpg serve CONFIG`, as users have it."""
    import os
    import sys

    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [str(Path(sys.executable).parent / "rpg"), "serve", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.slow
def test_more_generators_than_gpus_end_in_one_line(tmp_path: Path, saved: Path) -> None:
    generators = [{"name": name, "path": str(saved), "num_gpus": 1} for name in ("a", "b")]
    path = written(tmp_path, roots=[str(saved.parent)], generators=generators, num_cpus=2)
    result = run_command(path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "rpg: error: generators: their replicas need 2 GPUs (a: 1, b: 1), the cluster has "
    )
    assert "Traceback" not in result.stderr


def test_a_generator_that_is_not_there_ends_in_one_line(tmp_path: Path) -> None:
    result = run_command(written(tmp_path, num_cpus=2))
    assert result.returncode == 2
    expected = f"{tmp_path}/roots/small/config.yaml: not found; expected a generator's configuration"
    assert result.stderr.splitlines()[-1] == f"rpg: error: {expected}"
