"""The library on a real disk: layers, hand edits, broken and vanished files."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import pytest
from metaclaw_hooks.types import SkillRef

from metaclaw_plugin.skills.install import install_starter
from metaclaw_plugin.skills.library import Library, Watcher
from metaclaw_plugin.skills.skill_file import FILE_NAME, SHARED, render_skill, write_atomic
from tests.skill_cases import put


def test_an_agents_own_skill_shadows_the_shared_one_of_that_name(tmp_path: Path) -> None:
    put(tmp_path, SHARED, "greet", body="Shared way.")
    put(tmp_path, SHARED, "count", body="Count.")
    put(tmp_path, "alpha", "greet", body="Alpha's way.")
    library = Library(tmp_path)
    assert library.view("alpha").skills["greet"].body == "Alpha's way."
    assert library.view("beta").skills["greet"].body == "Shared way."
    assert set(library.view("beta").skills) == {"greet", "count"}


@pytest.mark.law(4)
def test_law_4_an_agent_never_sees_anothers_skills(tmp_path: Path) -> None:
    put(tmp_path, "alpha", "secret-way")
    library = Library(tmp_path)
    alpha_ref = library.view("alpha").skills["secret-way"].ref
    assert "secret-way" not in library.view("beta").skills
    assert library.view("beta").resolve([alpha_ref]) == ()


def test_edits_by_hand_are_picked_up_and_only_changed_views_are_rebuilt(tmp_path: Path) -> None:
    path = put(tmp_path, "alpha", "greet", body="Old.")
    put(tmp_path, "beta", "other")
    library = Library(tmp_path)
    alpha, beta = library.view("alpha"), library.view("beta")
    assert library.refresh() is False
    assert library.view("alpha") is alpha
    write_atomic(path, render_skill("greet", "When asked, answer.", "New."))
    assert library.refresh() is True
    assert library.view("alpha").skills["greet"].body == "New."
    assert alpha.skills["greet"].body == "Old.", "a view in hand must not change under its reader"
    assert library.view("beta") is beta
    shutil.rmtree(path.parent)
    assert library.refresh() is True
    assert library.view("alpha").skills == {}


def test_a_broken_file_is_reported_once_and_takes_nothing_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = put(tmp_path, "alpha", "greet", body="Good.")
    broken = tmp_path / "alpha" / "broken" / FILE_NAME
    write_atomic(broken, b"---\nname: [\n---\nx")
    write_atomic(tmp_path / "alpha" / "huge" / FILE_NAME, b"x" * 10_000_000)
    write_atomic(tmp_path / "alpha" / "copy" / FILE_NAME, path.read_bytes())
    with caplog.at_level(logging.ERROR):
        library = Library(tmp_path)
        library.refresh()
    assert set(library.view("alpha").skills) == {"greet"}
    causes = {problem.name: problem.message for problem in library.problems()}
    assert "not valid YAML" in causes["broken"]
    assert "10,000,000 bytes" in causes["huge"]
    assert "named 'greet' but lies in the folder 'copy'" in causes["copy"]
    assert sum("alpha/broken" in record.getMessage() for record in caplog.records) == 1
    counted = {("skill_files_broken", f"alpha/{name}"): 1 for name in ("broken", "huge", "copy")}
    assert library.take_counts() == counted
    assert library.take_counts() == {}


def test_a_skill_whose_file_breaks_serves_on_as_it_was(tmp_path: Path) -> None:
    path = put(tmp_path, "alpha", "greet", body="Good.")
    library = Library(tmp_path)
    write_atomic(path, b"half an ed")
    library.refresh()
    assert library.view("alpha").skills["greet"].body == "Good."
    assert [problem.name for problem in library.problems()] == ["greet"]
    write_atomic(path, render_skill("greet", "When asked, answer.", "Mended."))
    library.refresh()
    assert library.view("alpha").skills["greet"].body == "Mended."
    assert library.problems() == []


def test_a_root_deleted_while_serving_leaves_the_library_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "skills"
    put(root, SHARED, "greet")
    library = Library(root)
    shutil.rmtree(root)
    library.refresh()
    library.refresh()
    assert set(library.view("alpha").skills) == {"greet"}
    assert sum("the library stays as it was" in record.getMessage() for record in caplog.records) == 1
    assert sum(library.take_counts().values()) == 1
    put(root, SHARED, "count")
    library.refresh()
    assert set(library.view("alpha").skills) == {"count"}


def test_links_out_of_an_owners_folder_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "skills"
    outside = put(tmp_path, "elsewhere", "leak", body="Outside.")
    beta = put(root, "beta", "mine", body="Beta's.")
    (root / "alpha").mkdir(parents=True)
    (root / "alpha" / "leak").symlink_to(outside.parent)
    (root / "alpha" / "mine").symlink_to(beta.parent)
    (root / "linked").symlink_to(outside.parent.parent)
    library = Library(root)
    assert library.view("alpha").skills == {}
    assert library.view("linked").skills == {}
    assert {problem.name for problem in library.problems()} == {"leak", "mine"}
    assert all("link" in problem.message for problem in library.problems())


def test_folders_that_are_no_agents_and_hidden_ones_are_not_read(tmp_path: Path) -> None:
    put(tmp_path, "alpha", "greet")
    put(tmp_path, "Not An Agent", "greet")
    put(tmp_path / "alpha" / ".proposed", "x", "waiting")
    library = Library(tmp_path)
    assert library.owners() == ["alpha"]
    assert set(library.view("alpha").skills) == {"greet"}


def test_a_hook_may_name_only_what_its_agent_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "alpha", "greet")
    view = Library(tmp_path).view("alpha")
    chosen = view.resolve([SkillRef("greet", "?", False), SkillRef("nothing", "?", False)])
    assert [skill.name for skill in chosen] == ["greet"]
    assert "'nothing'" in caplog.text


def test_a_watcher_sees_an_edit_without_being_asked(tmp_path: Path) -> None:
    put(tmp_path, "alpha", "greet")
    library = Library(tmp_path)
    watcher = Watcher(library, interval=0.01)
    watcher.start()
    try:
        put(tmp_path, "alpha", "second")
        seen = threading.Event()
        for _ in range(500):
            if "second" in library.view("alpha").skills:
                seen.set()
                break
            seen.wait(0.01)
        assert seen.is_set()
    finally:
        watcher.stop()


def test_the_starter_set_fills_an_empty_library_once_and_every_file_of_it_is_valid(tmp_path: Path) -> None:
    root = tmp_path / "skills"
    assert install_starter(root) is True
    library = Library(root)
    assert library.problems() == []
    assert len(library.skills_of(SHARED)) >= 1
    first = next(iter(library.skills_of(SHARED)))
    shutil.rmtree(root / SHARED / first)
    assert install_starter(root) is False, "what the owner removed must stay removed"
    library.refresh()
    assert first not in library.skills_of(SHARED)
    assert [entry.name for entry in root.iterdir()] == [SHARED]
