"""README, docs/ and configs/: what they say of the script."""

import dataclasses

import pytest
from conftest import REPO, tracked

import train_gpt

TRACKED = tracked()
CONFIGS = [path for path in TRACKED if path.parent.name == "configs"]
RECORDED = [path for path in TRACKED if path.name == "config.env"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_valid(path):
    train_gpt.load_settings({"CONFIG": str(path)}, check_places=False)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_the_configuration_of_a_record_is_valid(path):
    train_gpt.load_settings({"CONFIG": str(path)}, check_places=False)


def test_the_baseline_is_the_default():
    path = str(REPO / "configs" / "baseline.env")
    told = train_gpt.load_settings({"CONFIG": path}, check_places=False)
    assert dataclasses.replace(told, config="") == train_gpt.load_settings({}, check_places=False)
