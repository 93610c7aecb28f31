"""One optimizer step: forward and backward, mean of the gradients over ranks, update."""

import time

import mindspore
import mindspore.amp
import numpy as np
from mindspore import ParameterTuple, nn, ops

from src.parallel.compression import COMPRESSIONS
from src.training.convolutions import speed_up_gradients
from src.training.dropout import DropoutMasks
from src.training.optimizer import DeviceMomentum, HostMomentum, parameter_rules, scalar
from src.utils.errors import UserError

_STEPS_TO_DOUBLE = 2000
_LARGEST_LOSS_SCALE = 2.0 ** 24


class InputNormalizer(nn.Cell):
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, (x / 255 - mean) / std.

    In the network's graph because it is cheaper there than image by image in the input pipeline.
    """

    def __init__(self, mean, std):
        super().__init__()
        std = np.asarray(std, np.float32)
        self.scale = mindspore.Tensor((1 / (255 * std)).reshape(1, 3, 1, 1).astype(np.float32))
        self.offset = mindspore.Tensor((-np.asarray(mean, np.float32) / std).reshape(1, 3, 1, 1))

    def construct(self, images):
        images = ops.transpose(ops.cast(images, mindspore.float32), (0, 3, 1, 2))
        return images * self.scale + self.offset


class NetworkWithLoss(nn.Cell):
    """(uint8 images, int32 labels, dropout mask or None) -> mean cross-entropy with label smoothing, a float32 scalar.

    Smoothing e spreads its mass over all classes (Szegedy et al., arXiv:1512.00567, section 7), as PyTorch's does:
    (1 - e) * (-log p[label]) + e * mean over classes of (-log p).
    """

    def __init__(self, network, normalizer, smoothing):
        super().__init__(auto_prefix=False)
        self.network = network
        self.normalizer = normalizer
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def construct(self, images, labels, kept=None):
        images = self.normalizer(images)
        logits = self.network(images) if kept is None else self.network(images, kept)
        return self.loss(ops.cast(logits, mindspore.float32), labels)


class ForwardBackward(nn.Cell):
    """(images, labels, dropout mask or None) -> (loss, gradients of the trainable parameters, in their order)."""

    def __init__(self, network_with_loss, parameters):
        super().__init__(auto_prefix=False)
        # A child, so that set_train reaches the network: value_and_grad hides it from the Cell.
        self.network_with_loss = network_with_loss
        # As a member of a Cell this compiles to one forward and one backward pass; calling the network for the loss
        # beside GradOperation for the gradients runs the forward pass twice.
        self.value_and_grad = mindspore.value_and_grad(network_with_loss, None, ParameterTuple(parameters))

    def construct(self, images, labels, kept=None):
        if kept is None:
            return self.value_and_grad(images, labels)
        return self.value_and_grad(images, labels, kept)


class HostTrainStep:
    """On CPU: forward and backward as one graph, then MPI and the update on the tensors' own memory.

    Every rank ends each step with the same weights, optimizer state and running statistics: gradients and statistics
    are replaced by their means over ranks.

    Attributes:
        velocities: the optimizer's state, Parameters.
        seconds: what the parts of the last step took.
        gone_wrong: name of the first parameter whose gradient was not finite in the last step, or None.
        skipped: whether the last step left the weights as they were; never here.
    """

    skipped = False

    def __init__(self, network_with_loss, parameters, statistics, masks, config, communicator, graph_cache=None):
        self._names, self._masks, self.gone_wrong = [p.name for p in parameters], masks, None
        self._forward_backward = ForwardBackward(network_with_loss, parameters).set_train(True)
        self._config, self._graph_cache = config, graph_cache
        self._optimizer = HostMomentum(parameters, parameter_rules(parameters, config), config.momentum)
        self._statistics, self._communicator = statistics, communicator
        self._compression = COMPRESSIONS[config.gradient_compression]
        self.velocities = self._optimizer.velocities
        self.seconds = {}

    def __call__(self, batches, lr, number):
        """Train on the forward batches of step ``number``, each (images, labels); returns the mean loss on this rank."""
        started = time.perf_counter()
        losses, total = [], None
        for part, (images, labels) in enumerate(batches):
            inputs = (images, labels, *self._masks(number, part))
            if self._graph_cache is not None:
                self._graph_cache.compile(self._forward_backward, inputs, self._config)
                self._graph_cache = None
            loss, tensors = self._forward_backward(*inputs)
            losses.append(float(loss.asnumpy()))
            gradients = [tensor.asnumpy() for tensor in tensors]
            total = gradients if total is None else _add_in_place(gradients, total)
        if len(losses) > 1:
            for gradient in total:
                gradient *= np.float32(1 / len(losses))
        computed = time.perf_counter()
        statistics = [parameter.asnumpy() for parameter in self._statistics]
        if self._compression is None:
            self._communicator.mean_(total + statistics)
        else:
            self._communicator.mean_(total, self._compression)
            self._communicator.mean_(statistics)
        reduced = time.perf_counter()
        wrong = self._optimizer(lr, total)
        self.gone_wrong = self._names[wrong] if wrong is not None else None
        self.seconds = {"forward_backward": computed - started, "allreduce": reduced - computed,
                        "optimizer": time.perf_counter() - reduced}
        return sum(losses) / len(losses)

    def state(self):
        """What else a resumed run needs besides parameters and velocities."""
        return {}

    def restore(self, state):
        """Take back what ``state`` gave."""


class DeviceTrainStep:
    """On GPU and Ascend: forward, backward, mean over ranks (NCCL, HCCL) and update as one graph, with loss scaling.

    The loss is multiplied by the loss scale before the backward pass and the gradients are divided by it after; a step
    whose gradients are not all finite on every rank leaves weights and optimizer state as they were (Micikevicius et al.,
    arXiv:1710.03740, section 3.2). A dynamic scale is halved then, and doubled after 2,000 good steps.

    Attributes:
        loss_scale: the scale of the next step; 1 with amp_level O0.
        skipped: whether the gradients of the last step overflowed and it left weights and velocities as they were.
        gone_wrong: where they overflowed without loss scaling, what to call them; else None.
    """

    def __init__(self, network_with_loss, parameters, statistics, masks, config, communicator):
        if config.accumulation_steps > 1:
            raise UserError("accumulation_steps above 1 works on CPU only for now; raise per_batch_size instead")
        optimizer = DeviceMomentum(parameters, parameter_rules(parameters, config), config.momentum)
        self._graph = _DeviceStepGraph(network_with_loss, optimizer, communicator.size).set_train(True)
        self._communicator, self._statistics, self._masks = communicator, statistics, masks
        self.velocities = optimizer.velocities
        self._scales = config.amp_level != "O0"
        self.loss_scale = config.loss_scale if self._scales else 1.0
        self._dynamic = config.is_dynamic_loss_scale and self._scales
        self.skipped, self.gone_wrong, self._good_steps = False, None, 0

    def __call__(self, batches, lr, number):
        """Train on the one forward batch of step ``number``; returns its loss on this rank."""
        ((images, labels),) = batches
        loss, finite = self._graph(scalar(lr), scalar(self.loss_scale), images, labels, *self._masks(number, 0))
        self._adjust(bool(finite.asnumpy()))
        return float(loss.asnumpy())

    def state(self):
        """What else a resumed run needs besides parameters and velocities."""
        return {"loss_scale": self.loss_scale, "good_steps": self._good_steps}

    def restore(self, state):
        """Take back what ``state`` gave."""
        if state:
            self.loss_scale, self._good_steps = state["loss_scale"], state["good_steps"]

    def _adjust(self, finite):
        self.skipped = not finite and self._scales
        self.gone_wrong = None if finite or self._scales else "some parameter"
        self._good_steps = self._good_steps + 1 if finite else 0
        if self._dynamic and not finite:
            self.loss_scale = max(self.loss_scale / 2, 1.0)
        elif self._dynamic and self._good_steps == _STEPS_TO_DOUBLE:
            self.loss_scale, self._good_steps = min(self.loss_scale * 2, _LARGEST_LOSS_SCALE), 0


class _ScaledLoss(nn.Cell):
    def __init__(self, network_with_loss):
        super().__init__(auto_prefix=False)
        self.network_with_loss = network_with_loss

    def construct(self, loss_scale, images, labels, kept=None):
        return self.network_with_loss(images, labels, kept) * loss_scale


class _DeviceStepGraph(nn.Cell):
    """(lr, loss scale, images, labels, dropout mask or None) -> (loss, whether all gradients were finite)."""

    def __init__(self, network_with_loss, optimizer, size):
        super().__init__(auto_prefix=False)
        self.scaled_loss, self.optimizer = _ScaledLoss(network_with_loss), optimizer
        self.value_and_grad = mindspore.value_and_grad(self.scaled_loss, None, optimizer.parameters)
        self.reduce = nn.DistributedGradReducer(optimizer.parameters, mean=True, degree=size) if size > 1 else nn.Identity()

    def construct(self, lr, loss_scale, images, labels, kept=None):
        if kept is None:
            loss, gradients = self.value_and_grad(loss_scale, images, labels)
        else:
            loss, gradients = self.value_and_grad(loss_scale, images, labels, kept)
        # An overflow on one rank is in the mean, so every rank skips the same steps.
        gradients = self.reduce(gradients)
        unscaled, finite = (), mindspore.Tensor(True)
        for gradient in gradients:
            finite = ops.logical_and(finite, ops.isfinite(gradient).all())
            unscaled += (ops.cast(gradient, mindspore.float32) / loss_scale,)
        if finite:
            loss = ops.depend(loss, self.optimizer(lr, unscaled))
        return loss / loss_scale, finite


def create_train_step(network, config, communicator, graph_cache=None):
    """The train step for ``config.device_target``: called with (forward batches, learning rate, number of the step from 0).

    Args:
        graph_cache: a GraphCache to take the compiled graph from; None compiles anew. On CPU only.
    """
    masks = dropout_masks(network, config, communicator)
    if config.device_target == "CPU":
        speed_up_gradients(network)
    if config.amp_level != "O0":
        network = mindspore.amp.auto_mixed_precision(network, config.amp_level)
    network_with_loss = NetworkWithLoss(network, InputNormalizer(config.mean, config.std), config.smoothing)
    parts = (network_with_loss, network.trainable_params(), running_statistics(network), masks, config, communicator)
    return HostTrainStep(*parts, graph_cache) if config.device_target == "CPU" else DeviceTrainStep(*parts)


def dropout_masks(network, config, communicator):
    """A function of (step, forward batch of the step): the further inputs of the network, a mask where it has dropout."""
    width = getattr(network, "dropout_width", 0)
    if not width:
        return lambda step, part: ()
    masks = DropoutMasks(width, config, communicator.rank, communicator.size)
    return lambda step, part: (masks(step, part),)


def _add_in_place(arrays, others):
    for array, other in zip(arrays, others):
        array += other
    return arrays


def running_statistics(network):
    """The running means and variances of a network's batch norms."""
    return [p for p in network.get_parameters() if p.name.endswith(("moving_mean", "moving_variance"))]
