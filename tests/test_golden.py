"""Whole nets at full width against what BVLC/caffe computed from the same weights."""

import oracle
import pytest
from golden import golden

from keras_fcn import models

# {case: the net of a manifest's entry}
NETS = {
    "bvlc-googlenet": {
        "builder": "classifier",
        "backbone": "googlenet",
        "num_classes": 1000,
    },
    "fcn-googlenet-8s": {"backbone": "googlenet", "stride": 8},
    "fcn-alexnet-8s": {"backbone": "alexnet", "stride": 8},
    "voc-fcn-alexnet": {"backbone": "alexnet", "stride": 32},
    "siftflow-fcn16s": {
        "backbone": "vgg16",
        "stride": 16,
        "num_classes": {"sem": 33, "geo": 3},
    },
    "voc-fcn8s": {"backbone": "vgg16", "stride": 8},
}


def test_every_recorded_net_is_compared():
    recorded = {path.stem for path in golden.HERE.glob("*.json")}
    assert {name for name in recorded if not name.startswith("trace-")} == set(NETS)


@pytest.mark.parametrize(
    "name",
    [
        name if "googlenet" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in NETS
    ],
)
def test_a_net_computes_what_caffe_computed(name, record_property):
    case, net = golden.load(name), {**NETS[name], "include_preprocessing": False}
    if "builder" not in net:
        net["upsampling"] = "learned"
    model = models.build({"model": net})
    oracle.fill(model, golden.weights(case))
    outputs = model.predict_on_batch(oracle.to_keras(golden.inputs(case)["data"]))
    if not isinstance(outputs, dict):
        outputs = {case["outputs"][0]: outputs}
    found = {
        blob: oracle.to_caffe(outputs.get(blob, outputs.get(blob[len("score_") :])))
        for blob in case["outputs"]
    }
    if "builder" in net:  # an InnerProduct has no height and width
        found = {blob: logits[:, :, 0, 0] for blob, logits in found.items()}
    errors = golden.compare(case, found)
    record_property("errors", errors)
    assert max(errors.values()) < 1e-5, errors
