import torch
import torch.nn.functional as F

from gnpractical.activation_gain import ACTIVATIONS
from gnpractical.layers.activations import ACTIVATION_FUNCTIONS


def test_every_name_is_reached():
    # identity has no function, gelu_tanh is an argument of gelu
    assert set(ACTIVATION_FUNCTIONS.values()) == set(ACTIVATIONS) - {"identity", "gelu_tanh"}


def test_variants_of_a_function_have_its_name():
    sigmoid = {torch.sigmoid, torch.sigmoid_, torch.special.expit, F.sigmoid}
    sigmoid |= {torch.Tensor.sigmoid, torch.Tensor.sigmoid_}
    assert {f for f, name in ACTIVATION_FUNCTIONS.items() if name == "sigmoid"} == sigmoid
    assert ACTIVATION_FUNCTIONS[F.leaky_relu_] == "leaky_relu"
    assert F.softmax not in ACTIVATION_FUNCTIONS
