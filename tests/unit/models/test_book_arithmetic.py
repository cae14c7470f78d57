"""The worked arithmetic of the book's chapter 6, by the layers that the scratch CNN is made of.

Every expected value is worked out by hand; the comments beside them show how.
"""

import pytest
import torch

from cvdist import models
from cvdist.config import ModelConfig


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return models.build_model(ModelConfig(name="scratch-cnn"), models.InputSpec(1, 28, 28), 10).eval()


def one_channel(values):
    """One sample of one channel."""
    return torch.tensor(values)[None, None]


# ------------------------------------------------------------------------------------------ 2-d convolution

PICTURE = [
    [1.0, 2.0, 0.0, 1.0, 3.0],
    [0.0, 1.0, 4.0, 2.0, 1.0],
    [2.0, 0.0, 1.0, 3.0, 0.0],
    [1.0, 5.0, 2.0, 0.0, 1.0],
    [3.0, 1.0, 0.0, 2.0, 4.0],
]


def sliding_dot_product(picture, weight, bias, stride, padding):
    """(C, H, W), (F, C, k, k) and (F,) to (F, h, w), one multiplication at a time."""
    channels, height, width = len(picture), len(picture[0]), len(picture[0][0])
    k = len(weight[0][0])

    def pixel(c, y, x):
        return picture[c][y][x] if 0 <= y < height and 0 <= x < width else 0.0

    def output(f, top, left):
        total = bias[f]
        for c in range(channels):
            for dy in range(k):
                for dx in range(k):
                    total += weight[f][c][dy][dx] * pixel(c, top + dy, left + dx)
        return total

    tops = range(-padding, height + padding - k + 1, stride)
    lefts = range(-padding, width + padding - k + 1, stride)
    return [[[output(f, top, left) for left in lefts] for top in tops] for f in range(len(weight))]


def test_the_networks_own_convolutions_are_the_nested_loop(cnn):
    torch.manual_seed(0)
    for layer, channels in ((cnn.conv1, 1), (cnn.conv2, 10)):
        picture = torch.randn(channels, 7, 6)
        expected = sliding_dot_product(
            picture.tolist(), layer.weight.tolist(), layer.bias.tolist(), stride=1, padding=0
        )
        # Kernel 5: of 7x6 pixels 3x2 are left.
        assert torch.tensor(expected).shape == (layer.out_channels, 3, 2)
        torch.testing.assert_close(layer(picture[None])[0], torch.tensor(expected))


# ---------------------------------------------------------------------------------- pooling, ReLU, flattening

FOUR_BY_FOUR = [
    [1.0, -3.0, 2.0, 8.0],
    [6.0, 4.0, 1.0, 5.0],
    [-7.0, -2.0, 0.0, 3.0],
    [-1.0, -6.0, 9.0, -4.0],
]


def test_max_pooling_keeps_the_largest_of_each_2x2(cnn):
    expected = [
        [6.0, 8.0],  # of 1 -3 6 4,  of 2 8 1 5
        [-1.0, 9.0],  # of -7 -2 -1 -6,  of 0 3 9 -4
    ]
    assert cnn.conv1_pool(one_channel(FOUR_BY_FOUR)).tolist() == [[expected]]
    assert cnn.conv2_pool(one_channel(FOUR_BY_FOUR)).tolist() == [[expected]]


def test_max_pooling_leaves_out_an_odd_last_row_and_column(cnn):
    # Of the 5x5 picture only the first four rows and columns are seen.
    expected = [
        [2.0, 4.0],  # of 1 2 0 1,  of 0 1 4 2
        [5.0, 3.0],  # of 2 0 1 5,  of 1 3 2 0
    ]
    assert cnn.conv1_pool(one_channel(PICTURE)).tolist() == [[expected]]


def test_relu_replaces_negative_values_with_zero(cnn):
    expected = [
        [1.0, 0.0, 2.0, 8.0],
        [6.0, 4.0, 1.0, 5.0],
        [0.0, 0.0, 0.0, 3.0],
        [0.0, 0.0, 9.0, 0.0],
    ]
    for relu in (cnn.conv1_relu, cnn.conv2_relu, cnn.fc1_relu):
        values = one_channel(FOUR_BY_FOUR)
        assert relu(values).tolist() == [[expected]]
        # Not in place: figures compare what comes in with what goes out.
        assert values.tolist() == [[FOUR_BY_FOUR]]


def test_relu_and_max_pooling_commute(cnn):
    # Why the network may pool first, which leaves the ReLU a quarter of the values.
    expected = [[6.0, 8.0], [0.0, 9.0]]
    values = one_channel(FOUR_BY_FOUR)
    assert cnn.conv1_relu(cnn.conv1_pool(values)).tolist() == [[expected]]
    assert cnn.conv1_pool(cnn.conv1_relu(values)).tolist() == [[expected]]


def test_flattening_makes_one_row_of_each_picture(cnn):
    pictures = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]])
    assert pictures.shape == (2, 1, 2, 2)
    assert cnn.flatten(pictures).tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_flattening_goes_channel_by_channel_whatever_the_memory_layout(cnn, memory_format):
    # One picture of two channels: a view of the memory would give 1 5 2 6 3 7 4 8 in channels_last.
    picture = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]])
    assert cnn.flatten(picture.to(memory_format=memory_format)).tolist() == [
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    ]


def test_log_softmax_of_known_odds(cnn):
    # Scores ln 1, ln 2, ln 5 stand for odds 1 : 2 : 5, probabilities 1/8, 2/8, 5/8.
    probabilities = cnn.log_softmax(torch.tensor([[1.0, 2.0, 5.0]]).log()).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.125, 0.25, 0.625]]))
