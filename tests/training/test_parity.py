"""The same numbers as PyTorch: logits, loss, gradients and a short training, from the same weights and batches.

Definitions that differ, and where each is handled: batch norm's momentum (src/models/layers.py), weight decay within
momentum (src/training/optimizer.py), label smoothing (src/training/step.py), running variance (below), dropout, which is
off here because the random streams differ.
"""

import math
from collections import OrderedDict

import cv2
import numpy as np
import pytest
from mindspore import Tensor

from conftest import make_config
from src.models import build_model
from src.models.name_maps import torch_name
from src.models.weights import assign_weights
from src.parallel.communicator import Communicator
from src.training.inference import NetworkEngine
from src.training.schedule import learning_rate
from src.training.step import ForwardBackward, InputNormalizer, NetworkWithLoss, create_train_step

torch = pytest.importorskip("torch", reason="PyTorch, a development-only dependency, is not installed")
nn, functional = torch.nn, torch.nn.functional

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 10
LR = 0.0005


class TorchBlock(nn.Module):
    """ResNet's basic block, or with groups ResNeXt's bottleneck."""

    def __init__(self, in_channels, width, out_channels, stride, groups):
        super().__init__()
        shapes = ([(in_channels, width, 3, stride, 1), (width, out_channels, 3, 1, 1)] if groups == 1 else
                  [(in_channels, width, 1, 1, 1), (width, width, 3, stride, groups), (width, out_channels, 1, 1, 1)])
        for number, (i, o, k, s, g) in enumerate(shapes, 1):
            setattr(self, f"conv{number}", nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False))
            setattr(self, f"bn{number}", nn.BatchNorm2d(o))
        self.depth = len(shapes)
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                                            nn.BatchNorm2d(out_channels))

    def forward(self, x):
        out = x
        for number in range(1, self.depth + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            out = functional.relu(out) if number < self.depth else out
        return functional.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class TorchResNet(nn.Module):
    def __init__(self, depths, groups):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        in_channels = 64
        for stage, depth in enumerate(depths):
            channels = 64 << stage
            width, out_channels = (channels, channels) if groups == 1 else (channels * 2, channels * 4)
            blocks = []
            for index in range(depth):
                blocks.append(TorchBlock(in_channels, width, out_channels, 2 if stage and not index else 1, groups))
                in_channels = out_channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(in_channels, CLASSES)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(x.mean((2, 3)))


def torch_alexnet():
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2))
    classifier = nn.Sequential(nn.Dropout(0), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0), nn.Linear(4096, 4096), nn.ReLU(),
                               nn.Linear(4096, CLASSES))
    return nn.Sequential(OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(6), flatten=nn.Flatten(),
                                     classifier=classifier))


class TorchAcb(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.square_conv = nn.Conv2d(in_channels, out_channels, 5, padding=2, bias=False)
        self.hor_conv = nn.Conv2d(in_channels, out_channels, (1, 5), padding=(0, 2), bias=False)
        self.ver_conv = nn.Conv2d(in_channels, out_channels, (5, 1), padding=(2, 0), bias=False)
        self.square_bn, self.hor_bn, self.ver_bn = (nn.BatchNorm2d(out_channels) for _ in range(3))

    def forward(self, x):
        return self.square_bn(self.square_conv(x)) + self.hor_bn(self.hor_conv(x)) + self.ver_bn(self.ver_conv(x))


class TorchQuick(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = TorchAcb(3, 32), TorchAcb(32, 32), TorchAcb(32, 64)
        self.fc1, self.classifier = nn.Linear(576, 64), nn.Linear(64, CLASSES)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv2(x)), 3, 2)
        x = functional.avg_pool2d(functional.relu(self.conv3(x)), 3, 2)
        return self.classifier(functional.relu(self.fc1(x.flatten(1))))


CASES = {"alexnet": (torch_alexnet, "base", 64), "resnet18": (lambda: TorchResNet((2, 2, 2, 2), 1), "base", 64),
         "resnext50_32x4d": (lambda: TorchResNet((3, 4, 6, 3), 32), "base", 64), "cifar_quick": (TorchQuick, "acb", 32)}


class Pair:
    """A network here and in PyTorch with the same weights, and random batches for both."""

    def __init__(self, name):
        make, block, self.size = CASES[name]
        torch.manual_seed(0)
        self.name, self.theirs = name, make()
        # Residual branches begin small, as in Goyal et al. (arXiv:1706.02677, section 5.1), only more so. Without that the
        # comparison is one of rounding: PyTorch's own float32 and float64 loss curves of ResNeXt-50 then part by 0.1.
        for module in self.theirs.modules():
            if isinstance(module, TorchBlock):
                nn.init.constant_(getattr(module, f"bn{module.depth}").weight, 0.02)
        self.ours = build_model(name, CLASSES, block, image_size=self.size, dropout=0.0)
        assign_weights(self.ours, {key: value.numpy().copy() for key, value in self.theirs.state_dict().items()}, name)
        self.random = np.random.default_rng(0)
        self._forward_backward = None

    def batch(self, count=16):
        """Smooth random images; the red channel tells the class."""
        labels = self.random.integers(0, CLASSES, count).astype(np.int32)
        coarse = self.random.integers(0, 256, (count, 6, 6, 3), np.uint8)
        images = np.stack([cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_CUBIC) for image in coarse])
        images[:, :, :, 0] = images[:, :, :, 0] // 2 + (labels * 12)[:, None, None].astype(np.uint8)
        return images, labels

    def loss_and_gradients(self, images, labels):
        """Loss with smoothing 0.1 and {name: gradient} here, in training mode."""
        if self._forward_backward is None:
            with_loss = NetworkWithLoss(self.ours, InputNormalizer(MEAN, STD), 0.1)
            self._forward_backward = ForwardBackward(with_loss, self.ours.trainable_params()).set_train(True)
        loss, gradients = self._forward_backward(Tensor(images), Tensor(labels))
        return float(loss.asnumpy()), {p.name: g.asnumpy() for p, g in zip(self.ours.trainable_params(), gradients)}

    def normalised(self, images):
        return torch.from_numpy((((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2)).astype(np.float32))


@pytest.fixture(params=[pytest.param(name, marks=() if name == "cifar_quick" else pytest.mark.slow) for name in CASES])
def pair(request):
    return Pair(request.param)


def report(capsys, text):
    with capsys.disabled():
        print(f"\n{text}")


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_logits_and_loss_are_pytorchs(pair, capsys):
    images, labels = pair.batch()
    x, y = pair.normalised(images), torch.from_numpy(labels).long()
    expected = pair.theirs.eval()(x).detach().numpy()
    found = NetworkEngine(pair.ours, make_config())(images)
    logits = np.abs(found - expected).max() / np.abs(expected).max()
    loss = functional.cross_entropy(pair.theirs.train()(x), y, label_smoothing=0.1).item()
    ours, _ = pair.loss_and_gradients(images, labels)
    report(capsys, f"{pair.name}: relative differences from PyTorch: logits {logits:.1e}, loss {abs(ours - loss) / loss:.1e}")
    assert logits < 1e-4 and abs(ours - loss) / loss < 1e-5


def test_gradients_are_pytorchs(pair, capsys):
    """Every parameter's gradient, on a batch where no ReLU is decided by rounding.

    An input of a ReLU within rounding of 0 may pass in one program and not in the other, which changes gradients by more
    than the tolerance: on the batches that are passed over, PyTorch's own float32 and float64 gradients differ likewise.
    A wrong gradient is wrong on every batch.
    """
    for tries in range(1, 41):
        images, labels = pair.batch(8)
        pair.theirs.train().zero_grad()
        functional.cross_entropy(pair.theirs(pair.normalised(images)), torch.from_numpy(labels).long(),
                                 label_smoothing=0.1).backward()
        theirs = {name: parameter.grad.numpy() for name, parameter in pair.theirs.named_parameters()}
        _, ours = pair.loss_and_gradients(images, labels)
        largest = max(relative(gradient, theirs[torch_name(name, pair.name)]) for name, gradient in ours.items())
        if largest < 1e-3:
            break
    report(capsys, f"{pair.name}: largest relative difference of a gradient from PyTorch's {largest:.1e} (batch {tries})")
    assert largest < 1e-3


def test_twenty_steps_are_pytorchs(pair, capsys):
    config = make_config(lr=LR, momentum=0.9, weight_decay=1e-3, warmup_epochs=1, max_epoch=4, label_smooth_factor=0.1)
    steps_per_epoch = 5
    step = create_train_step(pair.ours, config, Communicator())
    optimizer = torch.optim.SGD(pair.theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3)
    # The schedule is written again here, from its closed form.
    rates = [LR * (s + 1) / 5 if s < 5 else LR * (1 + math.cos(math.pi * (s - 5) / 15)) / 2 for s in range(20)]
    pair.theirs.train()
    batches = [pair.batch() for _ in range(4)]
    curves = []
    for number, rate in enumerate(rates):
        images, labels = batches[number % 4]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = functional.cross_entropy(pair.theirs(pair.normalised(images)), torch.from_numpy(labels).long(), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        ours = step([(Tensor(images), Tensor(labels))], learning_rate(number, steps_per_epoch, config), number)
        curves.append((ours, loss.item()))
    losses = max(abs(a - b) / b for a, b in curves)
    theirs = pair.theirs.state_dict()
    moving = {p.name: (p.asnumpy(), theirs[torch_name(p.name, pair.name)].numpy()) for p in pair.ours.get_parameters()
              if "moving" in p.name}
    statistics = max((np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in moving.values()), default=0.0)
    report(capsys, f"{pair.name}: after 20 steps relative differences from PyTorch: loss curve {losses:.1e}, "
                   f"running statistics {statistics:.1e}; loss {curves[0][1]:.3f} -> {curves[-1][1]:.3f}")
    assert curves[-1][1] < curves[0][1] and losses < 1e-3 and statistics < 1e-3


def test_initialisation_has_pytorchs_distributions():
    """Dense and plain convolution layers: uniform in +-1/sqrt(fan_in), weights and biases alike (PyTorch's default)."""
    ours = {p.name: p.asnumpy() for p in build_model("alexnet", CLASSES).get_parameters()}
    for name, theirs in torch_alexnet().state_dict().items():
        (own,) = [key for key in ours if torch_name(key, "alexnet") == name]
        assert ours[own].shape == tuple(theirs.shape)
        if ours[own].size >= 1000:
            assert ours[own].std() == pytest.approx(theirs.numpy().std(), rel=0.03), name
            assert np.abs(ours[own]).max() == pytest.approx(np.abs(theirs.numpy()).max(), rel=0.03), name
