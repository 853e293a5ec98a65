"""The pages of inputs: each has a short, complete configuration that labels such an input."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import label, load_job_config
from tests.docs.pages import ROOT, Block, blocks_of, name_of
from tests.makers import make_image, make_parquet, make_tar
from tests.runs import IN_PROCESS

INPUTS = sorted((ROOT / "docs/how-to/inputs").glob("*.md"))
IMAGES = [make_image(i) for i in range(4)]
CLASS_LABEL = {"info": {"features": {"label": {"names": ["Bag", "Coat"], "_type": "ClassLabel"}}}}


def configuration(page: Path) -> Block:
    """Returns the first configuration of a page."""
    return blocks_of("yaml", page=name_of(page))[0]


@pytest.mark.parametrize("page", INPUTS, ids=name_of)
def test_page_of_an_input_has_a_complete_configuration_of_six_lines(page: Path, tmp_path: Path) -> None:
    text = configuration(page).text
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 6, text
    (tmp_path / "job.yaml").write_text(text)
    load_job_config(tmp_path / "job.yaml")
    assert "\n## What to check\n" in page.read_text()


def tar(label_in_json: bool = False) -> bytes:
    members = list[tuple[str, bytes]]()
    for i, image in enumerate(IMAGES):
        fields = {"id": i, "url": f"http://host/{i}", "caption": "größe"} | (
            {"label": i} if label_in_json else {}
        )
        members += [(f"{i}.jpg", image), (f"{i}.json", json.dumps(fields).encode())]
        members += [] if label_in_json else [(f"{i}.cls", b"Bag")]
    return make_tar(members)


def files_of(page: str, root: Path) -> dict[str, bytes]:
    """Returns the files of an input as the page describes it, with four images."""
    urls = [f"{root}/images/{i}.jpg" for i in range(4)]
    images = dict(zip((f"images/{i}.jpg" for i in range(4)), IMAGES, strict=True))
    folders = {f"photos/{name}/{i}.jpg": IMAGES[i] for i, name in enumerate(["Bag", "Coat", "Coat", "Dress"])}
    structs = [{"bytes": image, "path": None} for image in IMAGES]
    rows = {"image": IMAGES[:2], "key": ["a", "b"]}
    table = {"image": structs, "label": [0, 1, 1, 0], "id": [1, 2, 3, 4]}
    return {
        "class-folders": folders,
        "pack": folders,
        "webdataset": {"train-0007.tar": tar(), "other.tar": tar()},
        "hugging-face": {
            "my-dataset/data/train-0.parquet": make_parquet(table, {"huggingface": json.dumps(CLASS_LABEL)}),
            "my-dataset/README.md": b"#",
        },
        "uri-table": images | {"urls.parquet": make_parquet({"url": urls, "label": ["Bag"] * 4})},
        "img2dataset": {
            "laion/00000.tar": tar(label_in_json=True),
            "laion/00000.parquet": make_parquet({"url": urls}),
            "laion/00000_stats.json": b"{}",
        },
        "spark": {
            "images_by_label/_SUCCESS": b"",
            "images_by_label/label=3/part-0.parquet": make_parquet(rows),
            "images_by_label/label=T-shirt%2Ftop/part-0.parquet": make_parquet(rows),
        },
        "public-buckets": {
            "train/a/0.jpg": IMAGES[0], "train/a/0-mask.jpg": IMAGES[0], "extra/1.png": IMAGES[1],
            "extra/2.jpg": IMAGES[2], "train/b/c/3.jpg": IMAGES[3], "train/broken/4.jpg": b"",
        },
        "lakehouse": images,
    }[page]  # fmt: skip


@pytest.mark.parametrize("page", [page for page in INPUTS if page.stem != "s3-inventory"], ids=name_of)
def test_configuration_of_a_page_labels_such_an_input(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files_of(page.stem, tmp_path).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    if page.stem == "lakehouse":
        if importlib.util.find_spec("deltalake") is None:
            pytest.skip("deltalake is not installed: cvt-label[delta]")
        from deltalake import write_deltalake

        urls = [f"{tmp_path}/images/{i}.jpg" for i in range(4)]
        write_deltalake(f"{tmp_path}/tables/images", pa.table({"url": urls, "label": ["Bag"] * 4}))
    text = configuration(page).text.replace("s3://my-bucket", str(tmp_path)).replace("microsoft/", "")
    (tmp_path / "job.yaml").write_text(text.replace("s3://open-data", str(tmp_path)))
    result = label(load_job_config("job.yaml", IN_PROCESS))
    assert result.is_complete
    assert (result.totals.images, result.totals.errors, result.totals.unmatched.count) == (4, 0, 0)
    assert result.statistics is not None
    assert result.statistics.has_targets == (page.stem not in ("pack", "public-buckets"))
