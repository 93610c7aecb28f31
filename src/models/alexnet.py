"""AlexNet in the single-tower form of Krizhevsky, "One weird trick for parallelizing convolutional neural networks"
(arXiv:1404.5997): convolutions of 64-192-384-256-256 channels, then 4096-4096-classes."""

from mindspore import Tensor, nn, ops

from src.models.layers import AdaptiveAveragePool, LayerFactory

_FEATURE_SIZE = 6
_HIDDEN = 4096


class AlexNet(nn.Cell):
    """(N, 3, image_size, image_size) float -> (N, num_classes), from 63 pixels on. Feature maps of other sizes are averaged to 6x6.

    Args:
        image_size: side of the input in pixels.
        dropout: probability of dropping a unit before each of the two hidden layers, in training only.

    Attributes:
        dropout_width: number of units per sample that may be dropped. Calls may pass ``kept``, (N, dropout_width) uint8, 1 for
            the units that stay; without it the framework's generator draws them.
    """

    def __init__(self, num_classes: int, layers: LayerFactory, dropout: float = 0.5, image_size: int = 224) -> None:
        super().__init__()

        def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0) -> nn.Cell:
            return layers.conv(in_channels, out_channels, kernel_size, stride, padding, bias=True, relu=True)

        self.conv1 = conv(3, 64, 11, stride=4, padding=2)
        self.conv2 = conv(64, 192, 5, padding=2)
        self.conv3 = conv(192, 384, 3, padding=1)
        self.conv4 = conv(384, 256, 3, padding=1)
        self.conv5 = conv(256, 256, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = layers.max_pool(3, 2)
        self.plain = layers.plain()
        size = (image_size + 4 - 11) // 4 + 1
        for _ in range(3):
            size = (size - 3) // 2 + 1
        self.to_6x6 = nn.Identity() if size == _FEATURE_SIZE else AdaptiveAveragePool(size, _FEATURE_SIZE)
        self.flat = 256 * _FEATURE_SIZE ** 2
        # p is the probability of dropping, as in PyTorch; the seed's keep_prob of 0.65 is p = 0.35.
        self.drop1, self.drop2 = nn.Dropout(p=dropout), nn.Dropout(p=dropout)
        self.dropout_scale = 1 / (1 - dropout)
        self.dropout_width = self.flat + _HIDDEN if dropout else 0
        self.fc1 = layers.dense(self.flat, _HIDDEN)
        self.fc2 = layers.dense(_HIDDEN, _HIDDEN)
        self.classifier = layers.dense(_HIDDEN, num_classes)

    def construct(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        x = self.pool(self.conv2(self.pool(self.conv1(x))))
        x = self.plain(self.pool(self.conv5(self.conv4(self.conv3(x)))))
        x = ops.reshape(self.to_6x6(x), (-1, self.flat))
        x = self.drop1(x) if kept is None else self._drop(x, kept[:, :self.flat])
        x = self.relu(self.fc1(x))
        x = self.drop2(x) if kept is None else self._drop(x, kept[:, self.flat:])
        return self.classifier(self.relu(self.fc2(x)))

    def _drop(self, x: Tensor, kept: Tensor) -> Tensor:
        return x * ops.cast(kept, x.dtype) * self.dropout_scale
