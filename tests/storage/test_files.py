"""Files and directories are written as a whole or not at all, and nothing is left behind."""

import hashlib
import json
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import pytest

from rpg.errors import RPGError
from rpg.storage.directories import replacing_directory
from rpg.storage.files import AtomicFile, read_json, replacing_file, sha256, write_json, write_text

ERRORS = [OSError(28, "No space left on device"), ValueError("x"), KeyboardInterrupt()]


def names(directory: Path) -> list[str]:
    return sorted(child.name for child in directory.iterdir())


class TestReplacingFile:
    def test_replaces_as_a_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b.txt"
        write_text(path, "one")
        with replacing_file(path) as temporary:
            temporary.write_text("two")
            assert path.read_text() == "one"
            assert temporary.parent == path.parent
        assert path.read_text() == "two"
        assert names(path.parent) == ["b.txt"]

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), ValueError("x"), KeyboardInterrupt()]
    )
    def test_an_error_leaves_the_earlier_file(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "b.txt"
        write_text(path, "one")
        expected = RPGError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected) as caught, replacing_file(path) as temporary:
            temporary.write_text("half")
            raise error
        if isinstance(error, OSError):
            assert str(caught.value) == f"{path}: cannot be written: No space left on device"
        assert path.read_text() == "one"
        assert names(tmp_path) == ["b.txt"]

    def test_nothing_written_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RPGError), replacing_file(tmp_path / "b.txt"):
            pass
        assert names(tmp_path) == []

    @pytest.mark.parametrize(
        "place",
        [
            lambda root: root / "file" / "below",
            lambda root: root / "directory",
            lambda root: root / ("n" * 254),
            lambda root: Path("/"),
            lambda root: Path("/proc/nowhere/x"),
        ],
    )
    def test_impossible_targets_are_refused(self, tmp_path: Path, place: Callable[[Path], Path]) -> None:
        (tmp_path / "file").write_text("x")
        (tmp_path / "directory").mkdir()
        with pytest.raises(RPGError, match=": cannot be written: "):
            write_text(place(tmp_path), "hello")
        assert names(tmp_path) == ["directory", "file"]


class TestAtomicFile:
    def test_two_writers_of_one_target_have_their_own_files(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        abandoned, successor = AtomicFile(path), AtomicFile(path)
        abandoned.temporary.write_text("half")
        successor.temporary.write_text("whole")
        assert fnmatch(abandoned.temporary.name, f".a.txt.{os.getpid()}.*.partial")
        successor.commit()
        abandoned.discard()
        assert path.read_text() == "whole"
        assert names(tmp_path) == ["a.txt"]

    def test_commits_from_another_thread(self, tmp_path: Path) -> None:
        file = AtomicFile(tmp_path / "below" / "a.txt")
        file.temporary.write_text("whole")
        with ThreadPoolExecutor(1) as threads:
            threads.submit(file.commit).result()
        assert (tmp_path / "below" / "a.txt").read_text() == "whole"

    def test_discard_leaves_the_target_and_may_be_repeated(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("one")
        file = AtomicFile(path)
        file.temporary.write_text("two")
        file.discard()
        file.discard()
        assert path.read_text() == "one"
        assert names(tmp_path) == ["a.txt"]

    def test_a_failed_commit_removes_the_temporary_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        file = AtomicFile(tmp_path / "a")
        file.temporary.write_text("one")
        with pytest.raises(RPGError, match="a: cannot be written: Is a directory"):
            file.commit()
        assert names(tmp_path) == ["a"]


class TestReplacingDirectory:
    def test_replaces_as_a_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "run"
        for text in ("one", "two"):
            with replacing_directory(path) as temporary:
                (temporary / text).write_text(text)
            assert names(path) == [text]
        assert names(path.parent) == ["run"]
        assert stat.S_IMODE(path.stat().st_mode) == 0o755

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), ValueError("x"), KeyboardInterrupt()]
    )
    def test_an_error_leaves_the_earlier_directory(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "run"
        path.mkdir()
        (path / "one").touch()
        expected = RPGError if isinstance(error, OSError) else type(error)
        with pytest.raises(expected), replacing_directory(path) as temporary:
            (temporary / "half").touch()
            raise error
        assert names(path) == ["one"]
        assert names(tmp_path) == ["run"]

    def test_a_failed_rename_puts_the_earlier_directory_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "run"
        path.mkdir()
        (path / "one").touch()
        rename = Path.rename

        def failing(self: Path, target: Path) -> Path:
            if self.suffix == ".partial":
                raise OSError(5, "Input/output error")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(RPGError, match="Input/output error"), replacing_directory(path):
            pass
        assert names(path) == ["one"]
        assert names(tmp_path) == ["run"]

    def test_a_file_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("precious")
        refused = pytest.raises(RPGError, match="run: cannot be written: Not a directory")
        with refused, replacing_directory(tmp_path / "run"):
            raise AssertionError("not reached")
        assert (tmp_path / "run").read_text() == "precious"
        assert names(tmp_path) == ["run"]

    def test_a_link_stays_and_its_target_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "target")
        with replacing_directory(tmp_path / "run") as temporary:
            (temporary / "one").touch()
        assert (tmp_path / "run").is_symlink()
        assert names(tmp_path / "target") == ["one"]
        assert names(tmp_path) == ["run", "target"]


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from rpg.storage.directories import replacing_directory

    path, when = Path(sys.argv[1]), sys.argv[2]
    rename = Path.rename

    def killing(self, target):
        result = rename(self, target)
        if str(target).endswith(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.rename = killing
    with replacing_directory(path) as temporary:
        (temporary / "two").touch()
        if when == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "waiting":
            print("ready", flush=True)
            sys.stdin.read()
"""


def replacing_process(path: Path, when: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


class TestLeftovers:
    """Directories left by processes that were killed while they replaced one."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        path = tmp_path / "run"
        path.mkdir()
        (path / "one").touch()
        return path

    def killed(self, path: Path, when: str) -> None:
        with replacing_process(path, when) as process:
            process.communicate()
        assert process.returncode == -signal.SIGKILL

    @pytest.mark.parametrize("when", ["writing", "/run"])
    def test_leftovers_are_removed_by_the_next_writer(self, run: Path, when: str) -> None:
        self.killed(run, when)
        assert len(names(run.parent)) == 2
        with replacing_directory(run) as temporary:
            assert sorted(names(run.parent)) == sorted(["run", temporary.name])
            (temporary / "three").touch()
        assert names(run.parent) == ["run"]
        assert names(run) == ["three"]

    def test_a_directory_that_was_moved_away_is_restored(self, run: Path) -> None:
        self.killed(run, ".previous")
        assert not run.exists()
        with pytest.raises(ValueError), replacing_directory(run):
            raise ValueError
        assert names(run) == ["one"]
        assert names(run.parent) == ["run"]

    def test_an_unfinished_directory_is_not_restored(self, run: Path) -> None:
        self.killed(run, "/run")
        shutil.rmtree(run)
        left = names(run.parent)
        with pytest.raises(ValueError), replacing_directory(run):
            raise ValueError
        assert names(run.parent) == left

    def test_the_directory_of_a_living_process_stays(self, run: Path) -> None:
        with replacing_process(run, "waiting") as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            with replacing_directory(run) as temporary:
                (temporary / "three").touch()
            assert names(run) == ["three"]
            process.communicate()
        assert process.returncode == 0
        assert names(run) == ["two"]
        assert names(run.parent) == ["run"]

    def test_only_directories_that_rpg_made_on_this_machine_are_removed(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(socket, "gethostname", lambda: "elsewhere")
            with pytest.raises(ValueError), replacing_directory(run) as temporary:
                (run.parent / temporary.name).rename(run.parent / "kept")
                raise ValueError
            (run.parent / "kept").rename(temporary)
        others = [".run.mine.partial", ".run.abcdefgh.partial", ".run.previous", ".running.x.partial"]
        for other in others:
            (run.parent / other).mkdir()
        with replacing_directory(run) as mine:
            (mine / "three").touch()
        assert names(run.parent) == sorted(["run", temporary.name, *others])


class TestJson:
    def test_round_trip(self, tmp_path: Path) -> None:
        value = {"a": [1, 2.5, None, True], "ü": "ß\n"}
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json", "a value") == value
        assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_is_never_written(self, tmp_path: Path, value: float) -> None:
        write_json(tmp_path / "a.json", 1)
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(tmp_path / "a.json", [value])
        assert json.loads((tmp_path / "a.json").read_text()) == 1

    @pytest.mark.parametrize("content", [b"", b"{", b'{"a":1} x', b"\xff\xfe", b"[" * 100_000, b"1" * 4301])
    def test_not_json(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(RPGError, match=r"a\.json: cannot be read as a manifest: .") as caught:
            read_json(tmp_path / "a.json", "a manifest")
        assert "\n" not in str(caught.value)

    def test_missing_and_directory(self, tmp_path: Path) -> None:
        with pytest.raises(RPGError, match=r"b\.json: not found; expected a manifest$"):
            read_json(tmp_path / "b.json", "a manifest")
        with pytest.raises(RPGError, match=r"cannot be read as a manifest: Is a directory$"):
            read_json(tmp_path, "a manifest")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_permission_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RPGError, match="Permission denied"):
        write_text(tmp_path / "a", "x")
    tmp_path.chmod(0o700)


def test_unfinished_files_of_killed_writers_are_left_out(tmp_path):
    with replacing_directory(tmp_path / "run") as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / ".model.safetensors.4711.partial").write_text("half")
        (temporary / "part" / ".tmpA1MBfC").write_text("half")
        (temporary / "part" / "model.safetensors").write_text("whole")
    assert [path.name for path in (tmp_path / "run" / "part").iterdir()] == ["model.safetensors"]
