"""Imports scripts that lie in no package: tools, benchmarks."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def load(path):
    """Returns a script as a module.

    Args:
        path: From the root of the checkout.
    """
    path = ROOT / path
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
