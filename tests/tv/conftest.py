import pytest


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory):
    """A folder of data sets with a few gnp_shapes images."""
    from gnpractical.datasets.shapes import make_shapes

    root = tmp_path_factory.mktemp("datasets")
    make_shapes(root, {"train": 8, "val": 4})
    return root


@pytest.fixture
def tiny_panoptic():
    """A function (**arguments) -> a Panoptic FPN for gnp_shapes that runs in a moment."""
    pytest.importorskip("torchvision")
    from gnpractical.tv import panoptic_fpn_resnet, quick

    def build(**arguments):
        return panoptic_fpn_resnet(
            **quick.panoptic_fpn()
            | {"depth": 18, "num_things": 4, "num_stuff": 4, "min_size": 64, "channels": 16}
            | arguments
        )

    return build


@pytest.fixture
def dataset(datasets_dir):
    """The training images of gnp_shapes with their panoptic annotations."""
    from gnpractical.datasets.coco_files import split_files
    from gnpractical.tv.datasets import CocoImages

    files = split_files(str(datasets_dir / "gnp_shapes"), "train")
    return CocoImages(files, panoptic=True, train=True)
