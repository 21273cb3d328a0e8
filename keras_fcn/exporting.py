"""Nets for programs without Keras: ONNX, and TensorFlow's SavedModel."""

import contextlib
import importlib.util
import os
import pathlib
import secrets
import shutil
import tempfile
import warnings

import keras
import numpy as np

from keras_fcn import files, weights

# The backends that write each, with Keras 3.15. PyTorch's exporter follows one picture:
# what depends on its size, such as whether a pooling pads, would be so at every size.
BACKENDS = {
    "ONNX for pictures of one size": ("tensorflow", "torch"),
    "ONNX for pictures of any size": ("tensorflow",),
    "a SavedModel": ("tensorflow",),
}
FORMATS = {"ONNX": "onnx", "SavedModel": "tf_saved_model"}  # Keras' names
# What ONNX takes, on each backend.
PACKAGES = {
    "tensorflow": ("onnx", "onnxruntime", "tf2onnx"),
    "torch": ("onnx", "onnxruntime", "onnxscript"),
}
# Of ONNX from TensorFlow: its exporter takes some 400 bytes of memory for each.
MAX_PARAMETERS = 20_000_000
TOLERANCE = 1e-5  # of the largest logit: runtimes add up in another order
SIZES = ((225, 256), (242, 239), (263, 230))  # to compare at; classifiers want 224


def export(model, path, *, size=None):
    """Writes a net for programs without Keras: ONNX, or TensorFlow's SavedModel.

    In goes what the net takes, float32, RGB 0-255 for most: `image`, or `color` and
    `hha`. Out come the logits of each pixel, called `logits`, or as the head. An ONNX
    file is run before it is kept, and must give the logits of the net.

    Args:
        model: A net that `fcn`, `late_fusion` or `classifier` built, in float32.
        path: `net.onnx`; or a folder, a name without suffix, for a SavedModel.
        size: (height, width) of the pictures, in pixels, where a program wants it
            fixed; any size if None. The TensorFlow backend exports all of this, but
            ONNX of large nets, PyTorch ONNX of one size, JAX nothing; a checkpoint
            loads on each.

    Raises:
        ValueError: If the net, the path or the backend is another one, or if what was
            written gives other logits, in which case it is not kept.
        OSError: If it cannot be written, or if a package is missing.
    """
    weights.check_functional(model)
    path = pathlib.Path(path)
    check_path(path, size)
    policies = {layer.compute_dtype for layer in model.layers}
    if policies != {"float32"}:
        raise ValueError(
            f"{model.name} computes in {' and '.join(sorted(policies))}; expected "
            "float32: load it again without mixed precision."
        )
    _check_memory(model, path)
    signature = _signature(model, size)
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix == ".onnx":
            part = pathlib.Path(folder) / "net.onnx"
            _write_onnx(model, part, signature)
            _compare(model, part, size)
            with files.replacing(path) as file, open(part, "rb") as source:
                shutil.copyfileobj(source, file)
        else:
            part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            try:
                _run_exporter(model, part, "SavedModel", signature)
                os.rename(part, path)
            finally:
                shutil.rmtree(part, ignore_errors=True)


def check_path(path, size=None):
    """Checks that a net can be exported so, before it is built.

    Args:
        path: As in `export`, a `pathlib.Path`.
        size: As in `export`.

    Raises:
        ValueError: If not.
        OSError: If a package is missing that it takes.
    """
    if path.suffix not in (".onnx", ""):
        raise ValueError(
            f"{path} was given to export to; expected a name that ends in .onnx, or "
            "one without suffix, of a folder for TensorFlow's SavedModel."
        )
    if path.is_dir() or (path.exists() and not path.suffix):
        raise ValueError(f"{path} exists; expected a name that is free.")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder; expected one to write to.")
    if size is not None and min(size) < 1:
        raise ValueError(f"size={size} was given; expected pixels from 1.")
    kind = f"ONNX for pictures of {'one' if size else 'any'} size"
    kind = kind if path.suffix else "a SavedModel"
    if keras.backend.backend() not in BACKENDS[kind]:
        raise ValueError(
            f"{path} would be {kind}, which Keras does not write on the "
            f"{keras.backend.backend()} backend; set KERAS_BACKEND to "
            f"{' or '.join(BACKENDS[kind])}, where the same checkpoint can be loaded"
            f"{', or say one size' * ('any' in kind)}."
        )
    packages = PACKAGES[keras.backend.backend()] if path.suffix else ()
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise OSError(
            f"To write {path} takes {' and '.join(missing)}, which are not installed; "
            'install them with pip install ".[export]" in the checkout.'
        )


def _check_memory(model, path):
    many = model.count_params() > MAX_PARAMETERS
    if many and path.suffix == ".onnx" and keras.backend.backend() == "tensorflow":
        raise ValueError(
            f"{model.name} has {model.count_params():,} parameters, for which "
            "TensorFlow's exporter takes more memory than most machines have; expected "
            f"{MAX_PARAMETERS:,} at most. Set KERAS_BACKEND to torch, and say one size."
        )


def _signature(model, size):
    """What the net takes, with the names of its inputs, as Keras' exporters want it."""

    def spec(tensor):
        shape = (None, *(size or (None, None)), tensor.shape[-1])
        return keras.InputSpec("float32", shape, name=tensor.name)

    return [keras.tree.map_structure(spec, model.input)]


@contextlib.contextmanager
def _in_a_sentence(model, kind):
    """What exporters cannot write they say in many ways, after many lines."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{model.name} cannot be written as {kind} on the "
            f"{keras.backend.backend()} backend ({reason}); try the other one of "
            "tensorflow and torch, with a `size`."
        ) from error


def _run_exporter(model, path, kind, signature):
    with warnings.catch_warnings(), _in_a_sentence(model, kind):
        warnings.simplefilter("ignore")  # they speak of the exporters themselves
        model.export(path, FORMATS[kind], verbose=False, input_signature=signature)


def _write_onnx(model, path, signature):
    """Writes ONNX, its outputs in an order and with names that are known."""
    heads = model.output if isinstance(model.output, dict) else {"logits": model.output}
    flat = keras.Model(model.input, list(heads.values()), name=model.name)
    _run_exporter(flat, path, "ONNX", signature)
    import onnx

    net = onnx.load(path)
    names = {old.name: new for old, new in zip(net.graph.output, heads, strict=True)}
    for node in net.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in net.graph.output:
        value.name = names[value.name]
    for value in (*net.graph.input, *net.graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim, axis in zip(dims, ("batch", "height", "width", ""), strict=True):
            if not dim.dim_value:
                dim.dim_param = axis
    with _in_a_sentence(model, "ONNX"):
        onnx.checker.check_model(net)
    onnx.save(net, path)


def _compare(model, path, size):
    """Makes sure that the file gives the logits of the net, at `SIZES` or the one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    heads = [output.name for output in session.get_outputs()]
    random = np.random.default_rng(0)
    for height, width in [size] if size else SIZES:
        pictures = {
            tensor.name: random.uniform(0, 255, (1, height, width, tensor.shape[-1]))
            for tensor in model.inputs
        }
        pictures = {name: array.astype("float32") for name, array in pictures.items()}
        wanted = model.predict_on_batch(
            pictures if isinstance(model.input, dict) else pictures[model.input.name]
        )
        wanted = wanted if isinstance(wanted, dict) else {"logits": wanted}
        for head, found in zip(heads, session.run(heads, pictures), strict=True):
            error = np.abs(found - wanted[head]).max(initial=0)
            if not error <= TOLERANCE * np.abs(wanted[head]).max(initial=0):
                raise ValueError(
                    f"{model.name} as ONNX gives {head} that are off by {error:.2g} at "
                    f"{height} x {width}; expected those of the net. Try another "
                    "backend."
                )
