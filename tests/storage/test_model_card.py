from __future__ import annotations

import pytest

from swaft.storage.model_card import write_card

pytestmark = pytest.mark.unit


def card(folder, **fields):
    write_card(folder, **{"title": "mine", "body": ["What it is."]} | fields)
    return (folder / "README.md").read_text()


def test_a_card_says_what_the_weights_are_and_what_opens_them(tmp_path):
    said = card(tmp_path, library="peft")
    assert said == "---\nlibrary_name: peft\ntags:\n- swaft\n---\n\n# mine\n\nWhat it is.\n"


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/mt5-base"])
def test_a_base_model_on_the_hub_is_named(tmp_path, name):
    assert f'\nbase_model: "{name}"\n---\n' in card(tmp_path, base_model=name)


@pytest.mark.parametrize("name", [None, "", "/models", "./mine", "~/mine", "a/b/c", 5])
def test_a_base_model_that_is_no_name_on_the_hub_is_not_named(tmp_path, name):
    assert "base_model" not in card(tmp_path, base_model=name)


def test_a_base_model_that_is_a_folder_here_is_not_named(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in card(tmp_path, base_model="out")


def test_a_title_stays_a_title(tmp_path):
    assert "\n# one two\n" in card(tmp_path, title="one\n  two")
