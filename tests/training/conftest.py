"""Fixtures of the tests of training."""

import pathlib

import jax
import pytest


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> pathlib.Path:
    """A folder in which compiled programs (and rendered images) are kept for all tests of this session."""
    folder = tmp_path_factory.mktemp("cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
