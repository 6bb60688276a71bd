"""The recipe of a run of a few iterations on torchvision."""

from gnpractical.tv.training import TrainingRecipe


def recipe(iterations, **options):
    defaults = {"batch_size": 2, "lr": 0.005, "warmup": 1, "workers": 0, "checkpoint_period": 2}
    return TrainingRecipe(iterations=iterations, **defaults | options)
