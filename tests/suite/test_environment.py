"""suite.environment: the commit that records name is the checkout's own, or none."""

import subprocess

import pytest

from suite import environment


def git(folder, *arguments):
    identity = ("-c", "user.name=x", "-c", "user.email=x@x")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit, and a folder in it."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("content")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    return tmp_path


@pytest.fixture
def commit_at(monkeypatch):
    def at(folder):
        monkeypatch.setattr(environment, "ROOT", folder)
        environment.commit.cache_clear()
        return environment.commit()

    yield at
    environment.commit.cache_clear()


def test_a_checkout_has_its_commit_and_says_when_files_differ(repository, commit_at):
    head = git(repository, "rev-parse", "HEAD")
    assert commit_at(repository) == head
    (repository / "untracked").touch()
    assert commit_at(repository) == head
    (repository / "inner" / "file").write_text("changed")
    assert commit_at(repository) == f"{head}+changes"


def test_a_copy_inside_another_repository_has_no_commit(repository, commit_at):
    assert commit_at(repository / "inner") == "unknown"


def test_a_worktree_and_a_repository_inside_another_have_their_own(repository, commit_at):
    git(repository, "worktree", "add", "--quiet", repository / "tree")
    git(repository / "tree", "commit", "--quiet", "--allow-empty", "-m", "two")
    assert commit_at(repository / "tree") == git(repository / "tree", "rev-parse", "HEAD")
    nested = repository / "nested"
    nested.mkdir()
    git(nested, "init", "--quiet")
    assert commit_at(nested) == "unknown", "a repository without a commit"
    git(nested, "commit", "--quiet", "--allow-empty", "-m", "three")
    assert commit_at(nested) == git(nested, "rev-parse", "HEAD")


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE"])
def test_variables_that_name_another_repository_mislead_nobody(repository, commit_at, monkeypatch, tmp_path, variable):
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    head = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv(variable, str(repository / ("inner" if variable == "GIT_WORK_TREE" else ".git")))
    assert commit_at(copy) == "unknown"
    assert commit_at(repository) == head


def test_a_repository_of_somebody_else_is_not_asked(repository, commit_at, monkeypatch):
    real = environment.subprocess.run

    def as_another(command, *, env, **others):  # git's own switch for its tests, which we take out of the environment
        return real(command, env={**env, "GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, **others)

    monkeypatch.setattr(environment.subprocess, "run", as_another)
    assert commit_at(repository) == "unknown"
