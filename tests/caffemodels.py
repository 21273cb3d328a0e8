"""Writes .caffemodel files for nets of this package, in all of Caffe's formats."""

import h5py
import keras
import numpy as np
import scripts
from golden import golden

from keras_fcn.caffe import Layer
from keras_fcn.layers import BilinearUpsampling

V1_TYPES = {
    **golden.V1_TYPES,
    **{"LRN": 15, "Pooling": 17, "ReLU": 18, "Split": 22},
}
# Its writer says anything that the wire format can say.
fuzzer = scripts.load("benchmarks/fuzz_caffemodel.py")


def caffemodel(layers, version=2):
    """The bytes of `{name: Layer}` as Caffe writes them, now or before 2015."""
    if version == 2:
        return b"".join(
            fuzzer.v2_layer(
                name,
                layer.type,
                *(fuzzer.shape(b.shape) + fuzzer.data(b) for b in layer.blobs),
                bottoms=layer.bottoms,
                tops=layer.tops,
            )
            for name, layer in layers.items()
        )
    return b"".join(
        fuzzer.v1_layer(
            name,
            V1_TYPES[layer.type],
            *(fuzzer.legacy(b.shape) + fuzzer.data(b) for b in layer.blobs),
            bottoms=layer.bottoms,
            tops=layer.tops,
        )
        for name, layer in layers.items()
    )


def snapshot(layers, path, dtype="float32", diff=False):
    """Writes `{name: Layer}` as Net::ToHDF5 does, and returns the path.

    Where a name has a "/" it is a group within a group. Caffe itself makes such a
    group only where a layer before it bears the first part as its name, and ends
    otherwise: for want of intermediate groups.
    """
    with h5py.File(path, "w") as file:
        for root in ["data", "diff"][: 1 + diff]:
            file.create_group(root)
            for name, layer in layers.items():
                group = file[root].require_group(name)
                for i, blob in enumerate(layer.blobs):
                    value = blob if root == "data" else np.full_like(blob, np.nan)
                    group[str(i)] = value.astype(dtype)
    return path


def caffe_layers(model, seed=1):
    """What a caffemodel of this net holds: random kernels, the net's own constants."""
    rng, layers = np.random.default_rng(seed), {}
    for layer in model.layers:
        if isinstance(layer, BilinearUpsampling):
            channels, size = layer.output.shape[-1], layer.kernel_size
            kernel = golden.bilinear_kernel((channels, channels, size, size))
            layers[layer.name] = Layer("Deconvolution", [kernel])
        elif isinstance(layer, keras.layers.Rescaling):
            factors = np.full(layer.output.shape[-1], layer.scale, np.float32)
            layers[layer.name] = Layer("Scale", [factors])
        elif layer.weights:
            up = isinstance(layer, keras.layers.Conv2DTranspose)
            blobs = []
            for weight in layer.weights:
                shape = tuple(weight.shape)
                shape = (
                    shape if len(shape) == 1 else tuple(shape[i] for i in (3, 2, 0, 1))
                )
                blobs.append(rng.standard_normal(shape, dtype=np.float32))
            layers[layer.name] = Layer("Deconvolution" if up else "Convolution", blobs)
    return layers
