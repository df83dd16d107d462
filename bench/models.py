"""The shapes of the parameters of real models, written down: no weights, no other package needed."""

from __future__ import annotations

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


def resnet50() -> Shapes:
    """Return the 161 shapes of a ResNet-50 (arXiv:1512.03385, as torchvision builds it): 25,557,032 parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for convolution in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [convolution, convolution[:1], convolution[:1]]  # each is followed by a batch normalization
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return (*shapes, (1000, 2048), (1000,))


def gpt2() -> Shapes:
    """Return the 148 shapes of the small GPT-2 (12 layers, width 768, tied embeddings): 124,439,808 parameters."""
    width = 768
    norm = ((width,), (width,))
    shapes: list[tuple[int, ...]] = [(50257, width), (1024, width)]
    for _ in range(12):
        shapes += [*norm, (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [*norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return (*shapes, *norm)
