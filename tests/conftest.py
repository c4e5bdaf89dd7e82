"""What every test gets: fixed seeds, NaN in torch.empty, one kernel cache for the whole run.

The kernel cache is a fresh private folder shared by all xdist workers, so that the C++ kernel is
compiled once a run and nothing compiled earlier is reused.
"""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the controller's environment reaches its workers
        folder = tempfile.mkdtemp(prefix="visionmamba-tests-")
        os.environ["XDG_CACHE_HOME"] = folder  # compiled kernels go there
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several processes share the cores
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    torch.set_num_threads(1 if hasattr(config, "workerinput") else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed every generator and fill uninitialised memory with NaN."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    on_gpu = request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def usual_algorithms(deterministic: None) -> None:
    """For a detector on a GPU: torchvision compiles another RoIAlign where all must repeat."""
    torch.use_deterministic_algorithms(False)
