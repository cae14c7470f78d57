"""The worked arithmetic of the book's chapter 6, by the layers that the scratch CNN is made of.

Every expected value is worked out by hand; the comments beside them show how.
"""

import pytest
import torch
from torch import nn

from cvdist import models
from cvdist.config import ModelConfig


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    return models.build_model(ModelConfig(name="scratch-cnn"), models.InputSpec(1, 28, 28), 10).eval()


def convolution(layer_class, weights, **options):
    """A convolution of one channel, without bias, that has these weights."""
    weights = torch.tensor(weights)
    layer = layer_class(1, 1, kernel_size=tuple(weights.shape), bias=False, **options)
    layer.weight.data = weights[None, None]
    return layer


def one_channel(values):
    """One sample of one channel."""
    return torch.tensor(values)[None, None]


# ------------------------------------------------------------------------------------------ 1-d convolution

SIGNAL = [1.0, 3.0, -2.0, 0.0, 4.0, 5.0, -1.0]
FILTER = [2.0, 1.0, -3.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            [
                11.0,  # 2*1 + 1*3 - 3*(-2)
                4.0,  # 2*3 + 1*(-2) - 3*0
                -16.0,  # 2*(-2) + 1*0 - 3*4
                -11.0,  # 2*0 + 1*4 - 3*5
                16.0,  # 2*4 + 1*5 - 3*(-1)
            ],
        ),
        # Every second place of the above.
        ({"stride": 2}, [11.0, -16.0, 16.0]),
        # A zero to either side: as many outputs as inputs.
        # First 2*0 + 1*1 - 3*3 = -8, last 2*5 + 1*(-1) - 3*0 = 9.
        ({"padding": 1}, [-8.0, 11.0, 4.0, -16.0, -11.0, 16.0, 9.0]),
        ({"padding": 1, "stride": 2}, [-8.0, 4.0, -11.0, 9.0]),
        # Two zeros to either side: first 2*0 + 1*0 - 3*1 = -3, last 2*(-1) + 1*0 - 3*0 = -2.
        ({"padding": 2}, [-3.0, -8.0, 11.0, 4.0, -16.0, -11.0, 16.0, 9.0, -2.0]),
    ],
    ids=str,
)
def test_1d_convolution_is_a_sliding_dot_product(options, expected):
    layer = convolution(nn.Conv1d, FILTER, **options)
    assert layer(one_channel(SIGNAL)).tolist() == [[expected]]


def test_1d_convolution_adds_its_bias_to_every_output():
    layer = nn.Conv1d(1, 1, kernel_size=3)
    layer.weight.data = torch.tensor([[FILTER]])
    layer.bias.data = torch.tensor([0.5])
    assert layer(one_channel(SIGNAL)).tolist() == [[[11.5, 4.5, -15.5, -10.5, 16.5]]]


# ------------------------------------------------------------------------------------------ 2-d convolution

PICTURE = [
    [1.0, 2.0, 0.0, 1.0, 3.0],
    [0.0, 1.0, 4.0, 2.0, 1.0],
    [2.0, 0.0, 1.0, 3.0, 0.0],
    [1.0, 5.0, 2.0, 0.0, 1.0],
    [3.0, 1.0, 0.0, 2.0, 4.0],
]
EDGES = [
    [1.0, 0.0, -1.0],
    [2.0, 0.0, -2.0],
    [1.0, 0.0, -1.0],
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Weighted column sums (row above + 2 * this row + row below) of the rows 1, 2 and 3:
        #   row 1:  3  4  9  8  5      1 + 2*0 + 2,  2 + 2*1 + 0,  0 + 2*4 + 1,  1 + 2*2 + 3,  3 + 2*1 + 0
        #   row 2:  5  6  8  8  2      0 + 2*2 + 1,  1 + 2*0 + 5,  4 + 2*1 + 2,  2 + 2*3 + 0,  1 + 2*0 + 1
        #   row 3:  7 11  5  5  6      2 + 2*1 + 3,  0 + 2*5 + 1,  1 + 2*2 + 0,  3 + 2*0 + 2,  0 + 2*1 + 4
        # Each output is the column sum on its left less that on its right.
        (
            {},
            [
                [-6.0, -4.0, 4.0],  # 3 - 9,  4 - 8,  9 - 5
                [-3.0, -2.0, 6.0],  # 5 - 8,  6 - 8,  8 - 2
                [2.0, 6.0, -1.0],  # 7 - 5, 11 - 5,  5 - 6
            ],
        ),
        # The corners of the above.
        ({"stride": 2}, [[-6.0, 4.0], [2.0, -1.0]]),
        # With a border of zeros the first and last row have column sums too:
        #   row 0:  2  5  4  4  7      2*1 + 0,  2*2 + 1,  2*0 + 4,  2*1 + 2,  2*3 + 1
        #   row 4:  7  7  2  4  9      1 + 2*3,  5 + 2*1,  2 + 2*0,  0 + 2*2,  1 + 2*4
        # and the first and last column have a 0 beside them.
        (
            {"padding": 1},
            [
                [-5.0, -2.0, 1.0, -3.0, 4.0],  # 0 - 5,  2 - 4,  5 - 4,  4 - 7,  4 - 0
                [-4.0, -6.0, -4.0, 4.0, 8.0],  # 0 - 4,  the above,  8 - 0
                [-6.0, -3.0, -2.0, 6.0, 8.0],  # 0 - 6,  the above,  8 - 0
                [-11.0, 2.0, 6.0, -1.0, 5.0],  # 0 - 11,  the above,  5 - 0
                [-7.0, 5.0, 3.0, -7.0, 4.0],  # 0 - 7,  7 - 2,  7 - 4,  2 - 9,  4 - 0
            ],
        ),
        ({"padding": 1, "stride": 2}, [[-5.0, 1.0, 4.0], [-6.0, -2.0, 8.0], [-7.0, 3.0, 4.0]]),
    ],
    ids=str,
)
def test_2d_convolution_is_a_sliding_dot_product(options, expected):
    layer = convolution(nn.Conv2d, EDGES, **options)
    assert layer(one_channel(PICTURE)).tolist() == [[expected]]


def test_the_filter_is_not_mirrored():
    # A convolution in the mathematician's sense would return the filter itself; that of neural networks, a
    # cross-correlation, turns it by 180 degrees.
    dot = torch.zeros(5, 5)
    dot[2, 2] = 1
    layer = convolution(nn.Conv2d, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    assert layer(dot[None, None]).tolist() == [[[[9.0, 8.0, 7.0], [6.0, 5.0, 4.0], [3.0, 2.0, 1.0]]]]


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


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (1, 1), (2, 2), (3, 1)])
def test_2d_convolution_over_many_channels_is_the_nested_loop(stride, padding):
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, kernel_size=3, stride=stride, padding=padding).double()
    picture = torch.randn(2, 6, 7, dtype=torch.float64)
    expected = sliding_dot_product(
        picture.tolist(), layer.weight.tolist(), layer.bias.tolist(), stride, padding
    )
    torch.testing.assert_close(layer(picture[None])[0], torch.tensor(expected, dtype=torch.float64))


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


def test_average_pooling_takes_the_mean_of_each_2x2():
    expected = [
        [2.0, 4.0],  # (1 - 3 + 6 + 4) / 4,  (2 + 8 + 1 + 5) / 4
        [-4.0, 2.0],  # (-7 - 2 - 1 - 6) / 4,  (0 + 3 + 9 - 4) / 4
    ]
    assert nn.AvgPool2d(2)(one_channel(FOUR_BY_FOUR)).tolist() == [[expected]]


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


# ------------------------------------------------------------------------------------------ linear, softmax


def test_linear_layer_is_a_dot_product_for_each_output():
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])
    layer.bias.data = torch.tensor([10.0, -1.0])
    # 1*4 + 2*1 - 1*2 + 10 = 14;  0.5*4 + 0*1 + 3*2 - 1 = 7
    assert layer(torch.tensor([[4.0, 1.0, 2.0]])).tolist() == [[14.0, 7.0]]


def test_log_softmax_of_known_odds(cnn):
    # Scores ln 1, ln 2, ln 5 stand for odds 1 : 2 : 5, probabilities 1/8, 2/8, 5/8.
    probabilities = cnn.log_softmax(torch.tensor([[1.0, 2.0, 5.0]]).log()).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.125, 0.25, 0.625]]))
