"""One thread a worker, a reproducible hypothesis profile, what a file enters."""

import os

import pytest
import torch
from hypothesis import settings

import kdpp
from kdpp.lab.plugins import import_file

torch.set_num_threads(1)
settings.register_profile("kdpp", derandomize=True, deadline=None, max_examples=15)
settings.load_profile("kdpp")

# docs/adding_a_solver.md, adding_a_method.md: what the file enters is tested with the rest.
if path := os.environ.get("KDPP_IMPORT"):
    import_file(path)


@pytest.fixture
def own_notes(tmp_path, monkeypatch):
    """A folder for caches, where `kdpp generate` notes places and digests, of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def solvers():
    """kdpp's solvers; what a test enters among them is gone after it."""
    before = dict(kdpp.SOLVERS)
    yield kdpp.SOLVERS
    kdpp.SOLVERS.clear()
    kdpp.SOLVERS.update(before)
