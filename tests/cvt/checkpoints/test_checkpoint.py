from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from cvt.checkpoints import BUNDLED, load_checkpoint, read_labels, save_checkpoint
from cvt.checkpoints.microsoft import microsoft_key
from cvt.errors import CheckpointError
from tests.cvt.hub import serve_hub
from tests.cvt.microsoft_names import as_microsoft
from tests.cvt.random_models import PUBLISHED, randomize

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to be spoiled."""
    return Path(shutil.copytree(BUNDLED["fashion-mnist"], tmp_path / "my-model"))


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(path: Path | str, labels: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path), labels=labels and str(labels))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_bundled_checkpoint_loads_by_name() -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    assert checkpoint.name == "fashion-mnist"
    assert checkpoint.labels[0] == "T-shirt/top"
    assert len(checkpoint.labels) == 10
    assert checkpoint.preprocessor.size == 28
    assert checkpoint.embedding_width == 128
    assert not checkpoint.model.training


def test_the_bundled_weights_are_small() -> None:
    assert (BUNDLED["fashion-mnist"] / WEIGHTS).stat().st_size <= 6 * 1024**2


def test_a_folder_loads_and_gives_its_name(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.name == "my-model"
    assert checkpoint.digest == load_checkpoint("fashion-mnist").digest


def test_the_digest_depends_on_weights_labels_and_preprocessing_but_not_on_the_files(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    change_json(folder / "config.json", transformers_version="0.0.1")
    assert load_checkpoint(str(folder)).digest == before

    change_json(folder / "preprocessor_config.json", crop_pct=0.9)
    other_crop = load_checkpoint(str(folder)).digest
    weights = load_file(folder / WEIGHTS)
    weights["classifier.bias"][0] += 1e-6
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    other_weights = load_checkpoint(str(folder)).digest
    labels = {str(i): f"label {i}" for i in range(10)}
    change_json(folder / "config.json", id2label=labels, label2id={v: int(k) for k, v in labels.items()})
    other_labels = load_checkpoint(str(folder)).digest
    assert len({before, other_crop, other_weights, other_labels}) == 4


def test_pytorch_weights_load_as_safetensors_do(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert load_checkpoint(str(folder)).digest == before


def test_sharded_weights_load_as_whole_ones_do(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    half = len(weights) // 2
    parts = {
        "model-1-of-2.safetensors": list(weights)[:half],
        "model-2-of-2.safetensors": list(weights)[half:],
    }
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, folder / name)
    places = {key: name for name, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    assert load_checkpoint(str(folder)).digest == before
    (folder / "model-2-of-2.safetensors").unlink()
    assert "model-2-of-2.safetensors" in refusal(folder)


def test_weights_under_microsofts_names_load_as_under_transformers_names(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    weights = {microsoft_key(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_checkpoint(str(folder)).digest == before


def test_weights_stay_as_they_were_loaded_when_the_file_changes(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    for name in (WEIGHTS, "pytorch_model.bin"):
        model = load_checkpoint(str(folder)).model
        before = model.classifier.weight.clone()
        with (folder / name).open("r+b") as file:
            file.write(bytes((folder / name).stat().st_size))
        assert torch.equal(model.classifier.weight, before)
        (folder / name).unlink()


def test_weights_without_batch_norms_counters_load_with_the_same_digest(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    weights = load_file(folder / WEIGHTS)
    fewer = {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}
    assert len(fewer) < len(weights)
    save_file(fewer, folder / WEIGHTS)
    assert load_checkpoint(str(folder)).digest == before


def test_a_saved_checkpoint_has_the_digest_that_it_had(tmp_path: Path) -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    save_checkpoint(checkpoint.model, checkpoint.preprocessor, tmp_path / "saved")
    assert load_checkpoint(str(tmp_path / "saved")).digest == checkpoint.digest


def test_half_precision_weights_are_loaded_as_float32(folder: Path) -> None:
    weights = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    change_json(folder / "config.json", dtype="float16")
    assert load_checkpoint(str(folder)).model.dtype == torch.float32


def test_a_missing_folder_is_named() -> None:
    assert "no such folder" in refusal("/nowhere/at/all")
    for name in ("nowhere.pth", "nowhere/tf_model.h5"):  # which a hub id might be called, too
        assert "no such file" in refusal(name)


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_a_file_is_refused(folder: Path) -> None:
    assert "this is a file" in refusal(folder / WEIGHTS)


@pytest.mark.parametrize("renamed", [lambda key: key, lambda key: key.removeprefix("cvt."), microsoft_key])
def test_a_model_without_a_classifier_is_refused(folder: Path, renamed: Callable[[str], str]) -> None:
    weights = load_file(folder / WEIGHTS)
    base = {renamed(key): tensor for key, tensor in weights.items() if key.startswith("cvt.")}
    save_file(base, folder / WEIGHTS)
    assert "no classifier" in refusal(folder)


def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.weight"] = weights["classifier.weight"].to(torch.int8)
    save_file(weights, folder / WEIGHTS)
    assert "no floating-point numbers: classifier.weight" in refusal(folder)


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["layernorm.weight"][3] = float("nan")
    save_file(weights, folder / WEIGHTS)
    assert "not finite: layernorm.weight" in refusal(folder)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", model_type="vit")
    assert "model_type 'vit', not 'cvt'" in refusal(folder)


def test_missing_and_unexpected_weights_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.extra"] = weights.pop("classifier.bias")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    message = refusal(folder)
    assert "missing: classifier.bias" in message
    assert "unexpected: classifier.extra" in message


def test_weights_of_another_shape_are_refused_by_name(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.bias"] = torch.zeros(11)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert "of another shape: classifier.bias" in refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    assert refusal(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in refusal(folder)


def test_a_configuration_that_cannot_be_is_refused_with_its_field(folder: Path) -> None:
    change_json(folder / "config.json", num_heads=[1, 2, 5])
    assert "num_heads" in refusal(folder)


def test_class_ids_that_do_not_start_at_0_are_refused(folder: Path) -> None:
    change_json(folder / "config.json", id2label={str(i + 1): f"label {i}" for i in range(10)})
    assert "id2label" in refusal(folder)


def test_missing_or_foreign_preprocessing_is_refused(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", image_processor_type="ViTImageProcessor")
    assert "ViTImageProcessor" in refusal(folder)
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in refusal(folder)


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels.txt", "list.json", "object.json"])
def test_labels_of_a_file_replace_the_checkpoints_and_change_the_digest(folder: Path, name: str) -> None:
    names = [f"Nummer {i}, größer" for i in range(10)]
    content = {
        "labels.txt": "\n".join(names) + "\n",
        "list.json": json.dumps(names),
        "object.json": json.dumps({str(i): name for i, name in reversed(list(enumerate(names)))}),
    }
    (folder / name).write_text(content[name])
    checkpoint = load_checkpoint(str(folder), labels=str(folder / name))
    assert checkpoint.labels == tuple(names)
    assert checkpoint.model.config.label2id["Nummer 3, größer"] == 3
    change_json(folder / "config.json", id2label=dict(enumerate(names)))
    assert checkpoint.digest == load_checkpoint(str(folder)).digest != load_checkpoint("fashion-mnist").digest


def test_too_few_labels_are_refused_with_both_numbers(folder: Path) -> None:
    labels = folder / "labels.txt"
    labels.write_text("a\nb\n")
    assert f"labels {labels}: 2 names, but the model has 10 classes" in refusal(folder, labels)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("labels.txt", "a\n\nc\n", "the name of class 1 is empty"),
        ("labels.txt", b"\xff\xfe", "'utf-8' codec can't decode"),
        ("labels.json", "a\nb\n", "Expecting value: line 1"),
        ("labels.json", '["a", 1]', "neither a list of names"),
        ("labels.json", '"a"', "neither a list of names"),
        ("labels.json", '{"1": "a", "2": "b"}', "from 0 up"),
        ("labels.txt", None, "No such file"),
    ],
)
def test_labels_that_are_none_are_refused_by_file(
    tmp_path: Path, name: str, content: str | bytes | None, cause: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError) as caught:
        read_labels(file)
    assert f"labels {file}: " in str(caught.value)
    assert cause in str(caught.value)


# Microsoft's files -------------------------------------------------------------------------------

FILE = "CvT-13-224x224-IN-1k.pth"


@pytest.fixture(scope="module")
def theirs() -> transformers.CvtForImageClassification:
    """Transformers' CvT-13 with random weights and 10 classes."""
    with torch.device("meta"):
        model = transformers.CvtForImageClassification(
            transformers.CvtConfig(**PUBLISHED["cvt-13"], num_labels=10)
        )
    return randomize(model.to_empty(device="cpu"))


@pytest.fixture(scope="module")
def weights(theirs: transformers.CvtForImageClassification) -> dict[str, Tensor]:
    """Its weights, under Microsoft's names."""
    return as_microsoft(theirs.state_dict(), PUBLISHED["cvt-13"].get("depth", [1, 2, 10]))


@torch.inference_mode()
def test_a_file_of_microsofts_has_the_outputs_of_transformers_model(
    tmp_path: Path, theirs: transformers.CvtForImageClassification, weights: dict[str, Tensor]
) -> None:
    torch.save(weights, tmp_path / FILE)
    checkpoint = load_checkpoint(str(tmp_path / FILE))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    logits = theirs(pixels).logits
    assert logits.std() > 0.1
    assert_close(checkpoint.model(pixels).logits, logits, rtol=1e-5, atol=1e-5)
    assert checkpoint.name == "CvT-13-224x224-IN-1k"
    assert checkpoint.labels == tuple(f"LABEL_{i}" for i in range(10))
    preprocessor = checkpoint.preprocessor
    assert (preprocessor.size, preprocessor.crop_pct, preprocessor.resample) == (224, 0.875, 3)
    assert preprocessor.mean == (0.485, 0.456, 0.406)


def test_a_file_of_microsofts_and_what_transformers_saves_of_it_have_the_same_digest(
    tmp_path: Path, theirs: transformers.CvtForImageClassification, weights: dict[str, Tensor]
) -> None:
    wrapped = {"module." + key: tensor for key, tensor in weights.items()}
    torch.save({"state_dict": wrapped, "epoch": 300}, tmp_path / FILE)
    checkpoint = load_checkpoint(str(tmp_path / FILE))
    theirs.save_pretrained(tmp_path / "folder")
    processor = {
        "size": 224,
        "crop_pct": 0.875,
        "resample": 3,
        "feature_extractor_type": "ConvNextFeatureExtractor",
    }
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load_checkpoint(str(tmp_path / "folder")).digest == checkpoint.digest
    larger = (tmp_path / FILE).rename(tmp_path / "CvT-13-384x384-IN-1k.pth")
    assert load_checkpoint(str(larger)).preprocessor.size == 384
    assert load_checkpoint(str(larger)).digest != checkpoint.digest


def test_weights_of_microsofts_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    spoiled = weights | {"stage0.pos_embed": torch.zeros(1), "norm.bias": torch.zeros(5)}
    del spoiled["stage1.blocks.1.attn.conv_proj_k.bn.running_var"]
    torch.save(spoiled, tmp_path / FILE)
    message = refusal(tmp_path / FILE)
    missing = "layers.1.attention.attention.convolution_projection_key.convolution_projection.normalization"
    assert f"missing: cvt.encoder.stages.1.{missing}.running_var" in message
    assert "unexpected: stage0.pos_embed" in message
    assert "of another shape: layernorm.bias" in message


def test_a_file_of_another_model_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / FILE)
    assert f"{FILE}: not a CvT of Microsoft's" in refusal(tmp_path / FILE)


# The hub -----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's files, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("path", "revision"),
    [("someone/clothes@v1", None), ("someone/clothes", "v1"), (f"someone/clothes@{COMMIT}", None)],
)
def test_a_hub_id_in_the_cache_loads_with_its_revision(
    hub_cache: Path, path: str, revision: str | None
) -> None:
    repository = hub_cache / "models--someone--clothes"
    shutil.copytree(BUNDLED["fashion-mnist"], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    checkpoint = load_checkpoint(path, revision)
    assert checkpoint.name == "clothes"
    assert checkpoint.digest == load_checkpoint("fashion-mnist").digest
    assert "offline" in refusal("someone/clothes@v2")
    (repository / "snapshots" / COMMIT / WEIGHTS).unlink()  # as a download that broke off leaves it
    message = refusal("someone/clothes@v1")
    assert "not available from the Hugging Face hub" in message
    assert "offline" in message


def test_of_a_hub_id_what_is_used_is_fetched_once(
    folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (folder / name).write_bytes(b"of no use")
    wanted = load_checkpoint("fashion-mnist").digest
    constants = huggingface_hub.constants
    with serve_hub("someone/clothes", "v1", folder) as (url, fetched):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert load_checkpoint("someone/clothes@v1").digest == wanted
        assert fetched == {"config.json", "preprocessor_config.json", WEIGHTS}
        assert "404 Client Error. Revision Not Found" in refusal("someone/clothes@v2")
    assert load_checkpoint("someone/clothes@v1").digest == wanted  # the server is stopped


def test_two_revisions_are_refused(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="two revisions, 'v1' and 'v2'"):
        load_checkpoint("someone/clothes@v1", "v2")


def test_a_hub_id_that_cannot_be_fetched_says_what_was_tried(hub_cache: Path) -> None:
    assert "bundled: fashion-mnist" in refusal("someone/no-such-model")


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bars_stay_as_the_program_has_them(tmp_path: Path, enabled: bool) -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    before = is_progress_bar_enabled()
    try:
        (enable_progress_bar if enabled else disable_progress_bar)()
        save_checkpoint(checkpoint.model, checkpoint.preprocessor, tmp_path)
        assert is_progress_bar_enabled() == enabled
    finally:
        (enable_progress_bar if before else disable_progress_bar)()
