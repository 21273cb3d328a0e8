"""The nets of the paper: a backbone, one decoder, and what they are fed."""

import functools
import inspect
import math
import numbers
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import keras

from keras_fcn import checkpoints, manifest
from keras_fcn import weights as weight_files
from keras_fcn.backbones import BACKBONES, SKIPS
from keras_fcn.features import (
    Feature,
    add,
    average,
    conv,
    crop_alike,
    crop_like,
    scale,
    upsample,
)
from keras_fcn.layers import Preprocess

STRIDES = (32, 16, 8, 4)
UPSAMPLINGS = ("bilinear", "learned")

# What the VOC nets subtract, blue first (voc-*/net.py): the default input.
VOC_INPUT = {"channels": "BGR", "mean": [104.00699, 116.66877, 122.67892]}
# Early fusion with log depth (nyud_layers.py; its colour means are in this order).
NYUD_DEPTH_INPUT = {"channels": "BGRD", "mean": [116.190, 97.203, 92.318, 7.844]}
LATE_FUSION_INPUTS = {
    "color": {"channels": "BGR", "mean": [116.190, 97.203, 92.318]},
    "hha": {"channels": "RGB", "mean": [132.431, 94.076, 118.477]},  # not reversed
}
DEFAULT_INPUTS = {3: VOC_INPUT, 4: NYUD_DEPTH_INPUT}

# How each backbone is a classifier: arguments, and the name of its last layer.
CLASSIFIERS = {
    "alexnet": ({"pad": 0}, "fc8"),
    "vgg16": ({"pad": 1}, "fc8"),
    "googlenet": ({"pad": 3, "average": True}, "loss3_classifier"),
}


def score_taps(taps, num_classes, stride, *, skip_scales=None, head=""):
    """Scores the taps of a backbone with one 1 by 1 convolution each.

    Args:
        taps: `{name: Feature}`, finest first.
        num_classes: Channels of each score.
        stride: Pixels per cell of the finest tap to use.
        skip_scales: `{tap: factor}`, applied before the convolution (at-once nets).
        head: Appended to the layers' names.

    Returns:
        `{name: Feature}`, finest first, of (batch, h, w, num_classes).

    Raises:
        ValueError: If no tap is of `stride`, or if a scale is for none that is skipped
            from.
    """
    names = [name for name, tap in taps.items() if tap.grid.stride >= stride]
    if not names or taps[names[0]].grid.stride != stride:
        found = ", ".join(f"{tap.grid.stride:g}" for tap in taps.values())
        raise ValueError(
            f"stride={stride} was given for taps of stride {found or 'none'}; expected "
            "one of theirs."
        )
    _check_skip_scales(skip_scales, names)
    scores = {}
    for name in names:
        x = taps[name]
        if skip_scales and name in skip_scales:
            x = scale(x, skip_scales[name], name=f"scale_{name}{head}")
        layer = "score_fr" if name == names[-1] else f"score_{name}"
        scores[name] = conv(x, num_classes, 1, activation=None, name=f"{layer}{head}")
    return scores


def fuse(scores, image, *, upsampling="bilinear", head=""):
    """Upsamples each score onto the next finer one, adds them, and so on to pixels.

    Args:
        scores: `{name: Feature}`, finest first, each of twice the stride of the last.
        image: The image `Feature`, whose pixels the result lies on.
        upsampling: "bilinear" (fixed) or "learned" (transposed convolutions).
        head: Appended to the layers' names.

    Returns:
        A `Feature`: (batch, height, width, classes), logits at image size.

    Raises:
        ValueError: If there is no such upsampling, if a map upsampled does not land on
            whole cells of the next one, or if the last one begins within the image: as
            in `keras_fcn.geometry.bilinear_kernel_size` and `Grid.offset`.
    """
    _check_choice("upsampling", upsampling, UPSAMPLINGS)
    learned = upsampling == "learned"
    *skips, coarsest = scores
    x, upscore = scores[coarsest], f"upscore2{head}"
    for name in reversed(skips):
        skip = scores[name]
        up = upsample(x, 2, skip, name=upscore, learned=learned)
        # GoogLeNet's taps end a cell short of the upsampled map at half of all sizes.
        names = f"score_{name}{head}c", f"{upscore}c"
        skip, up = crop_alike(skip, up, names=names)
        x = add(up, skip, name=f"fuse_{name}{head}")
        upscore = f"upscore_{name}{head}"
    stride = int(x.grid.stride)
    last = f"upscore{stride}{head}" if skips else f"upscore{head}"
    up = upsample(x, stride, image, name=last, learned=learned)
    return crop_like(up, image, name=f"score{head}")


def decode(
    taps,
    image,
    num_classes,
    stride=8,
    *,
    upsampling="bilinear",
    skip_scales=None,
    head="",
):
    """Turns the taps of any backbone into logits at image size (paper, section 4.2).

    Args:
        taps: `{name: Feature}`, finest first, the last one for the classifier.
        image: The image `Feature` that the backbone was given.
        num_classes: Classes to tell apart.
        stride: Pixels per cell of the finest tap to use: 32, 16, 8 or 4.
        upsampling: "bilinear" (fixed) or "learned".
        skip_scales: `{tap: factor}` of the at-once nets.
        head: Appended to the layers' names, for nets with several heads.

    Returns:
        A `Feature`: (batch, height, width, num_classes), logits.

    Raises:
        ValueError: As in `score_taps` and `fuse`.
    """
    scores = score_taps(taps, num_classes, stride, skip_scales=skip_scales, head=head)
    return fuse(scores, image, upsampling=upsampling, head=head)


def fcn(
    backbone="vgg16",
    stride=8,
    num_classes=None,
    *,
    weights=None,
    upsampling="bilinear",
    skips=None,
    skip_scales=None,
    input_channels=3,
    include_preprocessing=True,
    preprocessing=None,
    batch_norm=False,
    width=1.0,
):
    """Builds a fully convolutional network (Long, Shelhamer & Darrell, 2015).

    Args:
        backbone: "alexnet", "vgg16" or "googlenet".
        stride: Pixels per cell of the finest prediction: 32, 16, 8 or 4.
        num_classes: Classes to tell apart, or `{head: classes}` for several heads,
            such as `{"sem": 33, "geo": 3}`. Follows from `weights` where they say
            it; 21, as in VOC, if nothing does.
        weights: None (random trunk, score layers zero), a tag such as "camvid"
            (`list_checkpoints` lists what exists), the path of an .h5 file,
            "hf://owner/repo" or "hf://owner/repo@revision" for one on the Hub, or
            "imagenet": the classifier's trunk, score layers zero.
        upsampling: "bilinear": fixed and without weights; "learned": transposed
            convolutions, bilinear at start (CVPR 2015).
        skips: What to skip from where `weights` do not say: one feature each of stride
            4, 8 and 16, in this order, or of the last of these. Where none is named it
            is the first of its stride, as in the paper. The last ones are `("conv2",
            "inception_3b", "inception_4e")` of GoogLeNet, `("conv3_3", "conv4_3",
            "conv5_3")` of VGG16 and `("conv1", "conv2", "conv5")` of AlexNet.
        skip_scales: `{"pool4": 1e-2, "pool3": 1e-4}` makes the at-once net of VGG16.
        input_channels: 3 for colour, 4 for colour and depth; any number without
            preprocessing.
        include_preprocessing: Whether the first layer turns RGB 0-255 (and depth in
            millimetres) into what the backbone was trained on. Without it the net
            takes what Caffe's `data` blob holds: BGR minus mean, channels last.
        preprocessing: What that layer does, where `weights` do not say: the order of
            the channels and the mean of each in that order, as in the manifest, such
            as `{"channels": "RGB", "mean": [132.431, 94.076, 118.477]}` for HHA. By
            default BGR and the mean of the VOC nets.
        batch_norm: Whether to normalise what each hidden convolution gives over the
            batch (Ioffe & Szegedy, 2015), for training from scratch: see
            `fold_batch_norm`.
        width: Scales the channels of the backbone; nets for tests are narrow.

    Returns:
        A `keras.Model` from (batch, height, width, input_channels), any size from 1
        by 1, to logits (batch, height, width, num_classes), or a dict of them.

    Raises:
        ValueError: If an argument is none of the above, or if `weights` do not fit.
        OSError: If they cannot be fetched or read.
    """
    _check(backbone, width, stride, upsampling)
    _check_classes(num_classes, heads=True)
    if weights == "imagenet":
        if input_channels not in DEFAULT_INPUTS:
            raise ValueError(
                f"weights='imagenet' was given with input_channels={input_channels}; "
                "expected 3, or 4 with depth, or weights=None."
            )
        checkpoint = checkpoints.Checkpoint({})  # all zero, to be transplanted
    else:
        checkpoint = checkpoints.find(weights, "fcn", backbone, stride)
    num_classes = checkpoints.num_classes(num_classes, checkpoint, default=21)
    skip_scales = checkpoints.skip_scales(skip_scales, checkpoint)
    image = _image("image", input_channels, checkpoint)
    x = image._replace(batch_norm=batch_norm)
    if include_preprocessing:
        data = _input(checkpoint, input_channels, preprocessing)
        x = _preprocess(x, data, "preprocess")
    elif preprocessing:
        raise ValueError(
            f"preprocessing={preprocessing} was given with include_preprocessing=False;"
            " leave one of them out."
        )
    skips = checkpoints.skips(skips, checkpoint, default=SKIPS[backbone])
    taps = BACKBONES[backbone](x, width, skips=skips)
    heads = num_classes if isinstance(num_classes, dict) else {"": num_classes}
    outputs = {
        head: decode(
            taps,
            image,
            classes,
            stride,
            upsampling=upsampling,
            skip_scales=skip_scales,
            head=head and f"_{head}",
        ).tensor
        for head, classes in heads.items()
    }
    outputs = outputs if isinstance(num_classes, dict) else outputs[""]
    model = keras.Model(image.tensor, outputs, name=f"fcn{stride}s_{backbone}")
    if weights == "imagenet":
        source = classifier(backbone, weights=weights, width=width)
        weight_files.transplant(source, model)
        return model
    return checkpoints.fill(model, checkpoint)


def _fcn_at(stride, skips):
    """Returns `fcn` of one stride, as a function of its own name and signature."""

    @functools.wraps(fcn)
    def build(backbone="vgg16", num_classes=None, **others):
        return fcn(backbone, stride, num_classes, **others)

    build.__name__ = build.__qualname__ = f"FCN{stride}s"
    build.__doc__ = (
        f"Builds `fcn(backbone, stride={stride}, ...)`, with {skips}; see `fcn`."
    )
    signature = inspect.signature(fcn)
    taken = [x for name, x in signature.parameters.items() if name != "stride"]
    build.__signature__ = signature.replace(parameters=taken)
    return build


FCN32s = _fcn_at(32, "no skips")
FCN16s = _fcn_at(16, "one skip")
FCN8s = _fcn_at(8, "two skips")


def late_fusion(
    backbone,
    stride=32,
    num_classes=None,
    *,
    weights=None,
    upsampling="bilinear",
    include_preprocessing=True,
    width=1.0,
):
    """Builds two nets, for colour and for HHA, whose scores are averaged.

    Source: nyud-fcn32s-color-hha/net.py, an average (`coeff: 0.5`) where the paper
    (section 4.4) speaks of a sum.

    Args:
        backbone: As in `fcn`.
        stride: As in `fcn`.
        num_classes: Classes to tell apart; 40, as in NYUDv2, if nothing says it.
        weights: As in `fcn`, but for "imagenet": `transplant` with a suffix fills one
            stream, or each, from a classifier.
        upsampling: As in `fcn`.
        include_preprocessing: As in `fcn`; HHA comes as in its PNG files, disparity,
            height and angle, 0-255.
        width: As in `fcn`.

    Returns:
        A `keras.Model` from `{"color", "hha"}`, each (batch, height, width, 3) and
        of one size, to logits (batch, height, width, num_classes).

    Raises:
        ValueError: If an argument is none of the above, or if `weights` do not fit.
        OSError: If they cannot be fetched or read.
    """
    _check(backbone, width, stride, upsampling)
    _check_classes(num_classes)
    checkpoint = checkpoints.find(weights, "late_fusion", backbone, stride)
    num_classes = checkpoints.num_classes(num_classes, checkpoint, default=40)
    images, scores = {}, {}
    for stream, default in LATE_FUSION_INPUTS.items():
        image = images[stream] = _image(stream, 3, checkpoint)
        x = image._replace(suffix=stream)
        if include_preprocessing:
            known = checkpoints.preprocessing(None, checkpoint) or {}
            data = known.get(stream, default)
            x = _preprocess(x, data, f"preprocess{stream}")
        taps = BACKBONES[backbone](x, width)
        scores[stream] = score_taps(taps, num_classes, stride)
    fused = {}
    *_, coarsest = scores["color"]
    for name, color in scores["color"].items():
        layer = "score_fused" if name == coarsest else f"score_{name}_fused"
        fused[name] = average(color, scores["hha"][name], name=layer)
    outputs = fuse(fused, images["color"], upsampling=upsampling).tensor
    inputs = {stream: image.tensor for stream, image in images.items()}
    model = keras.Model(inputs, outputs, name=f"fcn{stride}s_{backbone}_late_fusion")
    return checkpoints.fill(model, checkpoint)


def classifier(
    backbone,
    num_classes=1000,
    *,
    weights=None,
    include_preprocessing=True,
    width=1.0,
):
    """Builds the ImageNet classifier as a convolution: heatmaps (paper, figure 2).

    The padding is that of the classifier: an image of its own size (224 pixels,
    AlexNet 227) gives one cell, larger ones a heatmap. Below 193 pixels (AlexNet 199,
    GoogLeNet 223) there is no cell: an error, but on TensorFlow, once the net was given
    several sizes, it is in the backend's words, or there is a heatmap of no cells.

    Args:
        backbone: As in `fcn`.
        num_classes: Channels of the heatmap.
        weights: None, "imagenet", or the path of an .h5 file.
        include_preprocessing: As in `fcn`.
        width: As in `fcn`.

    Returns:
        A `keras.Model` from (batch, height, width, 3) to logits
        (batch, h, w, num_classes): h = 1 + (height - 224) / 32 for 224, 256, 288 ...
        pixels, and the number below or above it for heights between them.

    Raises:
        ValueError: If an argument is none of the above, or if `weights` do not fit.
        OSError: If they cannot be fetched or read.
    """
    _check(backbone, width)
    _check_classes(num_classes)
    checkpoint = checkpoints.find(weights, "classifier", backbone)
    image = _image("image", 3, checkpoint)
    x = image
    if include_preprocessing:
        x = _preprocess(x, _input(checkpoint, 3), "preprocess")
    arguments, last = CLASSIFIERS[backbone]
    *_, x = BACKBONES[backbone](x, width, **arguments).values()
    x = conv(x, num_classes, 1, activation=None, name=last)
    model = keras.Model(image.tensor, x.tensor, name=f"{backbone}_classifier")
    return checkpoints.fill(model, checkpoint)


BUILDERS = {"fcn": fcn, "late_fusion": late_fusion, "classifier": classifier}


def load_checkpoint(name, *, weights=None, trust_first_download=False):
    """Builds the net that a checkpoint is for, and fills it.

    Args:
        name: A name that `list_checkpoints` lists; or the path of an .h5 file that
            says what it is, such as one written by `save_checkpoint`; or the address of
            one on the Hub, `hf://owner/repo` or `hf://owner/repo@revision`.
        weights: A path or an address to use in place of the checkpoint's own.
        trust_first_download: Whether to accept a file of which nobody has published
            a hash; that of the first one is kept, and holds from then on.

    Returns:
        A `keras.Model`, as `fcn`, `late_fusion` or `classifier` return it.

    Raises:
        ValueError: If there is no such checkpoint, or if the file does not fit.
        OSError: If the file cannot be had.
    """
    path = checkpoints.path_of(name)
    entry = checkpoint_entry(path or name)
    if weights:
        return build(entry, checkpoints.path_of(weights) or weights)
    if path:
        return build(entry, path)
    return _build(checkpoints.Checkpoint(entry, None, name, trust_first_download))


def build(entry, weights=None):
    """Builds the net that an entry describes.

    Args:
        entry: A dict in the manifest's fields; only `model` must be there.
        weights: The path of an .h5 file; all weights are zero without it.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: If the file does not fit.
        OSError: If it cannot be read.
    """
    return _build(checkpoints.Checkpoint(entry, weights))


def skeleton(entry):
    """Builds the net that an entry describes without values for its weights.

    Args:
        entry: As in `build`.

    Returns:
        A `keras.Model`, to see its layers and shapes.

    Raises:
        ValueError: If there is no such net.
    """

    def shapes():
        with keras.StatelessScope(initialize_variables=False):
            return build(entry)

    # Keras lists weights that have no values, for each thread, and a later `fit` gives
    # some to all that are listed. So this list ends with a thread of its own.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(shapes).result()


def _build(checkpoint):
    checkpoints.check_file(checkpoint)
    arguments = dict(checkpoint.entry["model"])
    builder = BUILDERS[arguments.pop("builder", "fcn")]
    return builder(**arguments, weights=checkpoint)


def checkpoint_entry(name):
    """Returns what is known of a checkpoint, from the manifest or the file itself.

    Args:
        name: As in `load_checkpoint`.

    Returns:
        A dict, as `keras_fcn.checkpoint_info` returns it, `model` in it for certain.

    Raises:
        ValueError: If there is no such checkpoint, or if the file does not say.
        OSError: If the file cannot be read.
    """
    path = checkpoints.path_of(name)
    if not path:
        return manifest.checkpoint_info(name)
    entry = weight_files.metadata(path)
    if "model" not in entry:
        raise ValueError(
            f"{name} does not say which net it is for; expected a file written by "
            "keras_fcn.save_checkpoint. Build the net and pass it as `weights=`."
        )
    return entry


def _image(name, channels, checkpoint):
    if not isinstance(channels, numbers.Integral) or channels < 1:
        raise ValueError(
            f"input_channels={channels!r} was given; expected an integer from 1."
        )
    tensor = keras.Input((None, None, int(channels)), name=name)
    drawn = {"kernel_initializer": "zeros"} if checkpoint else {}
    return Feature(tensor, **drawn)


def _input(checkpoint, channels, wanted=None):
    if found := checkpoints.preprocessing(wanted, checkpoint):
        return found
    if channels not in DEFAULT_INPUTS:
        raise ValueError(
            f"input_channels={channels} has no preprocessing; expected 3 (RGB) or 4 "
            "(RGB and depth). Pass include_preprocessing=False and feed the net data "
            "that is centred on zero."
        )
    return DEFAULT_INPUTS[channels]


def _preprocess(x, data, name):
    channels = x.tensor.shape[-1]
    said = [data.get("channels", ""), data.get("mean", ())]
    if [len(part) for part in said] != [channels, channels]:
        raise ValueError(
            f"The preprocessing is {data} where input_channels={channels}; expected as "
            f"many letters and means, such as {VOC_INPUT} for 3."
        )
    # Under mixed precision the means are still subtracted in full.
    dtype = keras.config.dtype_policy().variable_dtype
    return x.then(Preprocess(data["channels"], data["mean"], dtype=dtype, name=name))


def _check(backbone, width, stride=32, upsampling="bilinear"):
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            'Keras is set to image_data_format "channels_first"; expected '
            '"channels_last", the only layout of keras_fcn. Call '
            'keras.config.set_image_data_format("channels_last") first.'
        )
    choices = {
        "backbone": (backbone, tuple(BACKBONES)),
        "stride": (stride, STRIDES),
        "upsampling": (upsampling, UPSAMPLINGS),
    }
    for name, (value, allowed) in choices.items():
        _check_choice(name, value, allowed)
    if not isinstance(width, numbers.Real) or not 0 < width < math.inf:
        raise ValueError(f"width={width!r} was given; expected a number above 0.")


def _check_choice(name, value, allowed):
    if value not in allowed or isinstance(value, float):  # 8.0 is in a tuple of 8
        raise ValueError(
            f"{name}={value!r} was given; expected one of "
            f"{', '.join(map(repr, allowed))}."
        )


def _check_classes(num_classes, heads=False):
    several = heads and isinstance(num_classes, dict)
    counts = list(num_classes.values()) if several else [num_classes]
    is_count = [isinstance(n, numbers.Integral) and n > 0 for n in counts]
    if num_classes is not None and not (is_count and all(is_count)):
        expected = "an integer from 1" + ", or a dict of such by head" * heads
        raise ValueError(f"num_classes={num_classes!r} was given; expected {expected}.")
    for head in num_classes if several else ():
        if not re.fullmatch(r"\w+", str(head)) or not isinstance(head, str):
            raise ValueError(
                f"num_classes has the head {head!r}; expected a name of letters, "
                "digits and _, for layers bear it."
            )


def _check_skip_scales(skip_scales, names):
    if not isinstance(skip_scales or {}, Mapping):
        raise ValueError(
            f"skip_scales={skip_scales!r} was given; expected a dict by tap, "
            'such as {"pool4": 1e-2}.'
        )
    *skips, _ = names
    unknown = sorted(set(skip_scales or {}) - set(skips))
    if unknown:
        raise ValueError(
            f"skip_scales names {', '.join(unknown)}; expected taps that this net "
            f"skips from: {', '.join(skips) or 'none at stride 32'}."
        )
