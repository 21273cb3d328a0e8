"""The three classifiers of the paper, cast to convolutions (Long et al., 2015, 4.1).

Each takes the image as a `Feature` and returns its taps, `{name: Feature}`, finest
first; the last one is what the classifier sees. The `pad` at the image is as large as
it takes for any image size to come out covered.
"""

from keras_fcn.features import average_pool, concat, conv, dropout, lrn, max_pool

# What is skipped from: the first features of their stride (Long et al., 2015, figure 3,
# for VGG16; the others by analogy).
SKIPS = {
    "alexnet": ("conv1", "pool1", "pool2"),
    "vgg16": ("pool2", "pool3", "pool4"),
    "googlenet": ("pool1", "pool2", "pool3"),
}


def alexnet(image, width=1.0, pad=100, skips=SKIPS["alexnet"]):
    """AlexNet in CaffeNet's order: pooling before normalisation.

    Source: voc-fcn-alexnet/net.py; (Krizhevsky et al., 2012).

    Args:
        image: The image `Feature`, (batch, height, width, channels), mean subtracted.
        width: Scales the number of channels.
        pad: Zeros around the image, in pixels.
        skips: Names of the features to skip from, finest first.
    """
    first = _first("conv1", image)
    x = conv1 = conv(image, _even(96 * width), 11, stride=4, pad=pad, name=first)
    x = pool1 = max_pool(x, 3, 2, name="pool1")
    x = lrn(x, name="norm1")
    x = conv2 = conv(x, _even(256 * width), 5, pad=2, groups=2, name="conv2")
    x = pool2 = max_pool(x, 3, 2, name="pool2")
    x = lrn(x, name="norm2")
    x = conv(x, _even(384 * width), 3, pad=1, name="conv3")
    x = conv(x, _even(384 * width), 3, pad=1, groups=2, name="conv4")
    x = conv5 = conv(x, _even(256 * width), 3, pad=1, groups=2, name="conv5")
    x = max_pool(x, 3, 2, name="pool5")
    x = dropout(conv(x, _even(4096 * width), 6, name="fc6"), 0.5, name="drop6")
    x = dropout(conv(x, _even(4096 * width), 1, name="fc7"), 0.5, name="drop7")
    features = dict(conv1=conv1, pool1=pool1, conv2=conv2, pool2=pool2, conv5=conv5)
    return {**_chosen(skips, features), "fc7": x}


def vgg16(image, width=1.0, pad=100, skips=SKIPS["vgg16"]):
    """VGG16 (net D) with fc6 and fc7 cast to convolutions.

    Source: voc-fcn8s/net.py; (Simonyan & Zisserman, 2015).

    Args:
        image: The image `Feature`, (batch, height, width, channels), mean subtracted.
        width: Scales the number of channels.
        pad: Zeros around the image, in pixels.
        skips: Names of the features to skip from, finest first.
    """
    features, x = {}, image
    blocks = [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]
    for block, (filters, repeats) in enumerate(blocks, start=1):
        for i in range(1, repeats + 1):
            border = pad if block == i == 1 else 1
            name = f"conv{block}_{i}"
            name = _first(name, image) if block == i == 1 else name
            x = conv(x, _some(filters * width), 3, pad=border, name=name)
        features[f"conv{block}_{repeats}"] = x
        x = features[f"pool{block}"] = max_pool(x, 2, 2, name=f"pool{block}")
    x = dropout(conv(x, _some(4096 * width), 7, name="fc6"), 0.5, name="drop6")
    x = dropout(conv(x, _some(4096 * width), 1, name="fc7"), 0.5, name="drop7")
    return {**_chosen(skips, features), "fc7": x}


def googlenet(image, width=1.0, pad=35, average=False, skips=SKIPS["googlenet"]):
    """GoogLeNet without its auxiliary heads.

    Source: models/bvlc_googlenet of BVLC/caffe; (Szegedy et al., 2015, table 1). The
    pad of 35 is the native 3 and one stride: the smallest on the native grid that
    covers both borders at every size.

    Args:
        image: The image `Feature`, (batch, height, width, channels), mean subtracted.
        width: Scales the number of channels.
        pad: Zeros around the image, in pixels.
        average: Keep the classifier's 7 by 7 average pooling, which the FCN discards
            (Long et al., 2015, section 4.1).
        skips: Names of the features to skip from, finest first.
    """
    first = _first("conv1_7x7_s2", image)
    x = conv(image, _some(64 * width), 7, stride=2, pad=pad, name=first)
    x = pool1 = max_pool(x, 3, 2, name="pool1_3x3_s2")
    x = lrn(x, name="pool1_norm1")
    x = conv(x, _some(64 * width), 1, name="conv2_3x3_reduce")
    x = conv2 = conv(x, _some(192 * width), 3, pad=1, name="conv2_3x3")
    x = lrn(x, name="conv2_norm2")
    x = pool2 = max_pool(x, 3, 2, name="pool2_3x3_s2")
    x = _inception(x, "3a", width, 64, 96, 128, 16, 32, 32)
    x = inception_3b = _inception(x, "3b", width, 128, 128, 192, 32, 96, 64)
    x = pool3 = max_pool(x, 3, 2, name="pool3_3x3_s2")
    x = _inception(x, "4a", width, 192, 96, 208, 16, 48, 64)
    x = _inception(x, "4b", width, 160, 112, 224, 24, 64, 64)
    x = _inception(x, "4c", width, 128, 128, 256, 24, 64, 64)
    x = _inception(x, "4d", width, 112, 144, 288, 32, 64, 64)
    x = inception_4e = _inception(x, "4e", width, 256, 160, 320, 32, 128, 128)
    x = max_pool(x, 3, 2, name="pool4_3x3_s2")
    x = _inception(x, "5a", width, 256, 160, 320, 32, 128, 128)
    x = _inception(x, "5b", width, 384, 192, 384, 48, 128, 128)
    if average:
        x = average_pool(x, 7, name="pool5_7x7_s1")
    x = dropout(x, 0.4, name="pool5_drop_7x7_s1")
    features = {
        "pool1": pool1,
        "conv2": conv2,
        "pool2": pool2,
        "inception_3b": inception_3b,
        "pool3": pool3,
        "inception_4e": inception_4e,
    }
    return {**_chosen(skips, features), "inception_5b": x}


def _inception(x, module, width, one, reduce3, three, reduce5, five, project):
    def branch(x, filters, kernel, name):
        filters, name = _some(filters * width), f"inception_{module}_{name}"
        return conv(x, filters, kernel, pad=kernel // 2, name=name)

    pool = max_pool(x, 3, 1, pad=1, name=f"inception_{module}_pool")
    branches = [
        branch(x, one, 1, "1x1"),
        branch(branch(x, reduce3, 1, "3x3_reduce"), three, 3, "3x3"),
        branch(branch(x, reduce5, 1, "5x5_reduce"), five, 5, "5x5"),
        branch(pool, project, 1, "pool_proj"),
    ]
    return concat(branches, name=f"inception_{module}_output")


def _chosen(skips, features):
    """Returns those of some features that are skipped from, one of each stride."""
    offered = {4: [], 8: [], 16: []}
    for name, feature in features.items():
        offered.get(feature.grid.stride, []).append(name)
    coarsest = list(offered.values())[-len(skips) :] if skips else []
    wanted = zip(skips, coarsest, strict=False)
    if len(coarsest) != len(skips) or not all(name in names for name, names in wanted):
        known = ", ".join(" or ".join(names) for names in offered.values())
        raise ValueError(
            f"The skips are {tuple(skips)}; expected one each of stride 4, 8 and 16, "
            f"in this order, or of the last of these: {known}."
        )
    return {name: features[name] for name in skips}


def _first(name, image):
    # As in nyud-fcn32s-color-d: transplanting colour weights takes an extra step.
    return f"{name}_bgrd" if image.tensor.shape[-1] == 4 else name


def _some(filters):
    return max(1, int(filters))


def _even(filters):
    return max(2, int(filters) // 2 * 2)  # two groups share the channels


BACKBONES = {"alexnet": alexnet, "vgg16": vgg16, "googlenet": googlenet}
