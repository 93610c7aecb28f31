"""Names of the same module in this project, torchvision, timm and the ACNet repository."""

import re

# Batch norm: MindSpore's gamma and beta are PyTorch's weight and bias.
_NORM_LEAVES = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_ALEXNET_TORCHVISION = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc1": "classifier.1",
    "fc2": "classifier.4",
    "classifier": "classifier.6",
}
_WRN_BLOCKS_PER_STAGE, _RESNET56_BLOCKS_PER_STAGE = 2, 9


def split_torch_name(name: str) -> tuple[str, str]:
    """(module, leaf) of parameter ``name``, the leaf as PyTorch calls it."""
    module, _, leaf = name.rpartition(".")
    return module, _NORM_LEAVES.get(leaf, leaf)


def torchvision_alexnet(module: str) -> str:
    first, dot, rest = module.partition(".")
    return f"{_ALEXNET_TORCHVISION[first]}{dot}{rest}"


def torchvision_resnet(module: str) -> str:
    module = re.sub(r"downsample\.conv$", "downsample.0", module)
    module = re.sub(r"downsample\.norm$", "downsample.1", module)
    module = re.sub(r"conv(\d)\.conv$", r"conv\1", module)
    module = re.sub(r"conv(\d)\.norm$", r"bn\1", module)
    return re.sub(r"^classifier$", "fc", module)


def torchvision_mobilenet(module: str) -> str:
    if module == "classifier":
        return "classifier.1"
    _, index, *inner = module.split(".")
    layer, leaf = (inner[1], inner[2:]) if inner[0] == "branch" else ("", inner)
    number = {"conv": "0", "norm": "1"}.get(leaf[0] if leaf else "", ".".join(["0", *leaf]))
    if not layer:
        return f"features.{index}.{number}"
    # Convolution, batch norm and ReLU6 are one part of a block's sequence, but the last convolution
    # and its batch norm are two. The first block has no expansion.
    first = 0 if index == "1" else 1
    if layer == "project":
        return f"features.{index}.conv.{first + 1 + int(number)}"
    return f"features.{index}.conv.{first if layer == 'depthwise' else 0}.{number}"


def torchvision_densenet(module: str) -> str:
    module = re.sub(r"conv0\.conv$", "conv0", module)
    module = re.sub(r"conv0\.norm$", "norm0", module)
    module = re.sub(r"conv1\.conv$", "conv1", module)
    return re.sub(r"conv1\.norm$", "norm2", module)


def torchvision_densenet_file(module: str) -> str:
    return re.sub(r"(denselayer\d+\.[a-z]+)(\d)", r"\1.\2", torchvision_densenet(module))


# The repository's Conv2dBNReLU is a sequence of conv, bn, relu or of acb, relu. Its Conv2dBN is
# conv, bn or the ACB itself. A fused block is fused_conv inside the ACB.


def _with_relu(layer: str, inner: str) -> str:
    return (
        f"{layer}.{inner.replace('norm', 'bn')}"
        if inner in ("conv", "norm")
        else f"{layer}.acb.{inner or 'fused_conv'}"
    )


def _without_relu(layer: str, inner: str) -> str:
    return (
        f"{layer}.{inner.replace('norm', 'bn')}"
        if inner in ("conv", "norm")
        else f"{layer}.{inner or 'fused_conv'}"
    )


def _split(module: str) -> tuple[str, str, str, str]:
    """First three parts of a dotted name, and the rest."""
    first, second, third, *rest = module.split(".")
    return first, second, third, ".".join(rest)


def acnet_quick(module: str) -> str:
    layer, _, inner = module.partition(".")
    if layer.startswith("conv"):
        return _with_relu(layer, inner)
    return {"fc1": "fc1", "classifier": "fc2"}[layer]


def acnet_vgg(module: str) -> str:
    if not module.startswith("features."):
        return {"fc1": "linear1", "classifier": "linear2"}[module]
    _, index, *inner = module.split(".")
    # Our sequence is conv, relu, ..., pool at the end of each stage of 2, 2, 3, 3, 3 convolutions.
    places, position = [], 0
    for depth in (2, 2, 3, 3, 3):
        places += [position + 2 * i for i in range(depth)]
        position += 2 * depth + 1
    return _with_relu(f"stem.conv{places.index(int(index)) + 1}", ".".join(inner))


def acnet_resnet(module: str) -> str:
    if module == "classifier":
        return "linear"
    first, _, inner = module.partition(".")
    if first == "conv1":
        return _with_relu("conv1", inner)
    stage, block, layer, inner = _split(module)
    place = f"stage{stage[-1]}.{block}"
    if layer == "downsample":
        return f"{place}.shortcut.{inner.replace('norm', 'bn')}"
    return (
        _with_relu(f"{place}.{layer}", inner)
        if layer == "conv1"
        else _without_relu(f"{place}.{layer}", inner)
    )


def acnet_resnet56(module: str) -> str:
    if module == "classifier":
        return "linear"
    if module.startswith("conv1"):
        return _without_relu("stage1.conv1", module.partition(".")[2])
    _, index, layer, inner = _split(module)
    stage, block = divmod(int(index), _RESNET56_BLOCKS_PER_STAGE)
    if layer == "downsample":
        return f"stage{stage + 1}.projection.{inner.replace('norm', 'bn')}"
    place = f"stage{stage + 1}.block{block}.{layer}"
    return _with_relu(place, inner) if layer == "conv1" else _without_relu(place, inner)


def acnet_resnet50(module: str) -> str:
    if module == "classifier":
        return "fc"
    first, _, inner = module.partition(".")
    if first == "conv1":
        return _with_relu("conv1", inner)
    stage, block, layer, inner = _split(module)
    if layer == "downsample":
        return f"stage{stage[-1]}.projection.{inner.replace('norm', 'bn')}"
    place = f"stage{stage[-1]}.block{block}.{layer}"
    return _without_relu(place, inner) if layer == "conv3" else _with_relu(place, inner)


def acnet_wrn(module: str) -> str:
    return _acnet_wrn(module, fused_conv="")


def acnet_wrn_fused(module: str) -> str:
    return _acnet_wrn(module, fused_conv="fused_conv")


def _acnet_wrn(module: str, fused_conv: str) -> str:
    """``fused_conv``: the name of the convolution inside a fused block; "" before fusion."""
    if module in ("classifier", "last_norm"):
        return {"classifier": "linear", "last_norm": "last_bn"}[module]
    if module.startswith("conv1"):
        return f"conv1.{module.partition('.')[2] or fused_conv}".rstrip(".")
    _, index, layer, inner = _split(module)
    stage, block = divmod(int(index), _WRN_BLOCKS_PER_STAGE)
    place = f"stage{stage + 1}.block{block + 1}"
    if layer == "shortcut":
        return f"{place}.proj.{'bn' if inner == '0' else 'conv'}"
    if layer.startswith("norm"):
        return f"{place}.conv{layer[-1]}.bn"
    if inner or fused_conv:
        return f"{place}.{layer}.acb.{inner or fused_conv}"
    return f"{place}.{layer}.conv"
