"""COCO's instances of one image, without a problem."""

SQUARE = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]


def sound():
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 100, "height": 50}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {
                "id": 9,
                "image_id": 1,
                "category_id": 3,
                "bbox": [10, 10, 20, 20],
                "segmentation": SQUARE,
            }
        ],
    }
