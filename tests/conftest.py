"""Fixtures that every test may use."""

import logging
import os
import pathlib

from tests import xla

os.environ.setdefault("XLA_FLAGS", xla.flags())  # before jax starts its backend
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would ask for a driver; see planning/gpus.py

import jax
import pytest
from absl import logging as absl_logging

jax.config.update("jax_default_matmul_precision", "highest")


# Files that take longest come first: at the end, one process would wait for the other.
_LONG = ("moe/expert_parallel_test.py", "train_test.py", "distributed_test.py", "preference_chain_test.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the files of _LONG to the front."""
    items.sort(key=lambda item: not str(item.path).endswith(_LONG))


_VERBOSITY = absl_logging.get_verbosity()


@pytest.fixture(autouse=True)
def _log_of_its_own():
    """Undoes what a command line that runs inside a test, or inside a fixture before it, does to the process's log."""
    logging.root.removeHandler(absl_logging.get_absl_handler())
    absl_logging.set_verbosity(_VERBOSITY)


@pytest.fixture(scope="session")
def goldens() -> pathlib.Path:
    """The folder of golden values; MOE_VLM_GOLDENS points the same tests at another folder of that layout."""
    return goldens_folder()


def goldens_folder() -> pathlib.Path:
    """Returns the goldens folder, for parametrising tests at collection."""
    folder = pathlib.Path(os.environ.get("MOE_VLM_GOLDENS", pathlib.Path(__file__).parent / "goldens"))
    if not folder.is_dir():
        raise FileNotFoundError(f"goldens folder {folder} does not exist; set MOE_VLM_GOLDENS to one.")
    return folder
