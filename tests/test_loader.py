"""From an empty cache to a filled net: tags, addresses and what they fetch, once."""

import functools

import keras
import numpy as np
import pytest
import servers
from caffemodels import caffe_layers, caffemodel
from golden import golden

import keras_fcn
from keras_fcn import hub, manifest, models, weights
from keras_fcn.cli import main

SMALL = 1 / 32
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3)).astype("float32")


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A server that stands for the original host, and an empty cache."""
    server = servers.Server()
    monkeypatch.setenv("KERAS_FCN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERAS_FCN_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def serve(name, content, hashed=True, **model):
        """Points the manifest's entry of `name` to the server, which gets `content`."""
        entry = manifest.checkpoint_info(name)
        entry["model"] |= model
        entry["caffemodel"] = {"url": f"{server.url}/{name}.caffemodel"}
        if hashed:
            entry["caffemodel"]["sha256"] = servers.sha256(content)
        server.files[f"/{name}.caffemodel"] = content
        monkeypatch.setitem(manifest._table(), name, entry)

    server.serve = serve
    yield server
    server.shutdown()


def original(name, seed=1):
    """A small caffemodel of random weights and bilinear kernels for an entry."""
    entry = manifest.checkpoint_info(name)
    entry["model"]["width"] = SMALL
    return caffemodel(caffe_layers(models.build(entry), seed))


def logits(model, picture=PICTURE):
    found = model.predict_on_batch(picture)
    return found if isinstance(found, dict) else {"": found}


@pytest.mark.slow
def test_the_published_net_is_fetched_ported_and_computes_what_real_caffe_did(host):
    case = golden.load("voc-fcn8s")
    host.serve("vgg16-8s-voc", golden.caffemodel(case))
    data = golden.inputs(case)["data"].transpose(0, 2, 3, 1)
    for requests in (["/vgg16-8s-voc.caffemodel"], []):
        host.log.clear()
        # The recorded net has random kernels where the published one is bilinear.
        model = keras_fcn.FCN8s(
            weights="voc", upsampling="learned", include_preprocessing=False
        )
        assert [path for _, path, _ in host.log] == requests
        found = {"score": model.predict_on_batch(data).transpose(0, 3, 1, 2)}
        assert max(golden.compare(case, found).values()) < 1e-5


@pytest.mark.parametrize("name", [None, 123, b"x.h5", ["a.h5"], keras.Model])
def test_what_is_no_name_is_refused(name):
    words = "was given for weights; expected text: a checkpoint's name, the path"
    with pytest.raises(ValueError, match=words):
        keras_fcn.load_checkpoint(name)
    if name is not None:
        with pytest.raises(ValueError, match=words):
            keras_fcn.load_checkpoint("googlenet-8s-camvid", weights=name)
        with pytest.raises(ValueError, match=words):
            keras_fcn.FCN8s(weights=name, width=SMALL)


def test_a_path_may_be_text_or_a_path(tmp_path):
    path = tmp_path / "own.h5"
    keras_fcn.save_checkpoint(keras_fcn.fcn("alexnet", 32, 2, width=SMALL), path)
    for given in (path, str(path)):
        assert keras_fcn.load_checkpoint(given).output.shape[-1] == 2
        net = keras_fcn.fcn("alexnet", 32, 2, weights=given, width=SMALL)
        assert net.output.shape[-1] == 2


def test_a_name_with_a_folder_in_it_is_that_of_a_file():
    with pytest.raises(FileNotFoundError, match="folder/net is not a file"):
        keras_fcn.load_checkpoint("folder/net")
    with pytest.raises(ValueError, match="There is no checkpoint 'net'"):
        keras_fcn.load_checkpoint("net")


@pytest.mark.parametrize("first", ["bilinear", "learned"])
def test_one_file_serves_fixed_and_learned_upsampling(first, host):
    host.serve("vgg16-8s-voc", original("vgg16-8s-voc"), width=SMALL)
    build = functools.partial(keras_fcn.FCN8s, weights="voc", width=SMALL)
    wanted = logits(build(upsampling=first))[""]
    assert len(host.log) == 1
    assert np.ptp(wanted) > 0
    for upsampling in ("bilinear", "learned"):
        found = logits(build(upsampling=upsampling))[""]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))
    assert len(host.log) == 1


def test_a_file_of_learned_upsampling_must_hold_its_kernels(tmp_path):
    path = tmp_path / "net.h5"
    net = keras_fcn.fcn("vgg16", 8, 2, upsampling="learned", width=SMALL)
    keras_fcn.save_checkpoint(net, path)
    arrays, facts = weights.read_arrays(path), weights.metadata(path)
    del arrays["upscore2/kernel"]
    weights.save_arrays(iter(arrays.items()), path, metadata=facts)
    with pytest.raises(ValueError, match=r"upscore2/kernel \(4, 4, 2, 2\) is missing"):
        keras_fcn.load_checkpoint(path)


def test_kernels_that_are_not_bilinear_are_no_published_net(host, tmp_path):
    entry = manifest.checkpoint_info("vgg16-8s-voc")
    layers = caffe_layers(models.build({"model": {**entry["model"], "width": SMALL}}))
    layers["upscore2"].blobs[0][0, 0, 0, 0] += 0.1
    host.serve("vgg16-8s-voc", caffemodel(layers), width=SMALL)
    with pytest.raises(ValueError, match="upscore2: differs from the bilinear kernel"):
        keras_fcn.FCN8s(weights="voc", width=SMALL)
    assert not list((tmp_path / "cache").glob("*.h5"))
    model = keras_fcn.FCN8s(weights="voc", width=SMALL, upsampling="learned")
    kernel = keras.ops.convert_to_numpy(model.get_layer("upscore2").kernel)
    np.testing.assert_array_equal(kernel[..., 0, 0], layers["upscore2"].blobs[0][0, 0])


def test_a_tag_means_the_net_of_builder_backbone_and_stride(host):
    names = {
        "vgg16-32s-siftflow": functools.partial(keras_fcn.FCN32s, weights="siftflow"),
        "alexnet-32s-voc": functools.partial(
            keras_fcn.FCN32s, "alexnet", weights="voc"
        ),
        "vgg16-8s-atonce-voc": functools.partial(keras_fcn.FCN8s, weights="atonce-voc"),
        "vgg16-32s-nyud-color-hha": functools.partial(
            keras_fcn.late_fusion, "vgg16", weights="nyud-color-hha"
        ),
        "googlenet-imagenet": functools.partial(
            keras_fcn.classifier, "googlenet", weights="imagenet"
        ),
    }
    for name, build in names.items():
        host.log.clear()
        host.serve(name, original(name), width=SMALL)
        one, other = build(width=SMALL), keras_fcn.load_checkpoint(name)
        assert [path for _, path, _ in host.log] == [f"/{name}.caffemodel"]
        assert one.count_params() == other.count_params()
        for ours, theirs in zip(one.weights, other.weights, strict=True):
            found = keras.ops.convert_to_numpy(ours)
            assert found.any() or "bias" in ours.path
            np.testing.assert_array_equal(found, keras.ops.convert_to_numpy(theirs))


@pytest.mark.parametrize("backbone", ["alexnet", "vgg16", "googlenet"])
def test_imagenet_fills_the_trunk_and_leaves_the_scores_zero(backbone, host):
    name = f"{backbone}-imagenet"
    host.serve(name, original(name), width=SMALL)
    model = keras_fcn.FCN8s(backbone, num_classes=5, weights="imagenet", width=SMALL)
    source = keras_fcn.load_checkpoint(name)
    given = {x.name: x for x in source.layers if x.weights}
    for layer in model.layers:
        for i, weight in enumerate(layer.weights):
            found = keras.ops.convert_to_numpy(weight)
            if "score" in layer.name:
                assert not found.any()
            else:
                wanted = keras.ops.convert_to_numpy(given[layer.name].weights[i])
                np.testing.assert_array_equal(found, wanted)
    assert not logits(model)[""].any()


def test_what_nobody_has_hashed_wants_a_word_once(host, capsys):
    name = "vgg16-16s-siftflow"
    host.serve(name, original(name), hashed=False, width=SMALL)
    build = functools.partial(keras_fcn.FCN16s, weights="siftflow", width=SMALL)
    with pytest.raises(ValueError, match=f"fetch {name} --trust-first") as caught:
        build()
    assert len(str(caught.value).splitlines()) == 3
    assert host.log == []
    assert main(["fetch", name, "--trust-first-download"]) == 0
    path = hub.cache_folder() / f"{name}.h5"
    assert f"sha256 {servers.sha256(path.read_bytes())}" in capsys.readouterr().out
    trusted = logits(build())
    assert len(host.log) == 1
    # From now on the file is held to what it was.
    path.unlink()
    host.files[f"/{name}.caffemodel"] = original(name, seed=2)
    with pytest.raises(ValueError, match="expected"):
        build()
    host.files[f"/{name}.caffemodel"] = original(name)
    for head, found in logits(build()).items():
        np.testing.assert_array_equal(found, trusted[head])


def test_trusted_or_not_a_file_of_another_net_is_refused(host, tmp_path):
    name = "vgg16-16s-siftflow"
    host.serve(name, original("vgg16-16s-voc"), hashed=False, width=SMALL)
    with pytest.raises(ValueError, match="has no place in the net|is missing"):
        keras_fcn.load_checkpoint(name, trust_first_download=True)
    assert not list((tmp_path / "cache").glob("*.h5"))


def test_offline_the_error_says_what_to_put_where_and_that_is_then_used(
    host, monkeypatch
):
    name = "vgg16-8s-voc"
    content = original(name)
    host.serve(name, content, width=SMALL)
    monkeypatch.setenv("KERAS_FCN_OFFLINE", "1")
    build = functools.partial(keras_fcn.FCN8s, weights="voc", width=SMALL)
    with pytest.raises(OSError, match="KERAS_FCN_OFFLINE") as caught:
        build()
    place = hub.cache_folder() / f"{name}.caffemodel"
    words = [name, servers.sha256(content), f"{host.url}/{name}.caffemodel"]
    for word in [*words, "about 537 MB"]:  # as the manifest counts its parameters
        assert word in str(caught.value)
    assert f"at {place}" in str(caught.value)
    assert f"keras-fcn convert {name}.caffemodel" in str(caught.value)
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(content)
    assert np.ptp(logits(build())[""]) > 0
    assert host.log == []
