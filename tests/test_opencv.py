"""Whole nets that nobody recorded, against OpenCV's importer of Caffe nets."""

import numpy as np
import oracle
import pytest
from golden import golden

from keras_fcn import models

cv2 = pytest.importorskip("cv2")


class Prototxt:
    """Writes a net layer by layer, and keeps what golden.py needs to fill it."""

    def __init__(self, height, width):
        self.lines = ['input: "data"', "input_shape { dim: 1 dim: 3"]
        self.lines[1] += f" dim: {height} dim: {width} }}"
        self.layers, self.channels = [], {"data": 3}

    def add(self, kind, name, bottoms, settings, channels, top=None):
        sources, top = " ".join(f'bottom: "{x}"' for x in bottoms), top or name
        self.lines.append(
            f'layer {{ name: "{name}" type: "{kind}" {sources} top: "{top}" '
            f"{settings} }}"
        )
        self.channels[top] = channels
        return top

    def conv(self, x, name, n, k, pad=0, stride=1, group=1, relu=True):
        settings = f"num_output: {n} kernel_size: {k} pad: {pad} stride: {stride}"
        shapes = [[n, self.channels[x] // group, k, k], [n]]
        kind = "Convolution"
        self.layers.append({"name": name, "type": kind, "shapes": shapes})
        settings = f"convolution_param {{ {settings} group: {group} }}"
        x = self.add(kind, name, [x], settings, n)
        return self.add("ReLU", f"relu_{name}", [x], "", n, top=x) if relu else x

    def pool(self, x, name, k):
        settings = f"pooling_param {{ pool: MAX kernel_size: {k} stride: 2 }}"
        return self.add("Pooling", name, [x], settings, self.channels[x])

    def norm(self, x, name):
        settings = "lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 }"
        return self.add("LRN", name, [x], settings, self.channels[x])

    def upsample(self, x, name, k, stride):
        n = self.channels[x]
        kind = "Deconvolution"
        self.layers.append({"name": name, "type": kind, "shapes": [[n, n, k, k]]})
        settings = f"num_output: {n} kernel_size: {k} stride: {stride}"
        settings = f"convolution_param {{ {settings} bias_term: false }}"
        return self.add(kind, name, [x], settings, n)

    def crop(self, x, onto, name, offset):
        settings = f"crop_param {{ axis: 2 offset: {offset} }}"
        return self.add("Crop", name, [x, onto], settings, self.channels[x])

    def sum(self, x, y, name):
        return self.add("Eltwise", name, [x, y], "", self.channels[x])


def vgg16(net, width):
    x = "data"
    for block, (n, repeats) in enumerate(
        [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1
    ):
        for i in range(1, repeats + 1):
            pad = 100 if block == i == 1 else 1
            x = net.conv(x, f"conv{block}_{i}", int(n * width), 3, pad)
        x = net.pool(x, f"pool{block}", 2)
    x = net.conv(x, "fc6", int(4096 * width), 7)
    return net.conv(x, "fc7", int(4096 * width), 1)


def alexnet(net, width):
    def n(filters):
        return int(filters * width)

    x = net.pool(net.conv("data", "conv1", n(96), 11, 100, 4), "pool1", 3)
    x = net.conv(net.norm(x, "norm1"), "conv2", n(256), 5, 2, group=2)
    x = net.norm(net.pool(x, "pool2", 3), "norm2")
    x = net.conv(x, "conv3", n(384), 3, 1)
    x = net.conv(x, "conv4", n(384), 3, 1, group=2)
    x = net.pool(net.conv(x, "conv5", n(256), 3, 1, group=2), "pool5", 3)
    return net.conv(net.conv(x, "fc6", n(4096), 6), "fc7", n(4096), 1)


def decoder(net, x, classes, skips, last):
    x, upscore = net.conv(x, "score_fr", classes, 1, relu=False), "upscore2"
    for tap, kernel, offset in skips:
        x = net.upsample(x, upscore, kernel, 2)
        skip = net.conv(tap, f"score_{tap}", classes, 1, relu=False)
        x = net.sum(x, net.crop(skip, x, f"score_{tap}c", offset), f"fuse_{tap}")
        upscore = f"upscore_{tap}"
    kernel, stride, offset = last
    name = f"upscore{stride}" if skips else "upscore"
    return net.crop(net.upsample(x, name, kernel, stride), "data", "score", offset)


# Kernels and crops as derived by hand: those that Caffe's own coord_map.py gives.
@pytest.mark.parametrize(
    ("trunk", "skips", "last", "width", "size"),
    [
        (vgg16, [("pool4", 4, 5)], (32, 16, 27), 1 / 8, (67, 93)),
        (
            vgg16,
            [("pool4", 4, 5), ("pool3", 4, 9), ("pool2", 4, 17)],
            (8, 4, 33),
            1 / 16,
            (51, 34),
        ),
        (alexnet, [], (63, 32, 18), 1 / 4, (101, 58)),
        (
            alexnet,
            [("pool2", 3, 5), ("pool1", 3, 10), ("conv1", 3, 20)],
            (7, 4, 18),
            1 / 8,
            (33, 75),
        ),
    ],
    ids=["vgg16-16s", "vgg16-4s", "alexnet-32s", "alexnet-4s"],
)
def test_opencv_computes_the_same_from_the_caffe_files(
    tmp_path, trunk, skips, last, width, size
):
    net, classes = Prototxt(*size), 5
    decoder(net, trunk(net, width), classes, skips, last)
    case = {"name": "net", "seed": 7, "layers": net.layers}
    (tmp_path / "net.prototxt").write_text("\n".join(net.lines))
    (tmp_path / "net.caffemodel").write_bytes(golden.caffemodel(case))
    reference = cv2.dnn.readNetFromCaffe(
        str(tmp_path / "net.prototxt"), str(tmp_path / "net.caffemodel")
    )
    data = 60 * np.random.default_rng(0).standard_normal((1, 3, *size), "float32")
    reference.setInput(data)
    expected = reference.forward("score")

    entry = {"backbone": trunk.__name__, "stride": last[1], "num_classes": classes}
    options = {"upsampling": "learned", "include_preprocessing": False, "width": width}
    model = models.build({"model": {**entry, **options}})
    oracle.fill(model, golden.weights(case))
    found = oracle.to_caffe(model.predict_on_batch(oracle.to_keras(data)))
    assert found.shape == expected.shape == (1, classes, *size)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
