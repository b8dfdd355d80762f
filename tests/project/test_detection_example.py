"""examples/detection: its scenes and data, and a whole comparison that is stopped and gone on with."""

import json

import pytest
import torch
from torchvision.utils import save_image

for package in ("torchvision", "torchmetrics", "pycocotools"):
    pytest.importorskip(package)

from examples.detection.__main__ import main  # noqa: E402
from examples.detection.data import read  # noqa: E402
from examples.detection.scenes import LARGEST, MOST_SHAPES, SMALLEST, Scenes  # noqa: E402

TINY = ["--images=4", "--batch-size=2", "--teacher-steps=2", "--steps=2", "--paraphraser-steps=2"]


def test_a_scene_depends_on_its_seed_and_number_and_its_boxes_enclose_its_shapes():
    scenes = Scenes(30, seed=5)
    assert len(scenes) == len(list(scenes)) == 30
    seen = set()
    for image, target in scenes:
        assert all(SMALLEST <= side <= LARGEST for side in image.shape[1:])
        assert 0 <= image.min() <= image.max() <= 1
        boxes = target["boxes"]
        assert 1 <= len(boxes) <= MOST_SHAPES
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
        seen |= set(target["labels"].tolist())
    assert seen == {1, 2, 3}
    (image, target), (again, alike) = scenes[7], Scenes(8, seed=5)[7]
    assert torch.equal(image, again)
    assert torch.equal(target["boxes"], alike["boxes"])
    assert not torch.equal(Scenes(8, seed=6)[7][0][:, :80, :80], image[:, :80, :80])


VOC_BOX = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_voc(folder):
    voc = folder / "VOCdevkit" / "VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / part).mkdir(parents=True)
    save_image(torch.rand(3, 20, 30), voc / "JPEGImages" / "1.jpg")
    boxes = VOC_BOX.format("dog", 3, 4, 13, 14) + VOC_BOX.format("aeroplane", 1, 2, 5, 6)
    (voc / "Annotations" / "1.xml").write_text(f"<annotation>{boxes}</annotation>")
    for part in ("trainval", "test"):
        (voc / "ImageSets" / "Main" / f"{part}.txt").write_text("1\n")
    return [[3, 4, 13, 14], [1, 2, 5, 6]], [12, 1], 21


def write_coco(folder):
    (folder / "annotations").mkdir()
    for part in ("train", "val"):
        (folder / f"{part}2017").mkdir()
        images = [{"id": number, "file_name": f"{number}.png", "height": 20, "width": 30} for number in (1, 2)]
        for number in (1, 2):
            save_image(torch.rand(3, 20, 30), folder / f"{part}2017" / f"{number}.png")
        kinds = [(18, 0, [3, 4, 10, 10]), (5, 1, [0, 0, 9, 9]), (7, 0, [5, 5, 0, 3])]  # a crowd; one without a width
        labels = [
            {"id": place, "image_id": 1, "category_id": label, "iscrowd": crowd, "bbox": box, "area": 1}
            for place, (label, crowd, box) in enumerate(kinds, 1)
        ]
        told = {"images": images, "annotations": labels, "categories": []}
        (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(told))
    return [[3, 4, 13, 14]], [18], 91


@pytest.mark.parametrize(("name", "write"), [("voc", write_voc), ("coco", write_coco)])
def test_torchvisions_data_sets_are_read_as_detectors_take_them(name, write, tmp_path):
    boxes, labels, classes = write(tmp_path)
    data = read(name, tmp_path)
    assert data.classes == classes
    assert len(data.train) == 1
    image, target = data.train[0]
    assert type(image) is type(target["boxes"]) is torch.Tensor
    assert image.dtype == torch.float32
    assert image.shape == (3, 20, 30)
    assert target["labels"].tolist() == labels
    flipped = [[30 - box[2], box[1], 30 - box[0], box[3]] for box in boxes]
    assert target["boxes"].tolist() in (boxes, flipped)
    image, target = data.test[0]
    assert target["boxes"].tolist()[:1] == boxes[:1]
    if name == "coco":
        assert target["iscrowd"].tolist() == [0, 1]  # counts in an evaluation
        assert data.test[1][1]["boxes"].shape == (0, 4)


def test_a_comparison_goes_on_where_it_was_stopped_and_refuses_other_settings(tmp_path, capsys):
    words = [*TINY, "--output", str(tmp_path / "run")]
    main([*words, "--seeds", "1"])
    printed = capsys.readouterr()
    assert [line.split(" | ")[0] for line in printed.out.splitlines()[2:]] == [
        "| teacher",
        "| none",
        "| ft",
        "| ft - none, by seed",
    ]
    kept = json.loads((tmp_path / "run" / "results.json").read_text())
    assert kept["student 0 ft"].keys() - kept["student 0 none"].keys() == {"ft"}
    main([*words, "--seeds", "2"])
    printed = capsys.readouterr()
    assert "±" in printed.out
    assert "student 1 ft" in printed.err
    assert "student 0 ft" not in printed.err
    later = json.loads((tmp_path / "run" / "results.json").read_text())
    assert kept.items() <= later.items()
    for wrong, sentence in (
        ([*words, "--beta", "7"], "has a run with beta 30.0; name another --output."),
        (["--data", "voc"], "--data voc needs --data-dir"),
        (["--teacher", "resnet18"], "take two that agree"),
        (["--steps", "0"], "'0' is no positive whole number"),
        (["--rate", "nan"], "'nan' is no positive number"),
        (["--teacher-checkpoint", str(tmp_path / "nothing.pt")], "nothing.pt is none of small-teacher"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(wrong if "--output" in wrong else [*wrong, "--output", str(tmp_path / "other")])
        assert sentence in capsys.readouterr().err


def test_its_help_answers(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    assert "paraphrase" in capsys.readouterr().out
