from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.testing import assert_close

from cvt.configuration import CvtConfig
from cvt.engine import Engine
from cvt.modeling import CvtForImageClassification, CvtStage
from cvt.preprocessing import Preprocessor
from tests.cvt.random_models import TINY, randomise

SIZE = 48
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSOR = Preprocessor(SIZE, crop_pct=0.875, resample=3, mean=MEAN, std=STD, rescale_factor=1 / 255)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, SIZE, SIZE, 3), dtype=np.uint8)


def make_model(**fields: Any) -> CvtForImageClassification:
    return randomise(CvtForImageClassification(CvtConfig(**TINY | {"num_labels": 5} | fields)))


def make_engine(model: CvtForImageClassification | None = None, **options: Any) -> Engine:
    return Engine(model or make_model(), PREPROCESSOR, **{"device": "cpu"} | options)


@torch.inference_mode()
def outputs_of_the_model(
    model: CvtForImageClassification, images: np.ndarray = IMAGES
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and what went into the classifier."""
    seen = []
    with model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        normalised = (images / 255 - MEAN) / STD
        logits = model(torch.tensor(normalised, dtype=torch.float32).permute(0, 3, 1, 2)).logits
    return logits.numpy(), seen[0].numpy()


@pytest.mark.parametrize("cls_token", [True, False])
@pytest.mark.parametrize("method", ["dw_bn", "avg", "linear"])
def test_it_gives_what_the_model_gives(method: str, cls_token: bool) -> None:
    model = make_model(qkv_projection_method=[method] * 3, cls_token=[False, False, cls_token])
    logits, embeddings = outputs_of_the_model(model)
    output = make_engine(model)(IMAGES)
    assert output.logits.dtype == output.embeddings.dtype == np.float32
    np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


def test_it_gives_what_the_model_gives_at_the_size_of_cvt_13() -> None:
    model = randomise(CvtForImageClassification(CvtConfig(num_labels=1000)))
    preprocessor = Preprocessor(224, crop_pct=0.875, resample=3, mean=MEAN, std=STD, rescale_factor=1 / 255)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    logits, embeddings = outputs_of_the_model(model, images)
    output = Engine(model, preprocessor, device="cpu")(images)
    np.testing.assert_allclose(output.logits, logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=1e-4, rtol=0)


def test_the_model_stays_as_it_is_and_later_changes_of_it_have_no_effect() -> None:
    model = make_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    engine = make_engine(model)
    output = engine(IMAGES)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.nn.init.zeros_(model.classifier.weight)
    np.testing.assert_array_equal(engine(IMAGES).logits, output.logits)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_results_do_not_depend_on_the_company_of_an_image(batch_size: int) -> None:
    together = make_engine(batch_size=64)(IMAGES)
    apart = make_engine(batch_size=batch_size)(IMAGES[::-1])
    np.testing.assert_allclose(apart.logits[::-1], together.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(apart.embeddings[::-1], together.embeddings, atol=1e-5, rtol=1e-5)


def test_batches_are_split_to_fit_the_cpu_without_effect_on_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make_engine(batch_size=6)(IMAGES)
    an_image = 12 * 12 * 64 * 4  # the first stage's tokens, inside its MLP, in bytes
    monkeypatch.setattr("cvt.engine.LARGEST_CPU_ACTIVATION", 2 * an_image + 1)
    sizes = []

    def note(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, CvtStage):
            sizes.append(len(inputs[0]))

    with register_module_forward_pre_hook(note):
        split = make_engine(batch_size=6)(IMAGES)
    assert sizes == [size for size in (2, 2, 2, 1) for _ in range(3)]
    np.testing.assert_allclose(split.logits, whole.logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(split.embeddings, whole.embeddings, atol=1e-5, rtol=1e-5)


def test_it_is_deterministic() -> None:
    model = make_model()
    first, second = make_engine(model), make_engine(model)
    once, again, other = first(IMAGES), first(IMAGES), second(IMAGES)
    for output in (again, other):
        np.testing.assert_array_equal(output.logits, once.logits)
        np.testing.assert_array_equal(output.embeddings, once.embeddings)


def test_outputs_of_one_call_are_not_overwritten_by_the_next() -> None:
    engine = make_engine()
    kept = engine(IMAGES)
    copy = kept.logits.copy()
    engine(255 - IMAGES)
    np.testing.assert_array_equal(kept.logits, copy)


def test_read_only_and_strided_arrays_are_taken() -> None:
    engine = make_engine()
    wanted = engine(IMAGES[:, :, ::-1].copy())
    frozen = IMAGES[:, :, ::-1]
    frozen.flags.writeable = False
    np.testing.assert_array_equal(engine(frozen).logits, wanted.logits)


def test_no_images_give_empty_outputs() -> None:
    output = make_engine()(IMAGES[:0])
    assert output.logits.shape == (0, 5)
    assert output.embeddings.shape == (0, 48)


def test_without_labels_the_logits_are_the_embeddings() -> None:
    output = make_engine(make_model(num_labels=0))(IMAGES)
    np.testing.assert_array_equal(output.logits, output.embeddings)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gives_about_the_same_without_ties(precision: str) -> None:
    model = make_model(num_labels=1000)
    wanted = make_engine(model)(IMAGES[:2])
    got = make_engine(model, precision=precision)(IMAGES[:2])
    assert got.logits.dtype == got.embeddings.dtype == np.float32
    assert not np.array_equal(got.logits, wanted.logits)
    np.testing.assert_allclose(got.logits, wanted.logits, atol=0.2, rtol=0)
    assert all(len(np.unique(row)) > 990 for row in got.logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.2), ("fp16", 0.05)])
def test_a_gpu_gives_what_the_model_gives(precision: str, tolerance: float) -> None:
    model = make_model()
    logits, embeddings = outputs_of_the_model(model)
    engine = make_engine(model, device="auto", precision=precision)
    assert engine.device.type == "cuda"
    output = engine(IMAGES)
    np.testing.assert_allclose(output.logits, logits, atol=tolerance, rtol=0)
    np.testing.assert_allclose(output.embeddings, embeddings, atol=tolerance, rtol=0)
    np.testing.assert_array_equal(engine(IMAGES).logits, output.logits)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES.astype(np.float32), r"must be uint8 \(n, 48, 48, 3\), not float32 \(7, 48, 48, 3\)"),
        (IMAGES[0], r"must be uint8 \(n, 48, 48, 3\), not uint8 \(48, 48, 3\)"),
        (IMAGES[:, :40], r"must be uint8 \(n, 48, 48, 3\), not uint8 \(7, 40, 48, 3\)"),
        (IMAGES.transpose(0, 3, 1, 2), r"not uint8 \(7, 3, 48, 48\)"),
        (IMAGES[..., :1], r"not uint8 \(7, 48, 48, 1\)"),
    ],
    ids=["floats", "one image", "another size", "channels first", "grey"],
)
def test_other_arrays_are_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine()(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, not 'int8'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
        ({"model": make_model(num_channels=1)}, "takes images of 1 channels, its preprocessing makes 3"),
    ],
)
def test_other_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_unless_the_choice_is_free() -> None:
    with pytest.raises(ValueError, match="PyTorch finds no GPU"):
        make_engine(device="cuda")
    assert make_engine(device="auto").device.type == "cpu"


def test_it_sets_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    wanted = 2 if before == 1 else 1
    try:
        make_engine(threads=wanted)
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_a_device_out_of_memory_gets_smaller_batches_and_the_same_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = make_engine(batch_size=64)(IMAGES)
    engine = make_engine(batch_size=64)
    run, sizes = engine._run, []

    def short_of_memory(images: np.ndarray) -> tuple[Tensor, Tensor]:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return run(images)

    monkeypatch.setattr(engine, "_run", short_of_memory)
    found = engine(IMAGES)
    assert engine.batch_size == 2
    assert_close(torch.tensor(found.logits), torch.tensor(wanted.logits))
    engine(IMAGES)
    assert sizes.count(2) >= len(IMAGES) // 2 * 2
    assert sum(size > 3 for size in sizes) <= 5


def test_a_device_without_memory_for_one_image_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(batch_size=4)

    def no_memory(images: np.ndarray) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine, "_run", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine(IMAGES)
