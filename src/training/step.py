"""One optimizer step: forward and backward, mean of the gradients over ranks, update."""

import time

import mindspore
import numpy as np
from mindspore import ParameterTuple, nn, ops

from src.training.optimizer import DeviceMomentum, HostMomentum, parameter_rules, scalar
from src.utils.errors import UserError


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
    """(uint8 images, int32 labels) -> mean cross-entropy with label smoothing, a float32 scalar.

    Smoothing e spreads its mass over all classes (Szegedy et al., arXiv:1512.00567, section 7), as PyTorch's does:
    (1 - e) * (-log p[label]) + e * mean over classes of (-log p).
    """

    def __init__(self, network, normalizer, smoothing):
        super().__init__(auto_prefix=False)
        self.network = network
        self.normalizer = normalizer
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def construct(self, images, labels):
        return self.loss(self.network(self.normalizer(images)), labels)


class ForwardBackward(nn.Cell):
    """(images, labels) -> (loss, gradients of the trainable parameters, in their order)."""

    def __init__(self, network_with_loss, parameters):
        super().__init__(auto_prefix=False)
        # A child, so that set_train reaches the network: value_and_grad hides it from the Cell.
        self.network_with_loss = network_with_loss
        # As a member of a Cell this compiles to one forward and one backward pass; calling the network for the loss
        # beside GradOperation for the gradients runs the forward pass twice.
        self.value_and_grad = mindspore.value_and_grad(network_with_loss, None, ParameterTuple(parameters))

    def construct(self, images, labels):
        return self.value_and_grad(images, labels)


class HostTrainStep:
    """On CPU: forward and backward as one graph, then MPI and the update on the tensors' own memory.

    Every rank ends each step with the same weights, optimizer state and running statistics: gradients and statistics
    are replaced by their means over ranks.

    Attributes:
        velocities: the optimizer's state, Parameters.
        seconds: what the parts of the last step took.
    """

    def __init__(self, network_with_loss, parameters, statistics, config, communicator):
        self._forward_backward = ForwardBackward(network_with_loss, parameters).set_train(True)
        self._optimizer = HostMomentum(parameters, parameter_rules(parameters, config), config.momentum)
        self._statistics, self._communicator = statistics, communicator
        self.velocities = self._optimizer.velocities
        self.seconds = {}

    def __call__(self, batches, lr):
        """Train on the forward batches of one step, each (images, labels); returns the mean loss on this rank."""
        started = time.perf_counter()
        losses, total = [], None
        for images, labels in batches:
            loss, tensors = self._forward_backward(images, labels)
            losses.append(float(loss.asnumpy()))
            gradients = [tensor.asnumpy() for tensor in tensors]
            total = gradients if total is None else _add_in_place(gradients, total)
        if len(losses) > 1:
            for gradient in total:
                gradient *= np.float32(1 / len(losses))
        computed = time.perf_counter()
        self._communicator.mean_(total + [parameter.asnumpy() for parameter in self._statistics])
        reduced = time.perf_counter()
        self._optimizer(lr, total)
        self.seconds = {"forward_backward": computed - started, "allreduce": reduced - computed,
                        "optimizer": time.perf_counter() - reduced}
        return sum(losses) / len(losses)


class DeviceTrainStep:
    """On GPU and Ascend: forward, backward, mean over ranks (NCCL, HCCL) and update as one graph."""

    def __init__(self, network_with_loss, parameters, statistics, config, communicator):
        if config.accumulation_steps > 1:
            raise UserError("accumulation_steps above 1 works on CPU only for now; raise per_batch_size instead")
        optimizer = DeviceMomentum(parameters, parameter_rules(parameters, config), config.momentum)
        self._graph = _DeviceStepGraph(ForwardBackward(network_with_loss, parameters), optimizer,
                                       communicator.size).set_train(True)
        self.velocities = optimizer.velocities

    def __call__(self, batches, lr):
        ((images, labels),) = batches
        return float(self._graph(images, labels, scalar(lr)).asnumpy())


class _DeviceStepGraph(nn.Cell):
    def __init__(self, forward_backward, optimizer, size):
        super().__init__(auto_prefix=False)
        self.forward_backward, self.optimizer = forward_backward, optimizer
        self.reduce = nn.DistributedGradReducer(optimizer.parameters, mean=True, degree=size) if size > 1 else nn.Identity()

    def construct(self, images, labels, lr):
        loss, gradients = self.forward_backward(images, labels)
        return ops.depend(loss, self.optimizer(lr, self.reduce(gradients)))


def create_train_step(network, config, communicator):
    """The train step for ``config.device_target``."""
    network_with_loss = NetworkWithLoss(network, InputNormalizer(config.mean, config.std), config.smoothing)
    kind = HostTrainStep if config.device_target == "CPU" else DeviceTrainStep
    return kind(network_with_loss, network.trainable_params(), running_statistics(network), config, communicator)


def _add_in_place(arrays, others):
    for array, other in zip(arrays, others):
        array += other
    return arrays


def running_statistics(network):
    """The running means and variances of a network's batch norms."""
    return [p for p in network.get_parameters() if p.name.endswith(("moving_mean", "moving_variance"))]
