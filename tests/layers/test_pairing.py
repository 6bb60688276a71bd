import pytest
from torch import nn

from gnpractical.layers import PracticalGroupNorm, find_pairs
from gnpractical.layers.pairing import require_resolved


class ConvWithNorm(nn.Conv2d):
    """As Detectron2's Conv2d: the norm is a child of the convolution."""

    def __init__(self, *args, norm=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm


class NormBeforeWeight(nn.Module):
    """As Detectron2's DeformConv: no torch convolution, its norm registered before its weight."""

    def __init__(self, in_channels, out_channels, norm):
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, (3, 3)
        self.norm = norm


class Block(nn.Module):
    """Records widths as Detectron2's CNNBlockBase does, but is no weight layer."""

    def __init__(self, in_channels, out_channels, **children):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        for name, child in children.items():
            setattr(self, name, child)


def gn(channels, rule="practical"):
    return PracticalGroupNorm(channels, rule=rule)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: ConvWithNorm(256, 128, 1, norm=n),
        lambda n: NormBeforeWeight(256, 128, n),
        lambda n: nn.Sequential(nn.Conv2d(256, 128, 3), n, nn.ReLU()),
        lambda n: nn.Sequential(nn.Linear(256, 128), nn.Dropout(0.1), n),
        lambda n: nn.Sequential(nn.ConvTranspose2d(256, 128, 2), n),
        lambda n: Block(64, 512, conv=nn.Conv2d(256, 128, 1), norm=n),
        lambda n: Block(7, 128, conv=nn.Conv2d(256, 128, 1), norm=n),
        lambda n: Block(7, 7, a=nn.Conv2d(3, 64, 1), a_bn=gn(64), b=nn.Conv2d(256, 128, 1), bn=n),
        # both layers before both norms: the widths tell which is which
        lambda n: Block(7, 7, a=nn.Conv2d(3, 64, 1), b=nn.Conv2d(256, 128, 1), x=gn(64), y=n),
    ],
)
def test_learns_in_channels_when_registered(build):
    norm = gn(128)
    model = build(norm)
    assert (norm.in_channels, norm.num_groups) == (256, 32)
    assert next(p for p in find_pairs(model) if p.norm is norm).layers


def test_two_norms_of_one_width_each_follow_their_own_layer():
    first, second = gn(64), gn(64)
    Block(7, 7, conv1=nn.Conv2d(256, 64, 1), n1=first, conv2=nn.Conv2d(64, 64, 3), n2=second)
    assert (first.in_channels, second.in_channels) == (256, 64)


def test_grouped_and_depthwise_convolutions_use_full_widths():
    norm = gn(128)
    ConvWithNorm(256, 128, 3, groups=32, norm=norm)
    assert (norm.in_channels, norm.num_groups) == (256, 32)
    depthwise = gn(128)
    ConvWithNorm(128, 128, 3, groups=128, norm=depthwise)
    assert (depthwise.in_channels, depthwise.num_groups) == (128, 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda n: nn.Sequential(n, nn.Conv2d(128, 64, 1)),  # norm before conv
        lambda n: nn.Sequential(nn.Conv2d(256, 128, 1), nn.Conv2d(128, 64, 1), n),  # other width
        # two layers of this width and different inputs: which one feeds it is a guess
        lambda n: Block(7, 7, a=nn.Conv2d(3, 128, 1), b=nn.Conv2d(256, 128, 1), norm=n),
        lambda n: nn.ModuleList([n]),
        # a container's output, of unknown width, reaches the norm
        lambda n: nn.Sequential(nn.Conv2d(256, 128, 1), nn.Sequential(nn.Conv2d(128, 128, 3)), n),
        lambda n: Block(7, 7, a=nn.Linear(256, 128), b=nn.MultiheadAttention(128, 4), norm=n),
        lambda n: nn.Sequential(nn.Conv2d(256, 128, 1), nn.LazyConv2d(128, 1), n),
        # which of the two the first norm follows is unknown, so the second is unknown too
        lambda n: Block(
            7, 7, a=nn.Conv2d(256, 128, 1), b=nn.Conv2d(64, 128, 1), m=nn.BatchNorm2d(128), norm=n
        ),
    ],
)
def test_never_guesses(build):
    norm = gn(128)
    model = build(norm)
    assert norm.num_groups is None
    assert [p.layers for p in find_pairs(model) if p.norm is norm] == [{}]
    with pytest.raises(ValueError, match="1 norms have no number of groups.*128 channels"):
        require_resolved(model)


def test_a_norm_that_replaces_another_is_fed_by_what_comes_before_it():
    model = nn.Sequential(
        nn.Conv2d(256, 128, 1), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3)
    )
    model[1] = gn(128)
    assert (model[1].in_channels, model[1].num_groups) == (256, 32)
    block = Block(
        7,
        7,
        conv1=nn.Conv2d(256, 128, 1),
        bn1=nn.BatchNorm2d(128),
        conv2=nn.Conv2d(128, 128, 3),
        bn2=nn.BatchNorm2d(128),
    )
    for name, child in list(block.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(block, name, gn(child.num_features))
    assert (block.bn1.in_channels, block.bn2.in_channels) == (256, 128)


def test_resolving_an_ambiguous_norm_settles_the_next():
    first = PracticalGroupNorm(128, 256)
    block = Block(7, 7, a=nn.Conv2d(256, 128, 1), b=nn.Conv2d(64, 128, 1), m=first, norm=gn(128))
    assert block.norm.in_channels == 64


def test_resolved_norms_and_other_modules_are_left_alone():
    norm = PracticalGroupNorm(128, 512)
    nn.Sequential(nn.Conv2d(256, 128, 1), norm)
    assert (norm.in_channels, norm.num_groups) == (512, 128)
    stock = nn.GroupNorm(32, 128)
    nn.Sequential(nn.Conv2d(256, 128, 1), stock)
    assert stock.num_groups == 32


def test_pairs_of_any_norm_with_paths():
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        ConvWithNorm(8, 16, 1, norm=nn.GroupNorm(4, 16)),
    )
    assert [(p.norm_name, p.layers) for p in find_pairs(model)] == [
        ("0.1", {"0.0": model[0][0]}),
        ("1.norm", {"1": model[1]}),
    ]
    assert find_pairs(model[1])[0].layers == {"": model[1]}
