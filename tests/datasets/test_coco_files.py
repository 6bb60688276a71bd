import json

import pytest
from helpers.instances import sound

from gnpractical.datasets.coco_files import check_annotations


def test_nothing_to_train_on(tmp_path):
    path = tmp_path / "a.json"
    for change, message in (
        ({"images": [], "annotations": []}, "it has no images to train on"),
        ({"annotations": [sound()["annotations"][0] | {"iscrowd": 1}]}, "all 1 annotations are cr"),
    ):
        path.write_text(json.dumps(sound() | change))
        with pytest.raises(ValueError, match=f"a.json: {message}"):
            check_annotations("mine", {"json_file": str(path)}, "")
