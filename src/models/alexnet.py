"""AlexNet with one tower.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997):
convolutions of 64-192-384-256-256 channels, then dense layers of 4096, 4096 and num_classes units.
"""

from mindspore import Tensor, nn, ops

from src.models.layers import AdaptiveAveragePool, ImageClassifier, LayerFactory

_FEATURE_SIZE = 6
_HIDDEN = 4096


class AlexNet(ImageClassifier):
    """(N, 3, image_size, image_size) float -> (N, num_classes).

    Feature maps that are not 6x6 are averaged to 6x6.

    Args:
        image_size: side of the input in pixels, at least 63.
        dropout: probability of dropping a unit before each hidden layer, in training only. Without
            a dropout mask the framework's generator draws the units.
    """

    def __init__(
        self, num_classes: int, layers: LayerFactory, dropout: float = 0.5, image_size: int = 224
    ) -> None:
        super().__init__(layers)
        self.conv1 = layers.conv_relu(3, 64, 11, stride=4, padding=2, bias=True)
        self.conv2 = layers.conv_relu(64, 192, 5, padding=2, bias=True)
        self.conv3 = layers.conv_relu(192, 384, 3, padding=1, bias=True)
        self.conv4 = layers.conv_relu(384, 256, 3, padding=1, bias=True)
        self.conv5 = layers.conv_relu(256, 256, 3, padding=1, bias=True)
        self.relu = nn.ReLU()
        self.pool = layers.max_pool(3, 2)
        self.to_nchw = layers.to_nchw()
        size = (image_size + 4 - 11) // 4 + 1
        for _ in range(3):
            size = (size - 3) // 2 + 1
        self.to_6x6 = nn.Identity()
        if size != _FEATURE_SIZE:
            self.to_6x6 = AdaptiveAveragePool(size, _FEATURE_SIZE)
        self.flat = 256 * _FEATURE_SIZE**2
        # p is the probability of dropping, as in PyTorch; the seed's keep_prob of 0.65 is p = 0.35.
        self.drop1, self.drop2 = nn.Dropout(p=dropout), nn.Dropout(p=dropout)
        self.dropout_scale = 1 / (1 - dropout)
        self.drop_probabilities = (dropout,) * (self.flat + _HIDDEN) if dropout else ()
        self.fc1 = layers.dense(self.flat, _HIDDEN)
        self.fc2 = layers.dense(_HIDDEN, _HIDDEN)
        self.classifier = layers.dense(_HIDDEN, num_classes)

    def construct(self, x: Tensor, dropout_mask: Tensor | None = None) -> Tensor:
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        x = self.to_nchw(self.pool(self.conv5(self.conv4(self.conv3(x)))))
        x = ops.reshape(self.to_6x6(x), (-1, self.flat))
        x = self.drop1(x) if dropout_mask is None else self._drop(x, dropout_mask[:, : self.flat])
        x = self.relu(self.fc1(x))
        x = self.drop2(x) if dropout_mask is None else self._drop(x, dropout_mask[:, self.flat :])
        return self.classify(self.relu(self.fc2(x)))

    def _drop(self, x: Tensor, dropout_mask: Tensor) -> Tensor:
        return x * ops.cast(dropout_mask, x.dtype) * self.dropout_scale
