"""Tests of loading and saving checkpoints in all layouts, and of their errors."""

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
    """A copy of the bundled checkpoint, for tests that change its files."""
    return Path(shutil.copytree(BUNDLED["fashion-mnist"], tmp_path / "my-model"))


def change_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load_error(path: Path | str, labels: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(str(path), labels=labels and str(labels))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_bundled_checkpoint_loads_by_name() -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    assert checkpoint.name == "fashion-mnist"
    assert checkpoint.labels[0] == "T-shirt/top"
    assert len(checkpoint.labels) == 10
    assert checkpoint.preprocessor.size == 28
    assert checkpoint.embedding_width == 128
    assert not checkpoint.model.training


def test_bundled_weights_are_small() -> None:
    assert (BUNDLED["fashion-mnist"] / WEIGHTS).stat().st_size <= 6 * 1024**2


def test_folder_loads_and_sets_the_name(folder: Path) -> None:
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.name == "my-model"
    assert checkpoint.digest == load_checkpoint("fashion-mnist").digest


def test_digest_depends_on_weights_labels_and_preprocessing(folder: Path) -> None:
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


@pytest.mark.parametrize(
    "fields", [{"problem_type": "multi_label_classification"}, {"hidden_act": "quick_gelu"}]
)
def test_digest_depends_on_what_the_logits_mean(folder: Path, fields: dict[str, str]) -> None:
    before = load_checkpoint(str(folder)).digest
    change_json(folder / "config.json", problem_type="single_label_classification", hidden_act="gelu")
    assert load_checkpoint(str(folder)).digest == before
    change_json(folder / "config.json", **fields)
    changed = load_checkpoint(str(folder))
    assert changed.digest != before
    save_checkpoint(changed.to_transformers(), changed.preprocessor, folder.with_name("saved"))
    assert load_checkpoint(str(folder.with_name("saved"))).digest == changed.digest


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification'"),
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
        ({"id2label": {"0": "shirt"}}, "it has one class"),
    ],
)
def test_only_a_model_that_chooses_a_class_is_a_single_label_model(
    folder: Path, fields: dict[str, object], problem: str
) -> None:
    load_checkpoint(str(folder)).check_single_label()
    change_json(folder / "config.json", **fields)
    if "id2label" in fields:
        weights = load_file(folder / WEIGHTS)
        save_file(
            weights | {key: weights[key][:1] for key in weights if "classifier" in key}, folder / WEIGHTS
        )
    with pytest.raises(CheckpointError, match=f"model 'my-model': {problem}. Labeling needs a model that"):
        load_checkpoint(str(folder)).check_single_label()


def test_unknown_problem_type_fails(folder: Path) -> None:
    change_json(folder / "config.json", problem_type="ranking")
    assert "problem_type is 'ranking', not one of" in load_error(folder)


def test_image_that_is_too_small_for_the_architecture_fails(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", size=2)
    change_json(folder / "config.json", patch_padding=[0, 0, 0])
    assert "size in preprocessor_config.json (2) does not fit the architecture" in load_error(folder)


def test_label_that_is_no_text_fails(folder: Path) -> None:
    change_json(folder / "config.json", id2label={"0": "\ud800"})
    assert "config.json: id2label: 'utf-8' codec can't encode character '\\ud800'" in load_error(folder)


def test_pytorch_weights_have_the_digest_of_safetensors(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert load_checkpoint(str(folder)).digest == before


def test_sharded_weights_have_the_digest_of_a_single_file(folder: Path) -> None:
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
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert load_checkpoint(str(folder)).digest == before
    (folder / "model-2-of-2.safetensors").unlink()
    assert "model-2-of-2.safetensors" in load_error(folder)


def test_weights_with_microsoft_names_have_the_same_digest(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    weights = {microsoft_key(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_checkpoint(str(folder)).digest == before


def test_loaded_weights_do_not_change_with_the_file(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    for name in (WEIGHTS, "pytorch_model.bin"):
        model = load_checkpoint(str(folder)).model
        before = model.classifier.weight.clone()
        with (folder / name).open("r+b") as file:
            file.write(bytes((folder / name).stat().st_size))
        assert torch.equal(model.classifier.weight, before)
        (folder / name).unlink()


def test_weights_without_batch_norm_counters_have_the_same_digest(folder: Path) -> None:
    before = load_checkpoint(str(folder)).digest
    weights = load_file(folder / WEIGHTS)
    fewer = {key: tensor for key, tensor in weights.items() if not key.endswith("num_batches_tracked")}
    assert len(fewer) < len(weights)
    save_file(fewer, folder / WEIGHTS)
    assert load_checkpoint(str(folder)).digest == before


def test_saved_checkpoint_keeps_its_digest(tmp_path: Path) -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    save_checkpoint(checkpoint.to_transformers(), checkpoint.preprocessor, tmp_path / "saved")
    assert load_checkpoint(str(tmp_path / "saved")).digest == checkpoint.digest


def test_half_precision_weights_load_as_float32(folder: Path) -> None:
    weights = {name: value.half() for name, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    change_json(folder / "config.json", dtype="float16")
    assert load_checkpoint(str(folder)).model.layernorm.weight.dtype == torch.float32


def test_missing_folder_or_file_is_named() -> None:
    assert "no such folder" in load_error("/nowhere/at/all")
    for name in ("nowhere.pth", "nowhere/tf_model.h5"):  # also valid hub ids
        assert "no such file" in load_error(name)


def test_folder_without_configuration_fails(tmp_path: Path) -> None:
    assert "no config.json" in load_error(tmp_path)


def test_file_with_unknown_suffix_fails(folder: Path) -> None:
    assert "not a folder, a .pth file, a .pt file or an .h5 file" in load_error(folder / WEIGHTS)


@pytest.mark.parametrize("rename", [lambda key: key, lambda key: key.removeprefix("cvt."), microsoft_key])
def test_weights_without_classifier_fail(folder: Path, rename: Callable[[str], str]) -> None:
    weights = load_file(folder / WEIGHTS)
    base = {rename(key): tensor for key, tensor in weights.items() if key.startswith("cvt.")}
    save_file(base, folder / WEIGHTS)
    assert "no classifier" in load_error(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_an_unsupported_type_are_named(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.weight"] = weights["classifier.weight"].to(dtype)
    save_file(weights, folder / WEIGHTS)
    assert "not float16, bfloat16, float32 or float64: classifier.weight" in load_error(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["layernorm.weight"] = weights["layernorm.weight"].double()
    weights["layernorm.weight"][3] = value
    save_file(weights, folder / WEIGHTS)
    assert "not finite: layernorm.weight" in load_error(folder)


def test_other_model_type_fails(folder: Path) -> None:
    change_json(folder / "config.json", model_type="vit")
    assert "model_type is 'vit', not 'cvt'" in load_error(folder)


def test_missing_and_unexpected_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.extra"] = weights.pop("classifier.bias")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    message = load_error(folder)
    assert "missing: classifier.bias" in message
    assert "unexpected: classifier.extra" in message


def test_weights_with_wrong_shape_are_named(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.bias"] = torch.zeros(11)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    assert "wrong shape: classifier.bias" in load_error(folder)


def test_truncated_weights_fail(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    assert load_error(folder)


def test_folder_without_weights_fails(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert WEIGHTS in load_error(folder)


def test_invalid_configuration_field_is_named(folder: Path) -> None:
    change_json(folder / "config.json", num_heads=[1, 2, 5])
    assert "num_heads" in load_error(folder)


def test_class_ids_that_do_not_start_at_0_fail(folder: Path) -> None:
    change_json(folder / "config.json", id2label={str(i + 1): f"label {i}" for i in range(10)})
    assert "id2label" in load_error(folder)


def test_missing_or_unknown_preprocessing_fails(folder: Path) -> None:
    change_json(folder / "preprocessor_config.json", image_processor_type="ViTImageProcessor")
    assert "ViTImageProcessor" in load_error(folder)
    (folder / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in load_error(folder)


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels.txt", "list.json", "object.json"])
def test_labels_file_replaces_labels_and_changes_the_digest(folder: Path, name: str) -> None:
    names = [f"Nummer {i}, größer" for i in range(10)]
    content = {
        "labels.txt": "\n".join(names) + "\n",
        "list.json": json.dumps(names),
        "object.json": json.dumps({str(i): name for i, name in reversed(list(enumerate(names)))}),
    }
    (folder / name).write_text(content[name])
    checkpoint = load_checkpoint(str(folder), labels=str(folder / name))
    assert checkpoint.labels == tuple(names)
    assert checkpoint.to_transformers().config.label2id["Nummer 3, größer"] == 3
    change_json(folder / "config.json", id2label=dict(enumerate(names)))
    assert checkpoint.digest == load_checkpoint(str(folder)).digest != load_checkpoint("fashion-mnist").digest


def test_wrong_number_of_labels_fails_with_both_numbers(folder: Path) -> None:
    labels = folder / "labels.txt"
    labels.write_text("a\nb\n")
    assert f"labels {labels}: number of names: 2, number of classes of the model: 10" in load_error(
        folder, labels
    )


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("labels.txt", "a\n\nc\n", "the name of class 1 is empty"),
        ("labels.txt", b"\xff\xfe", "'utf-8' codec can't decode"),
        ("labels.json", "a\nb\n", "Expecting value: line 1"),
        ("labels.json", '["a", 1]', "expected a list of names, or"),
        ("labels.json", '"a"', "expected a list of names, or"),
        ("labels.json", '{"1": "a", "2": "b"}', "class id (0, 1, ...)"),
        ("labels.txt", None, "No such file"),
    ],
)
def test_invalid_labels_file_is_named(
    tmp_path: Path, name: str, content: str | bytes | None, cause: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError) as caught:
        read_labels(file)
    assert f"labels {file}: " in str(caught.value)
    assert cause in str(caught.value)


# Microsoft files ---------------------------------------------------------------------------------

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
    """The weights of `theirs`, with Microsoft's names."""
    return as_microsoft(theirs.state_dict(), PUBLISHED["cvt-13"].get("depth", [1, 2, 10]))


@torch.inference_mode()
def test_microsoft_file_gives_the_outputs_of_transformers(
    tmp_path: Path, theirs: transformers.CvtForImageClassification, weights: dict[str, Tensor]
) -> None:
    torch.save(weights, tmp_path / FILE)
    checkpoint = load_checkpoint(str(tmp_path / FILE))
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    logits = theirs(pixels).logits
    assert logits.std() > 0.1
    assert_close(checkpoint.model(pixels), logits, rtol=1e-5, atol=1e-5)
    assert checkpoint.name == "CvT-13-224x224-IN-1k"
    assert checkpoint.labels == tuple(f"LABEL_{i}" for i in range(10))
    preprocessor = checkpoint.preprocessor
    assert (preprocessor.size, preprocessor.crop_pct, preprocessor.resample) == (224, 0.875, 3)
    assert preprocessor.mean == (0.485, 0.456, 0.406)


def test_microsoft_file_and_transformers_folder_have_the_same_digest(
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


def test_microsoft_weights_that_do_not_fit_are_named(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    changed = weights | {"stage0.pos_embed": torch.zeros(1), "norm.bias": torch.zeros(5)}
    del changed["stage1.blocks.1.attn.conv_proj_k.bn.running_var"]
    torch.save(changed, tmp_path / FILE)
    message = load_error(tmp_path / FILE)
    missing = "layers.1.attention.attention.convolution_projection_key.convolution_projection.normalization"
    assert f"missing: cvt.encoder.stages.1.{missing}.running_var" in message
    assert "unexpected: stage0.pos_embed" in message
    assert "wrong shape: layernorm.bias" in message


@pytest.mark.parametrize(("name", "warned"), [(FILE, False), ("CvT-13.pth", True)])
def test_guessed_image_size_is_reported(
    tmp_path: Path, weights: dict[str, Tensor], caplog: pytest.LogCaptureFixture, name: str, warned: bool
) -> None:
    torch.save(weights, tmp_path / name)
    assert load_checkpoint(str(tmp_path / name)).preprocessor.size == 224
    cause = "the file name does not state a size (224x224 or 384x384)"
    message = f"{name}: assuming an image size of 224 pixels, because {cause}"
    remedy = "to set the size: cvt-label convert --size"
    assert caplog.messages == ([f"{message}; {remedy}"] if warned else [])


def test_file_of_another_model_fails(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(1)}, tmp_path / FILE)
    assert f"{FILE}: not a Microsoft CvT checkpoint" in load_error(tmp_path / FILE)


# The hub -----------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for hub files, in offline mode."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("path", "revision"),
    [("someone/clothes@v1", None), ("someone/clothes", "v1"), (f"someone/clothes@{COMMIT}", None)],
)
def test_cached_hub_id_loads_with_its_revision(hub_cache: Path, path: str, revision: str | None) -> None:
    repository = hub_cache / "models--someone--clothes"
    shutil.copytree(BUNDLED["fashion-mnist"], repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    checkpoint = load_checkpoint(path, revision)
    assert checkpoint.name == "clothes"
    assert checkpoint.digest == load_checkpoint("fashion-mnist").digest
    assert "offline" in load_error("someone/clothes@v2")
    (repository / "snapshots" / COMMIT / WEIGHTS).unlink()  # like an interrupted download
    assert "the folder has no weights" in load_error("someone/clothes@v1")


def test_hub_download_fetches_only_needed_files_once(
    folder: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pytorch_model.bin", "tf_model.h5", "README.md"):
        (folder / name).write_bytes(b"not needed")
    expected = load_checkpoint("fashion-mnist").digest
    constants = huggingface_hub.constants
    with serve_hub("someone/clothes", "v1", folder) as (url, fetched):
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert load_checkpoint("someone/clothes@v1").digest == expected
        assert fetched == {"config.json", "preprocessor_config.json", WEIGHTS}
        assert "404 Client Error. Revision Not Found" in load_error("someone/clothes@v2")
    assert load_checkpoint("someone/clothes@v1").digest == expected  # the server is stopped


def test_two_revisions_fail(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="two revisions are given, 'v1' and 'v2'"):
        load_checkpoint("someone/clothes@v1", "v2")


def test_unavailable_hub_id_lists_bundled_checkpoints(hub_cache: Path) -> None:
    assert "bundled: fashion-mnist" in load_error("someone/no-such-model")


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_bar_setting_is_restored(tmp_path: Path, enabled: bool) -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    before = is_progress_bar_enabled()
    try:
        (enable_progress_bar if enabled else disable_progress_bar)()
        save_checkpoint(checkpoint.to_transformers(), checkpoint.preprocessor, tmp_path)
        assert is_progress_bar_enabled() == enabled
    finally:
        (enable_progress_bar if before else disable_progress_bar)()
