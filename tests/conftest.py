"""What all tests share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# PyTorch's threads, which otherwise spin while they wait, and hold up all beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import keras  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """Lets go of a module's nets: TensorFlow keeps the graphs of all, gigabytes."""
    yield
    keras.utils.clear_session()


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
