"""export.py as a user starts it: every format, verified, and evaluated itself."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, TINY, execute, make_config, mpirun, randomise
from mindspore import Tensor
from scipy.special import softmax

from src.inference.backends import exported_metadata, naming_file, refusing_probabilities
from src.inference.calibration import calibration_of
from src.inference.export import MindirFormat, _config_to_record, export_checkpoint, network_size
from src.inference.onnx import write_onnx
from src.models.create import create_model
from src.models.networks import NETWORKS
from src.models.reparam import fuse
from src.models.weight_files import read_weights
from src.runs.checkpoint import save_checkpoint
from src.utils.errors import UserError


def export(*flags, **environment):
    return execute(["python3", "export.py", *flags], **environment)


def evaluated(path, image_root, tmp_path, ranks=1):
    command = [
        "eval.py",
        f"--data_path={image_root}/val",
        f"--checkpoint_file_path={path}",
        f"--result_path={tmp_path}/r.json",
    ]
    run = execute(["python3", *command]) if ranks == 1 else mpirun(ranks, *command)
    assert run.status == 0, run
    (result,) = json.loads((tmp_path / "r.json").read_text())
    return result["top1"], result["top5"], result["images"]


# Found by the wrong worlds of tests/hostile: each library reports a full disk in its own way,
# safetensors by an exception of its own.
@pytest.mark.parametrize(
    "file_format",
    [
        *(pytest.param(name, marks=pytest.mark.extended) for name in ("CKPT", "MINDIR", "ONNX")),
        pytest.param("SAFETENSORS", marks=pytest.mark.slow),
    ],
)
def test_no_room_for_the_exported_file_is_one_line_and_leaves_nothing(
    file_format, trained_run, tmp_path
):
    target = tmp_path / f"net.{file_format.lower()}"
    words = (
        f"python3 export.py --checkpoint_file_path={trained_run}/best.ckpt "
        f"--file_format={file_format} --result_path={target}"
    )
    run = execute(["bash", "-c", f"ulimit -f 100; exec {words}"])
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and f"cannot write '{target}'" in run.error_lines[0]
    ), run
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "file_format",
    [
        "CKPT",
        pytest.param("MINDIR", marks=pytest.mark.slow),
        pytest.param("ONNX", marks=pytest.mark.slow),
        pytest.param("SAFETENSORS", marks=pytest.mark.slow),
    ],
)
def test_exported_network_evaluates_like_the_trained_one(
    file_format, trained_run, image_root, tmp_path
):
    if file_format == "ONNX":
        pytest.importorskip("onnxruntime", reason="ONNX is an optional extra")
    target = tmp_path / f"net.{file_format.lower()}"
    tmp_path.chmod(0o755)
    run = export(
        f"--checkpoint_file_path={trained_run}/best.ckpt",
        f"--file_format={file_format}",
        f"--result_path={target}",
    )
    assert tmp_path.stat().st_mode & 0o777 == 0o755
    assert (
        run.status == 0 and "largest relative difference" in run.out and "multiply-adds" in run.out
    ), run
    # Its blocks became convolutions with biases.
    assert ("networks of torchvision do not load it" in run.out) == (file_format == "SAFETENSORS")
    expected = evaluated(trained_run / "best.ckpt", image_root, tmp_path)
    assert expected[2] == 67 and evaluated(target, image_root, tmp_path) == expected
    if file_format == "ONNX":
        assert evaluated(target, image_root, tmp_path, ranks=2) == expected
        words = [f"--data_path={image_root}/val", f"--checkpoint_file_path={target}"]
        run = execute(["python3", "eval.py", *words, "--image_size=48"])
        assert run.status == 2 and "takes images of 32 pixels" in run.error_lines[0], run


@pytest.mark.parametrize(
    "file_format,temperature",
    [
        ("CKPT", "auto"),
        *(
            pytest.param(*case, marks=pytest.mark.extended)
            for case in (("ONNX", "auto"), ("CKPT", "2.5"))
        ),
    ],
)
def test_a_temperature_changes_probabilities_and_no_class(
    file_format, temperature, trained_run, image_root, tmp_path
):
    if file_format == "ONNX":
        pytest.importorskip("onnxruntime", reason="ONNX is an optional extra")
    # The network is right about all of these; so five get a wrong class.
    data = tmp_path / "val"
    shutil.copytree(image_root / "val", data)
    for number in range(5, 10):
        (data / "bee" / f"00{number}.jpg").rename(data / "cat" / f"of_bee_{number}.jpg")
    target = tmp_path / f"net.{file_format.lower()}"
    run = export(
        f"--checkpoint_file_path={trained_run}/best.ckpt",
        f"--file_format={file_format}",
        f"--result_path={target}",
        f"--temperature={temperature}",
        f"--data_path={data}",
    )
    assert run.status == 0, run
    if temperature == "auto":
        found, before, after = re.search(
            r"temperature ([\d.]+) from 67 .* off by ([\d.]+) .* by ([\d.]+)", run.out
        ).groups()
        temperature = found
        assert float(after) < float(before), run
    results = []
    for path in (trained_run / "best.ckpt", target):
        words = [f"--checkpoint_file_path={path}", f"--result_path={tmp_path}/e.json"]
        run = execute(["python3", "eval.py", f"--data_path={data}", *words])
        assert run.status == 0, run
        results += json.loads((tmp_path / "e.json").read_text())
    original, scaled = results
    assert scaled["confusion"] == original["confusion"] and scaled["loss"] != original["loss"]
    # The loss falls where the temperature was found, and the card says what was done.
    assert temperature == "2.5" or scaled["loss"] < original["loss"]
    assert (
        f"temperature {float(temperature):.3g}" in target.with_name(f"{target.name}.md").read_text()
    )


@pytest.mark.parametrize(
    "part,words", [("train", "training has not seen"), ("val", "67 images that are all right")]
)
def test_a_temperature_that_cannot_be_known_is_refused(
    trained_run, image_root, tmp_path, part, words
):
    run = export(
        f"--checkpoint_file_path={trained_run}/best.ckpt",
        f"--result_path={tmp_path}/net.ckpt",
        f"--data_path={image_root}/{part}",
        "--temperature=auto",
    )
    assert run.status == 2 and words in run.error_lines[0], run
    assert not list(tmp_path.iterdir())


def test_a_temperature_that_makes_probabilities_worse_is_refused():
    """A network that excludes one class of three, and guesses between the others.

    Of 100 images 30 are of the class that it prefers by a hair. A low temperature excludes the
    third class for certain, which lowers the loss, but makes the hair a probability of 0.54.
    """
    logits = np.tile(np.float32([0.2, 0.19, 0]), (100, 1))
    labels = np.where(np.arange(100) < 30, 0, 1)
    with pytest.raises(
        UserError, match=r"off by 2\d\.\d percentage points on average, and without it by 5\.6"
    ):
        calibration_of(logits, labels)
    # Right about 80 of 100, always with the same certainty of 99 %.
    labels = np.arange(100) * 3 // 100
    sure = np.eye(3, dtype=np.float32)[np.where(np.arange(100) % 5 < 4, labels, (labels + 1) % 3)]
    found = calibration_of(5 * sure, labels)
    assert found.after < 0.1 < found.before and found.images == 100


@pytest.mark.slow
def test_the_documents_example_needs_no_mindspore(trained_run, image_root, tmp_path):
    """docs/using.md's classify.py, in a folder of its own: the classes that predict.py finds.

    Also with its three lines for a model that prepares images itself.
    """
    pytest.importorskip("onnxruntime", reason="ONNX is an optional extra")
    words = (ROOT / "docs" / "using.md").read_text()
    (example,) = re.findall(r"```python\n(# classify.py\n.*?)```", words, re.S)
    assert not re.search(r"import (?!json|sys|numpy|onnxruntime|Image, ImageOps)", example)
    (shorter,) = re.findall(r"```python\n(inputs = np.asarray.*?)```", words, re.S)
    (tmp_path / "classify.py").write_text(example)
    beginning = example.partition("resized = ")[0]
    (tmp_path / "inside.py").write_text(beginning + shorter)
    for name, preprocessing in (("net", 0), ("inside", 1)):
        run = export(
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            "--file_format=ONNX",
            f"--onnx_preprocessing={preprocessing}",
            f"--result_path={tmp_path}/{name}.onnx",
        )
        assert run.status == 0, run
    # This program ignores the preprocessing in the file: its own is that of the other one.
    results = [evaluated(tmp_path / f"{n}.onnx", image_root, tmp_path) for n in ("net", "inside")]
    assert results[0] == results[1]
    files = [str(image_root / "val" / name / "003.jpg") for name in ("ant", "bee", "cat")]
    predicted = execute(
        ["python3", "predict.py", f"--checkpoint_file_path={trained_run}/best.ckpt", *files]
        + [f"--result_path={tmp_path}/p.json"]
    )
    assert predicted.status == 0, predicted
    for file, entry in zip(files, json.loads((tmp_path / "p.json").read_text()), strict=True):
        for script, model in (("classify.py", "net.onnx"), ("inside.py", "inside.onnx")):
            run = execute(["python3", tmp_path / script, tmp_path / model, file])
            assert run.out.strip() == entry["predictions"][0]["class"], run


# Unfused exports take long to compile; these have each kind of layer.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name,size,fused",
    [
        ("resnet18", 32, False),
        *(
            pytest.param(*case, marks=pytest.mark.extended)
            for case in (
                ("resnext50_32x4d", 32, True),
                ("alexnet", 80, False),
                ("wrn16_8_cifar", 32, True),
                ("vgg16_cifar", 32, True),
            )
        ),
    ],
)
def test_every_network_exports_to_onnx(name, size, fused, tmp_path):
    """MindSpore's exporter writes the one-sided paddings of trained blocks in the wrong order."""
    pytest.importorskip("onnxruntime", reason="ONNX is an optional extra")
    network = create_model(name, 10, "acb", image_size=size)
    randomise(network)
    path = tmp_path / "net.ckpt"
    save_checkpoint(path, network.get_parameters(), {})
    flags = {"network": name, "image_size": str(size)}
    exported = export_checkpoint(path, flags, "ONNX", fuses=fused)
    assert 0 < exported.difference < 1e-4


def test_safetensors_have_torchvisions_names(tmp_path):
    network = create_model("resnet18", 10)
    save_checkpoint(tmp_path / "net.ckpt", network.get_parameters(), {})
    export_checkpoint(
        tmp_path / "net.ckpt", {"network": "resnet18", "image_size": "32"}, "SAFETENSORS"
    )
    arrays, _ = read_weights(tmp_path / "net.safetensors")
    ours = {p.name: p.asnumpy() for p in network.get_parameters()}
    assert np.array_equal(arrays["layer1.0.bn2.weight"], ours["layer1.0.conv2.norm.gamma"])
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.0.weight", "fc.bias"} <= set(
        arrays
    )


# Giga multiply-adds that torchvision documents for its models at 224 x 224.
@pytest.mark.parametrize(
    "name,published",
    [
        ("alexnet", 0.71),
        ("resnet18", 1.81),
        ("resnext50_32x4d", 4.23),
        ("densenet121", 2.83),
        ("mobilenet_v2", 0.3),
    ],
)
def test_multiply_adds_are_the_published_ones(name, published):
    size = network_size(create_model(name, 1000), 224)
    assert (
        size.multiply_adds / 1e9 == pytest.approx(published, abs=0.005)
        and size == NETWORKS[name].size
    )


@pytest.mark.extended
@pytest.mark.parametrize("name", NETWORKS)
def test_the_table_of_networks_says_what_they_cost(name):
    side = NETWORKS[name].image_size
    assert network_size(create_model(name, 10 if side == 32 else 1000), side) == NETWORKS[name].size


def test_fusion_brings_parameters_and_work_back_to_the_plain_network():
    network = create_model("cifar_quick", 10, "acb")
    plain, fused = (
        network_size(create_model("cifar_quick", 10), 32),
        network_size(fuse(network), 32),
    )
    assert fused.multiply_adds == plain.multiply_adds
    # A bias instead of scale and offset.
    assert fused.parameters == plain.parameters - (32 + 32 + 64)
    assert network_size(network, 32).multiply_adds > 1.3 * plain.multiply_adds
    assert network.set_train(False)(Tensor(np.zeros((1, 3, 32, 32), np.float32))).shape == (1, 10)


@pytest.mark.parametrize("file_format", ["CKPT", "SAFETENSORS", "MINDIR"])
def test_a_file_that_differs_is_removed(file_format, tmp_path, monkeypatch):
    network = create_model("cifar_quick", 10, "acb")
    randomise(network)
    save_checkpoint(tmp_path / "net.ckpt", network.get_parameters(), {})
    monkeypatch.setattr("src.inference.export._TOLERANCE", 0.0)
    with pytest.raises(UserError, match="differs from the checkpoint by"):
        export_checkpoint(
            tmp_path / "net.ckpt", {"network": "cifar_quick", "image_size": "32"}, file_format
        )
    assert [file.name for file in tmp_path.iterdir()] == ["net.ckpt"]


@pytest.mark.slow
def test_wrong_checkpoint_or_folder_leaves_no_file(tmp_path, trained_run):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    run = export(
        f"--checkpoint_file_path={tmp_path}/text.ckpt", f"--result_path={tmp_path}/out.ckpt"
    )
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and "not a MindSpore checkpoint" in run.error_lines[0]
    ), run
    for file_format in ("CKPT", "ONNX", "MINDIR", "SAFETENSORS"):
        run = export(
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"--result_path={tmp_path}/text.ckpt/out.{file_format.lower()}",
            f"--file_format={file_format}",
        )
        assert (
            run.status == 2 and len(run.error_lines) == 1 and "cannot write" in run.error_lines[0]
        ), run
    assert [file.name for file in tmp_path.iterdir()] == ["text.ckpt"]
    run = export(f"--checkpoint_file_path={trained_run}/best.ckpt", "--file_format=TFLITE")
    assert run.status == 2 and "file_format=TFLITE" in run.error_lines[0], run


def test_damaged_deployed_files_are_one_line(tmp_path):
    (tmp_path / "a.mindir.json").write_text("{}")
    for name in ("a.onnx", "a.mindir"):
        (tmp_path / name).write_bytes(b"\x08\x07garbage" * 20)
        run = execute(
            [
                "python3",
                "eval.py",
                f"--checkpoint_file_path={tmp_path}/{name}",
                "--data_path=digits",
                *TINY,
            ]
        )
        assert run.status == 2 and len(run.error_lines) == 1 and "damaged" in run.error_lines[0], (
            run
        )


def test_recorded_text_that_is_no_text_is_one_line(tmp_path):
    """Damage of one byte can make the recorded names of classes invalid UTF-8."""
    pytest.importorskip("onnxruntime")
    file = tmp_path / "a.onnx"
    write_onnx(create_model("cifar_quick", 10).set_train(False), file, {"classes": ["cat"]}, 32)
    file.write_bytes(file.read_bytes().replace(b"cat", b"c\xa3t"))
    (tmp_path / "a.mindir").touch()
    (tmp_path / "a.mindir.json").write_bytes(b'{"classes": ["c\xa3t"]}')
    for exported in (file, tmp_path / "a.mindir"):
        with pytest.raises(UserError, match=f"metadata of '{exported}' is damaged"):
            exported_metadata(exported)


def test_a_mindir_without_its_own_record_is_refused(tmp_path):
    for name, classes in (("a", 10), ("b", 5)):
        network = create_model("cifar_quick", classes).set_train(False)
        MindirFormat().write(network, tmp_path / f"{name}.mindir", {}, 32)
    assert exported_metadata(tmp_path / "a.mindir")
    (tmp_path / "b.mindir").replace(tmp_path / "a.mindir")
    with pytest.raises(UserError, match="a.mindir.json' belongs to another 'a.mindir'"):
        exported_metadata(tmp_path / "a.mindir")
    (tmp_path / "a.mindir.json").unlink()
    with pytest.raises(UserError, match="a.mindir.json' is missing"):
        exported_metadata(tmp_path / "a.mindir")


def test_outputs_that_are_probabilities_are_refused():
    logits = np.array([[1, 2, 3], [0.2, 0.3, 0.5]], np.float32)
    assert refusing_probabilities(lambda images: logits)(None) is logits
    with pytest.raises(UserError, match="without the softmax"):
        refusing_probabilities(lambda images: softmax(logits, axis=1))(None)


def test_an_export_records_the_images_of_training(trained_run, image_root, tmp_path):
    export_checkpoint(
        trained_run / "best.ckpt", {"data_path": f"{image_root}/val"}, "CKPT", f"{tmp_path}/x.ckpt"
    )
    before, after = (read_weights(f)[1] for f in (trained_run / "best.ckpt", tmp_path / "x.ckpt"))
    for key in ("data_path", "val_split", "eval_data_path", "seed"):
        assert before["config"][key] == after["config"][key], key
    trained = {"label_smooth_factor": 0.25, "loss": "binary_cross_entropy", "amp_level": "O2"}
    recorded = _config_to_record(make_config(), {"config": trained})
    assert trained.items() <= recorded.items()


def test_an_error_while_computing_an_exported_file_names_it():
    def broken(images):
        raise RuntimeError("\n- internal -\n")

    with pytest.raises(UserError, match="'a.onnx' cannot be computed; it is damaged"):
        naming_file(broken, "a.onnx")(None)


@pytest.mark.slow
def test_eight_bits_are_as_good_and_smaller(trained_run, image_root, tmp_path):
    pytest.importorskip("onnxruntime")
    words = [
        "python3",
        "export.py",
        f"--checkpoint_file_path={trained_run}/best.ckpt",
        "--quantize=int8",
    ]
    run = execute([*words, "--file_format=ONNX", f"--result_path={tmp_path}/net.onnx"])
    assert run.status == 0, run
    found = {}
    for line in run.out.splitlines()[-2:]:
        line = re.fullmatch(
            r"(\w+): top1=([\d.]+),top5=[\d.]+, [\d.]+ images/s, ([\d.]+) MB, (\S+)", line
        )
        kind, top1, size, file = line.groups()
        found[kind] = float(top1), float(size), file
    assert (
        found["int8"][2] == f"{tmp_path}/net_int8.onnx"
        and found["int8"][1] < 0.5 * found["float32"][1]
    )
    assert abs(found["int8"][0] - found["float32"][0]) < 4
    again = execute(
        [
            "python3",
            "eval.py",
            f"--checkpoint_file_path={tmp_path}/net_int8.onnx",
            f"--data_path={image_root}/val",
        ]
    )
    assert again.status == 0 and f"acc={found['int8'][0]:.2f}%(TOP1)" in again.out, again
    plain = [word for word in words if "int8" not in word]
    run = execute([*plain, "--file_format=ONNX", f"--result_path={tmp_path}/net.onnx"])
    assert f"warning: {tmp_path}/net_int8.onnx is left from an earlier export" in run.out, run


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["CKPT", "MINDIR", "ONNX"])
def test_a_name_without_its_ending_is_one_line(trained_run, tmp_path, file_format):
    run = execute(
        [
            "python3",
            "export.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            f"--file_format={file_format}",
            f"--result_path={tmp_path}/net",
        ]
    )
    assert (
        run.status == 2
        and len(run.error_lines) == 1
        and f".{file_format.lower()}" in run.error_lines[0]
    ), run
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags,words",
    [
        ((), "add --file_format=ONNX"),
        (("--file_format=ONNX", "--quantize=int8"), "exclude each other"),
    ],
)
def test_preprocessing_is_for_float_onnx_files(trained_run, flags, words):
    checkpoint = f"--checkpoint_file_path={trained_run}/best.ckpt"
    run = export(checkpoint, "--onnx_preprocessing=1", *flags)
    assert run.status == 2 and len(run.error_lines) == 1 and words in run.error_lines[0], run


def test_quantize_needs_onnx(trained_run):
    run = execute(
        [
            "python3",
            "export.py",
            f"--checkpoint_file_path={trained_run}/best.ckpt",
            "--quantize=int8",
        ]
    )
    assert (
        run.status == 2 and len(run.error_lines) == 1 and "--file_format=ONNX" in run.error_lines[0]
    ), run
