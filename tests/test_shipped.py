import shutil
import subprocess
from pathlib import Path

from nla_jax import shipped


def test_only_a_repository_that_tracks_the_library_names_its_commit(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    installed = tmp_path / "venv" / "site-packages" / "nla_jax" / "shipped.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(shipped.__file__, installed)
    monkeypatch.setattr(shipped, "__file__", str(installed))
    assert shipped.git_commit() == ""
    git("init", "-q")
    (tmp_path / "mine.txt").write_text("of the user")
    git("add", "mine.txt")
    git("commit", "-q", "-m", "of the user")
    assert len(git("rev-parse", "HEAD")) == 40
    assert shipped.git_commit() == ""
    git("add", str(installed.relative_to(tmp_path)))
    git("commit", "-q", "-m", "of the library")
    assert shipped.git_commit() == git("rev-parse", "HEAD")


def test_the_checkout_names_its_commit():
    root = Path(shipped.__file__).parents[1]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert shipped.git_commit() == head.stdout.strip()
