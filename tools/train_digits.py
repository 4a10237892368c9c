#!/usr/bin/env python3
"""Train the example network on handwritten digits and export it to ONNX in the forms users meet.

Run without options, this writes everything in ``models/`` but the README: four ONNX files of one trained
network, a calibration set without labels, a test set with labels, and ``MANIFEST.json``. That needs torch,
onnxscript and scikit-learn. With ``--verify`` it checks the files against the manifest and measures their
accuracy again in ONNX Runtime; that needs neither torch nor scikit-learn.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

MODELS_DIR = Path(__file__).resolve().parent.parent / "models"
MANIFEST_NAME = "MANIFEST.json"
CALIBRATION_NAME = "digits_calibration.npz"
TEST_NAME = "digits_test.npz"
INPUT_NAME = "image"
OUTPUT_NAME = "logits"
GENERATOR = "tools/train_digits.py"

SEED = 20240607
TEST_COUNT = 450
CALIBRATION_COUNT = 256
VALIDATION_COUNT = 250
EPOCHS = 40
BATCH = 64
PEAK_LEARNING_RATE = 5e-3
WEIGHT_DECAY = 1e-2
# The digits are stored as counts of dark pixels in 4x4 cells.
PIXEL_MAX = 16.0
# The newest IR version that ONNX Runtime 1.22, the oldest supported one, is sure to read.
MAX_IR_VERSION = 10
LOGITS_TOLERANCE = 1e-4

MODEL_NOTES = {
    "digits_bn.onnx": "TorchScript exporter, BatchNormalization kept as nodes in inference form",
    "digits_folded.onnx": "TorchScript exporter, BatchNormalization folded into Conv (its default)",
    "digits_dynamo.onnx": "torch.export exporter, optimised (its default)",
    "digits_dynamo_bn.onnx": "torch.export exporter without optimisation, BatchNormalization kept",
}
KEPT_BATCH_NORM = ("digits_bn.onnx", "digits_dynamo_bn.onnx")
LICENCES = {
    "network": "Apache-2.0, as the project",
    "data": (
        "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, "
        "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; "
        "the copy shipped with scikit-learn (load_digits), scaled to [0, 1] and split"
    ),
}


class Split(NamedTuple):
    """The digits in parts: training images and labels, and test images and labels."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


class Score(NamedTuple):
    """How many of ``n`` images a network classified correctly."""

    correct: int
    n: int

    @property
    def top1(self) -> float:
        """The accuracy, rounded so that the manifest is easy to read."""
        return round(self.correct / self.n, 6)


class VerificationError(Exception):
    """A file in the models folder is not what the manifest says."""


def say(line: str) -> None:
    """Write one line to standard output."""
    sys.stdout.write(line + "\n")


def load_split() -> Split:
    """Load the digits of scikit-learn and split them, stratified by class, always in the same way."""
    datasets: Any = importlib.import_module("sklearn.datasets")
    selection: Any = importlib.import_module("sklearn.model_selection")
    digits = datasets.load_digits()
    images = (digits.images[:, None, :, :] / PIXEL_MAX).astype(np.float32)
    labels = digits.target.astype(np.int64)
    parts = selection.train_test_split(images, labels, test_size=TEST_COUNT, stratify=labels, random_state=SEED)
    train_images, test_images, train_labels, test_labels = parts
    return Split(train_images, train_labels, test_images, test_labels)


def compose(torch: Any, class_name: str, parts: Mapping[str, Any], forward: Callable[[Any, Any], Any]) -> Any:
    """Make a ``torch.nn.Module`` of named parts and a forward function.

    Torch is imported late and untyped, so a plain class statement would have to stand inside a function and
    derive from an unknown type.
    """
    module = type(class_name, (torch.nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def residual_block(torch: Any, channels_in: int, channels_out: int, stride: int) -> Any:
    """Make a ResNet basic block; its shortcut is the identity where the shapes allow it."""
    nn = torch.nn
    if stride == 1 and channels_in == channels_out:
        shortcut = nn.Identity()
    else:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
        )
    parts = {
        "conv1": nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(channels_out),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        "bn2": nn.BatchNorm2d(channels_out),
        "shortcut": shortcut,
        "relu2": nn.ReLU(),
    }

    def forward(self: Any, x: Any) -> Any:
        inner = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(inner)) + self.shortcut(x))

    return compose(torch, "ResidualBlock", parts, forward)


def build_network(torch: Any) -> Any:
    """Make the untrained network: a stem, three residual blocks, global average pooling and a classifier."""
    nn = torch.nn
    parts = {
        "conv": nn.Conv2d(1, 16, 3, padding=1, bias=False),
        "bn": nn.BatchNorm2d(16),
        "relu": nn.ReLU(),
        "block1": residual_block(torch, 16, 16, 1),
        "block2": residual_block(torch, 16, 32, 2),
        "block3": residual_block(torch, 32, 32, 1),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(32, 10),
    }

    def forward(self: Any, image: Any) -> Any:
        x = self.relu(self.bn(self.conv(image)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(self.flatten(self.pool(x)))

    return compose(torch, "DigitsNet", parts, forward)


def shifted(torch: Any, batch: Any) -> Any:
    """Move every image of a batch by up to one pixel each way, the only augmentation used."""
    padded = torch.nn.functional.pad(batch, (1, 1, 1, 1))
    size = batch.shape[-1]
    offsets = torch.randint(0, 3, (len(batch), 2)).tolist()
    crops = [image[:, top : top + size, left : left + size] for image, (top, left) in zip(padded, offsets, strict=True)]
    return torch.stack(crops)


def train(torch: Any, images: Images, labels: Labels) -> Any:
    """Train the network on the given images, always in the same way, and return it in evaluation mode."""
    torch.manual_seed(SEED)
    # One thread: sums split over threads would depend on how many cores a machine has.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    network = build_network(torch)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    steps_per_epoch = len(x) // BATCH
    optimiser = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    network.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(x))
        for step in range(steps_per_epoch):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            optimiser.zero_grad()
            criterion(network(shifted(torch, x[chosen])), y[chosen]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


def validate() -> None:
    """Train on a part of the training images and report the accuracy on the rest; for choosing settings."""
    torch: Any = importlib.import_module("torch")
    split = load_split()
    network = train(torch, split.train_images[VALIDATION_COUNT:], split.train_labels[VALIDATION_COUNT:])
    with torch.no_grad():
        logits = network(torch.from_numpy(split.train_images[:VALIDATION_COUNT])).numpy()
    score = score_logits(logits, split.train_labels[:VALIDATION_COUNT])
    say(f"validation: {score.correct} of {score.n} correct ({score.top1:.2%})")


def clear_notes(message: Any) -> None:
    """Remove the doc string and the metadata of one protobuf message, where it has such fields."""
    for field in ("doc_string", "metadata_props"):
        if field in message.DESCRIPTOR.fields_by_name:
            message.ClearField(field)


def strip_graph(graph: Any) -> None:
    """Remove doc strings and metadata from a graph or function, its nodes, its values and its subgraphs."""
    clear_notes(graph)
    for field in ("input", "output", "value_info", "initializer"):
        # The inputs and outputs of a function are plain names.
        for item in getattr(graph, field, ()):
            if not isinstance(item, str):
                clear_notes(item)
    for node in graph.node:
        clear_notes(node)
        for attribute in node.attribute:
            clear_notes(attribute)
            if attribute.HasField("g"):
                strip_graph(attribute.g)
            for subgraph in attribute.graphs:
                strip_graph(subgraph)


def strip(model: onnx.ModelProto) -> None:
    """Remove all doc strings and metadata, where the exporters write stack traces with paths."""
    clear_notes(model)
    strip_graph(model.graph)
    for function in model.functions:
        strip_graph(function)


def export(torch: Any, network: Any, name: str, path: Path) -> None:
    """Export the network with the exporter and the settings that the file name stands for."""
    example = torch.zeros(2, 1, 8, 8)
    common: dict[str, Any] = {"input_names": [INPUT_NAME], "output_names": [OUTPUT_NAME], "verbose": False}
    if name.startswith("digits_dynamo"):
        common |= {
            "dynamo": True,
            "opset_version": 18,
            "dynamic_shapes": {"image": {0: torch.export.Dim("batch")}},
            "external_data": False,
            "optimize": name not in KEPT_BATCH_NORM,
        }
    else:
        common |= {
            "dynamo": False,
            "opset_version": 17,
            "dynamic_axes": {INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
        }
        if name in KEPT_BATCH_NORM:
            # In mode EVAL this exporter always fuses Conv and BatchNormalization; PRESERVE keeps the nodes,
            # in inference form because the network itself is in evaluation mode.
            common |= {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    with warnings.catch_warnings():
        # The exporter that most files in use come from is announced as deprecated on every call.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(network, (example,), str(path), **common)
    model = onnx.load(path)
    strip(model)
    model.ir_version = min(model.ir_version, MAX_IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    has_batch_norm = "BatchNormalization" in operators(model)
    if has_batch_norm != (name in KEPT_BATCH_NORM):
        msg = f"{name}: BatchNormalization nodes {'kept' if has_batch_norm else 'lost'}, against its purpose"
        raise VerificationError(msg)
    path.write_bytes(model.SerializeToString(deterministic=True))


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """Count the nodes of a model by operator."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def parameter_count(model: onnx.ModelProto) -> int:
    """Count the elements of all float initializers of a model."""
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    return sum(int(np.prod(t.dims, dtype=np.int64)) for t in floats)


def run_model(path: Path, images: Images) -> Images:
    """Run an ONNX file in ONNX Runtime on the CPU and return its logits."""
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits: Images = session.run([OUTPUT_NAME], {INPUT_NAME: images})[0]
    return logits


def score_logits(logits: Images, labels: Labels) -> Score:
    """Compare the strongest logit of each image with its label."""
    return Score(int(np.count_nonzero(logits.argmax(axis=1) == labels)), len(labels))


def load_test(folder: Path) -> tuple[Images, Labels]:
    """Read the test images and labels of a models folder."""
    with np.load(folder / TEST_NAME) as arrays:
        return arrays["image"], arrays["labels"]


def describe(path: Path, what: str) -> dict[str, Any]:
    """Describe a file for the manifest: its digest and its size, and what it is."""
    content = path.read_bytes()
    return {
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "what": what,
        "generator": GENERATOR,
    }


def describe_model(path: Path, what: str, images: Images, labels: Labels) -> dict[str, Any]:
    """Describe an ONNX file for the manifest, with its accuracy measured in ONNX Runtime."""
    model = onnx.load(path)
    score = score_logits(run_model(path, images), labels)
    return describe(path, what) | {
        "opset": next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "parameters": parameter_count(model),
        "operators": operators(model),
        "test_accuracy": {"top1": score.top1, "correct": score.correct, "n": score.n},
    }


def versions() -> dict[str, str]:
    """Name the versions of the packages that decide what the generated files hold."""
    packages = ("torch", "onnx", "onnxscript", "scikit-learn", "numpy")
    found = {package: importlib.metadata.version(package) for package in packages}
    runtime: Any = importlib.import_module("onnxruntime")
    return found | {"onnxruntime": str(runtime.__version__)}


def write_data(folder: Path, split: Split) -> None:
    """Write the calibration set, without labels, and the test set."""
    # The split is shuffled and stratified, so the first images are a fair sample. The keyword is INPUT_NAME.
    np.savez_compressed(folder / CALIBRATION_NAME, image=split.train_images[:CALIBRATION_COUNT])
    np.savez_compressed(folder / TEST_NAME, image=split.test_images, labels=split.test_labels)


def check_export(torch: Any, network: Any, path: Path, images: Images) -> None:
    """Make sure that an exported file computes what the network computes.

    Raises:
        VerificationError: If any logit differs by more than rounding explains.
    """
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    difference = float(np.abs(run_model(path, images) - expected).max())
    if not difference <= LOGITS_TOLERANCE:
        msg = f"{path.name}: the logits differ from those of the trained network by up to {difference:.3g}"
        raise VerificationError(msg)


def generate(folder: Path) -> None:
    """Train the network and write all files of the models folder but the README."""
    torch: Any = importlib.import_module("torch")
    split = load_split()
    network = train(torch, split.train_images, split.train_labels)
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, split)
    files: dict[str, dict[str, Any]] = {}
    for name, what in MODEL_NOTES.items():
        # The exporters may leave files of their own beside the model.
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            export(torch, network, name, path)
            (folder / name).write_bytes(path.read_bytes())
        check_export(torch, network, folder / name, split.train_images[:CALIBRATION_COUNT])
        files[name] = describe_model(folder / name, what, split.test_images, split.test_labels)
    files[CALIBRATION_NAME] = describe(
        folder / CALIBRATION_NAME, f"{CALIBRATION_COUNT} of the training images, without labels"
    )
    files[TEST_NAME] = describe(
        folder / TEST_NAME, f"{TEST_COUNT} held-out images with labels, used for measuring only"
    )
    manifest = {"files": files, "licences": LICENCES, "seed": SEED, "versions": versions()}
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def find_mismatches(folder: Path) -> list[str]:
    """Compare the files of a models folder with its manifest; the accuracy only where all digests agree."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    problems: list[str] = []
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
            continue
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != entry["sha256"]:
            problems.append(f"{name}: sha256 is {actual}, the manifest says {entry['sha256']}")
    if problems:
        return problems
    images, labels = load_test(folder)
    for name, entry in manifest["files"].items():
        if "test_accuracy" not in entry:
            continue
        score = score_logits(run_model(folder / name, images), labels)
        say(f"{name}: {score.correct} of {score.n} correct ({score.top1:.2%})")
        if score._asdict() | {"top1": score.top1} != entry["test_accuracy"]:
            problems.append(f"{name}: measured {score}, the manifest says {entry['test_accuracy']}")
    return problems


def verify(folder: Path) -> None:
    """Check the files of a models folder against its manifest.

    Raises:
        VerificationError: If a file is missing or changed, or has another accuracy.
    """
    if not (folder / MANIFEST_NAME).is_file():
        msg = f"{folder / MANIFEST_NAME}: missing"
        raise VerificationError(msg)
    problems = find_mismatches(folder)
    if problems:
        raise VerificationError("\n".join(problems))
    say(f"all files match {MANIFEST_NAME}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description="Train and export the example network, or check its files.")
    parser.add_argument("--folder", type=Path, default=MODELS_DIR, help="the models folder (default: models/)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--verify", action="store_true", help="only check the files; needs no torch")
    mode.add_argument(
        "--validate", action="store_true", help="only train, on a part, and report the accuracy on the rest"
    )
    options = parser.parse_args(arguments)
    try:
        if options.validate:
            validate()
            return 0
        if not options.verify:
            generate(options.folder)
        verify(options.folder)
    except VerificationError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
