"""Fixtures for every test: device, dtype, and the settings that make runs quick and repeatable."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "odlkit", deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("odlkit")


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request) -> torch.device:
    """Every device of this machine."""
    return torch.device(request.param)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request) -> torch.dtype:
    """Both working precisions."""
    return request.param


@pytest.fixture
def report_keys() -> set[str]:
    """What the report of every task says."""
    return {
        *("task", "model", "status", "iterations", "seconds", "device", "energies", "certificate", "accepted", "rejected"),
        *("input", "output", "settings", "notes", "versions"),
    }


@pytest.fixture(autouse=True)
def _seeded():
    """The global generator is fixed for each test; tests that draw more than noise use a generator of their own."""
    torch.manual_seed(0)
