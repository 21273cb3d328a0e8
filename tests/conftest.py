"""What all tests share."""

import os
import random
import signal

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


@pytest.fixture
def _signals():
    """Gives the signals back to pytest, as a `fit` that is cut off does not."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A training that nothing stops: a folder of all its files, and its weights."""
    from trainings import uninterrupted

    return uninterrupted(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def target():
    """A net as it is trained there, of other weights."""
    from trainings import net

    model = net(seed=9)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture
def faults(record_property):
    """Tries all `cases`, or `few` (a twentieth) of them, and tells which failed."""

    def run(promise, cases, check, few=None):
        cases = list(cases)
        if os.environ.get("KERAS_FCN_FAULTS") != "full":
            chance = random.Random(promise)
            cases = few or chance.sample(cases, -(-len(cases) // 20))
        failed = []
        for case in cases:
            try:
                check(*case)
            except Exception as error:  # the table counts them all
                failed.append((case, error))
        record_property("promise", promise)
        record_property("cases", len(cases))
        record_property("failures", len(failed))
        if failed:
            error = failed[0][1]
            first = ", ".join(str(case) for case, _ in failed[:10])
            raise AssertionError(f"{len(failed)} of {len(cases)}: {first}") from error

    return run
