"""Publishes a checkpoint on the Hugging Face Hub, with a model card.

python tools/publish.py net.caffemodel --checkpoint vgg16-16s-voc --repo me/fcn16s
python tools/publish.py run/model.h5 --repo me/my-net --license MIT --picture a.jpg
    --evaluate val/images val/labels --relabel 11=255 --split "my val, 100 images"

A .caffemodel is ported first; an .h5 file is one that `keras_fcn.save_checkpoint` or
`keras-fcn train` wrote. What is pushed stays in --output. For a name in the manifest,
its entry is completed with where the file is (`hub`) and what it scored (`measured`).
Log in with `hf auth login` before; --dry-run writes everything and pushes nothing.
"""

import argparse
import contextlib
import os
import pathlib
import re
import shutil
import sys
import tempfile
import tomllib

from keras_fcn import (
    __version__,
    cli_data,
    evaluation,
    files,
    images,
    labels,
    manifest,
    models,
    porting,
    progress,
    weights,
)
from keras_fcn.datasets import folder
from keras_fcn.metrics import SCORES

CARD = """---
{metadata}
---
# {name}

{what}

```python
import keras_fcn  # on TensorFlow, JAX or PyTorch

model = keras_fcn.load_checkpoint("hf://{repo}")
{usage}
```
{picture}
- **Trained on**: {trained_on}
- **License**: {license}
- **Source**: {source}
- **Input**: {input}
- **Classes**: {classes}

## Scores

{scores}
"""


def main(arguments=None):
    """Ports, evaluates, writes the card, pushes and completes the manifest.

    Args:
        arguments: A list of strings; those of the process if None.

    Returns:
        The exit status: 0, 2 after an error, which is said in one sentence, or 130
        after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        _publish(options)
    except (OSError, ValueError) as error:
        print(f"publish.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("publish.py: stopped", file=sys.stderr)
        return 130
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", type=pathlib.Path, help=".caffemodel or .h5 file")
    add("--repo", required=True, help="owner/name on the Hub; made if need be")
    add("--checkpoint", help="what it is: a name in the manifest")
    add("--output", type=pathlib.Path, help="folder (published/NAME)")
    add("--license", help="of weights that no manifest's entry describes")
    add("--trained-on", help="likewise")
    add("--evaluate", nargs=2, metavar=("IMAGES", "MASKS"), help="folders to score")
    add("--split", help="what these are, such as 'CamVid val, 101 images'")
    cli_data.add_relabel(parser)
    add("--picture", type=pathlib.Path, help="photograph to show segmented")
    add("--private", action="store_true", help="a new repository is private")
    add("--dry-run", action="store_true", help="write everything, push nothing")
    return parser


def _publish(options):
    _check(options)
    name, output = _name(options), _output(options)
    entry = _entry(options)
    _check_shown(options, entry)
    manifest.label_sets(entry)  # which the card names
    source = _evaluated(options, entry)
    photograph = images.read_image(options.picture) if options.picture else None
    with _all_or_nothing(output) as room:
        path = room / f"{name}.h5"
        model = _write_weights(options, entry, path)
        entry["measured"] = _measure(model, source, options) if source else {}
        if options.picture:
            _draw(model, entry, photograph, room / "example.png")
        text = card(name, entry, options.repo, picture=bool(options.picture))
        files.write_bytes(room / "README.md", text.encode())
        written = sorted(part.name for part in room.iterdir())
    print(f"Wrote {output}: {', '.join(written)}")
    if not options.dry_run:
        revision = _push(options, output, written, name)
        path = output / f"{name}.h5"
        facts = {"repo": options.repo, "revision": revision, "file": path.name}
        entry["hub"] = {**facts, **files.measure(path)}
        _complete_manifest(options.checkpoint, name, entry)


def _name(options):
    return options.checkpoint or options.repo.rpartition("/")[2]


def _output(options):
    return options.output or pathlib.Path("published", _name(options))


def _check(options):
    """Refuses what the options alone show to be wrong."""
    from huggingface_hub.utils import validate_repo_id

    if options.repo.count("/") != 1:
        raise ValueError(f"--repo is {options.repo!r}; expected owner/name on the Hub.")
    validate_repo_id(options.repo)
    if bool(options.evaluate) != bool(options.split):
        raise ValueError(
            "--evaluate and --split belong together: a score without its split says "
            "nothing. Give both or none."
        )
    if options.relabel and not options.evaluate:
        raise ValueError(
            "--relabel was given without --evaluate, which reads masks; leave it out."
        )
    cli_data.check_folder(_output(options))
    if not options.source.is_file():
        raise FileNotFoundError(
            f"{options.source} is not a file; expected trained weights."
        )
    if options.picture and not options.picture.is_file():
        raise FileNotFoundError(
            f"--picture {options.picture} is not a file; expected a photograph."
        )


def _check_shown(options, entry):
    """Refuses to score or to show a net that does not label photographs."""
    if not (options.evaluate or options.picture):
        return
    cli_data.check_labels_pictures(entry, options.source)
    model = entry["model"]
    if model.get("builder") == "late_fusion" or model.get("input_channels", 3) != 3:
        raise ValueError(
            f"The net of {options.source} takes depth beside colour; --evaluate and "
            "--picture are for nets of photographs alone. Leave them out."
        )


@contextlib.contextmanager
def _all_or_nothing(output):
    """Yields an empty folder whose files replace those of `output` at the end."""
    near = next(place for place in (output, *output.parents) if place.is_dir())
    with tempfile.TemporaryDirectory(dir=near, prefix=".publishing-") as room:
        room = pathlib.Path(room)
        yield room
        output.mkdir(parents=True, exist_ok=True)
        for part in room.iterdir():
            os.replace(part, output / part.name)


def _entry(options):
    """Returns what the card and the manifest say of the net."""
    if options.checkpoint:
        if options.license or options.trained_on:
            raise ValueError(
                "--checkpoint says license and training; leave out --license and "
                "--trained-on, or change the manifest."
            )
        return manifest.checkpoint_info(options.checkpoint)
    if options.source.suffix not in weights.SUFFIXES:
        raise ValueError(
            f"{options.source} does not say what it is; expected --checkpoint, or an "
            ".h5 file. Port it with tools/convert_caffe.py first."
        )
    entry = models.checkpoint_entry(options.source)
    for key in ("license", "trained_on"):
        given = getattr(options, key)
        if given and entry.get(key, given) != given:
            raise ValueError(
                f"{options.source} says {key} {entry[key]!r}, and others will read it "
                f"there; leave out --{key.replace('_', '-')}, which says {given!r}."
            )
        if given:
            entry[key] = given
    if "license" not in entry:
        raise ValueError(
            f"{options.source} says nothing of its license; expected --license, the "
            "terms on which others may use it."
        )
    return {"source": "trained by its publisher", "measured": {}, **entry}


def _write_weights(options, entry, path):
    """Ports or copies the weights, and returns the net that holds them."""
    if options.source.suffix in weights.SUFFIXES:
        model = models.build(entry, options.source)
        with files.replacing(path) as target, open(options.source, "rb") as source:
            shutil.copyfileobj(source, target)
        return model
    model = models.build(entry)
    with progress.reporting(f"Porting {options.source}") as report:
        expected = entry.get("caffemodel", {})
        given = {"metadata": entry, "expected": expected, "progress": report}
        porting.port(options.source, path, model, **given)
    weights.load(model, path)
    return model


def _evaluated(options, entry):
    """Finds and checks what to evaluate on; None if nothing is asked for."""
    if not options.evaluate:
        return None
    pairs, relabel = folder.pairs(*options.evaluate), dict(options.relabel)
    return folder.Folder(pairs, manifest.num_classes(entry), relabel=relabel)


def _measure(model, source, options):
    with progress.reporting("Evaluating") as report:
        found = evaluation.evaluate(
            model,
            evaluation.one_by_one(source),
            progress=lambda done: report(done, len(source)),
        )
    scores = {score: round(100 * found[score], 2) for score in SCORES}
    return {"split": options.split, "version": __version__, **scores}


def _draw(model, entry, picture, path):
    found = evaluation.segment(model, picture)
    sets = manifest.label_sets(entry)
    if isinstance(found, dict):  # the first head stands for all
        head = next(iter(found))
        found, known = found[head], sets.get(head)
    else:
        known = sets.get("")
    known = known or labels.LabelSet((), labels.voc_colormap())
    drawn = images.illustrate(picture, found, known.names, known.palette)
    images.save_image(path, drawn)


def card(name, entry, repo, picture=False):
    """Returns the model card, Markdown with YAML metadata.

    The model index, which leaderboards read, holds measured scores only.

    Args:
        name: Of the checkpoint.
        entry: A dict in the manifest's fields.
        repo: Where it will be, owner/name.
        picture: Whether example.png lies beside it.
    """
    from huggingface_hub import EvalResult, ModelCardData

    measured, published = entry.get("measured", {}), entry.get("published", {})
    slug = re.sub(r"[^a-z0-9.]+", "-", entry["license"].lower()).strip("-")
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=re.sub(r"\W+", "-", measured["split"].lower()),
            dataset_name=measured["split"],
            metric_type=score,
            metric_value=measured[score],
        )
        for score in SCORES
        if score in measured
    ]
    metadata = ModelCardData(
        model_name=name,
        library_name="keras",
        pipeline_tag="image-segmentation",
        tags=["keras-fcn", "semantic-segmentation", entry["model"]["backbone"]],
        license="other",
        license_name=slug[:80],
        eval_results=results or None,
    )
    sets = manifest.label_sets(entry)
    classes = "; ".join(", ".join(known.names) for known in sets.values())
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        what=_what(entry["model"]),
        repo=repo,
        usage=_usage(entry),
        picture="\n![A photograph, segmented](example.png)\n" if picture else "",
        trained_on=entry.get("trained_on", "not said"),
        license=entry["license"],
        source=entry["source"],
        input=_input(entry),
        classes=classes or manifest.num_classes(entry),
        scores=_scores_table(measured, published),
    )


def _what(model):
    kind = {"classifier": "Convolutionalised classifier", "late_fusion": "Late fusion"}
    kind = kind.get(model.get("builder"), "Fully convolutional network")
    stride = f", stride {model['stride']}," if "stride" in model else ""
    return (
        f"{kind} on {model['backbone']}{stride} for keras_fcn, after Long, Shelhamer & "
        "Darrell, *Fully Convolutional Networks for Semantic Segmentation* (2015)."
    )


def _usage(entry):
    """The line that shows how such a net is asked."""
    builder = entry["model"].get("builder", "fcn")
    several = isinstance(manifest.num_classes(entry), dict)
    labels = "{head: (height, width) uint8}" if several else "(height, width) uint8"
    streams = '{"color": "photo.png", "hha": "photo-hha.png"}'
    image = streams if builder == "late_fusion" else '"photo.jpg"'
    if builder == "classifier":
        return "heatmaps = model.predict(images)  # (batch, h, w, classes), logits"
    return f"labels = keras_fcn.segment(model, {image})  # {labels}"


def _input(entry):
    data = entry.get("input")
    if not data:
        return "what its trainer fed it: it has no preprocessing"
    streams = {"": data} if "channels" in data else data
    return "; ".join(
        f"{name or 'pictures'}, 0-255, of which the first layer makes "
        f"{stream['channels']} minus {', '.join(map(str, stream['mean']))}"
        for name, stream in streams.items()
    )


def _scores_table(measured, published):
    lines = [
        f"| {score} | {scores[score]} | {_cell(scores['split'])} | {_cell(who)} |"
        for scores, who in (
            (measured, f"measured with keras_fcn {measured.get('version')}"),
            (published, f"published: {published.get('source')}"),
        )
        for score in scores
        if isinstance(scores[score], float | int)
    ]
    if not lines:
        return "None are known."
    return "\n".join(["| score | % | split | by |", "|---|---|---|---|", *lines])


def _cell(text):
    return text.replace("|", r"\|")  # which would end it


def _push(options, output, written, name):
    """Uploads the files written and returns the commit."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=options.repo,
            folder_path=output,
            allow_patterns=written,
            commit_message=f"{name}, by keras_fcn",
        )
    except (errors.HTTPError, errors.LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        unknown = isinstance(error, errors.LocalTokenNotFoundError)
        refused = unknown or status in (401, 403)
        how = "Log in with `hf auth login` as who may write there, then run"
        raise OSError(
            f"{options.repo} could not be pushed: {str(error).rstrip('.')}. What was "
            f"to be pushed is in {output}. {how if refused else 'Run'} the same "
            "command again."
        ) from error
    print(f"Pushed to hf://{options.repo}@{commit.oid}")
    return commit.oid


def _complete_manifest(checkpoint, name, entry):
    if not checkpoint:
        print("In no manifest; an entry for it would be:\n")
        print(porting.entry_toml(name, entry))
        return
    path = manifest.folder() / "checkpoints.toml"
    # Scores of this run or none: those from before are of another file.
    facts = {key: entry[key] for key in ("hub", "measured") if key in entry}
    text = complete(path.read_text(encoding="utf-8"), checkpoint, facts)
    files.write_bytes(path, text.encode())
    print(f"Completed [{checkpoint}] in {path}")


def complete(text, name, facts):
    """Returns the manifest's text with facts in one entry, and all else as it was.

    Args:
        text: Of checkpoints.toml.
        name: Of the entry.
        facts: `{field: dict}`, to replace or to add.

    Raises:
        ValueError: If the text is not laid out as the manifest is, with an empty line
            after each entry and a line for each field.
    """
    head, title, rest = text.partition(f"[{name}]\n")
    body, end, tail = rest.partition("\n\n")
    lines = body.rstrip("\n").split("\n")
    for key, value in facts.items():
        written = porting.entry_toml(name, {key: value}).split("\n")[1]
        written = f"{key:11} = {written.partition(' = ')[2]}"
        lines = [line for line in lines if line.partition("=")[0].strip() != key]
        lines.append(written)
    new = head + title + "\n".join(lines) + (end or "\n") + tail
    before, after = tomllib.loads(text), tomllib.loads(new)
    if {**before, name: {**before[name], **facts}} != after:
        raise ValueError(
            f"The entry of {name} is not laid out as expected; nothing was changed. "
            f"Add by hand: {facts}"
        )
    return new


if __name__ == "__main__":
    sys.exit(main())
