"""The XLS-R and MFCC teachers against the published package and plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from torch.nn import functional

from data_specs.io.errors import UserError
from data_specs.io.waves import audible_samples, filled
from data_specs.sample import CROP_SAMPLES
from data_specs.teacher import PublishedHead, XlsR, packages_of, teacher_table
from tests.bench.__main__ import main as run_bench
from tests.bench.random_xlsr import SIZES, config_of, write_checkpoint
from tests.conftest import talk
from tests.tolerance import STUDENT, rounding
from tests.train_helpers import SHARED, needs_shared, tones, write_dataset, write_rated
from train.__main__ import main
from train.audio import clip_of
from train.models import front_end, weights, xlsr
from train.models import teacher as teacher_models
from train.models.features import compressed_spectrum, peak_normalise
from train.models.front_end import StudentFrontEnd, centre_crop, load_front_end, load_xlsr
from train.models.head import HeadConfig, build_head
from train.models.head_teacher import HeadTeacher, _cuda_sizes, load_trained, published_head
from train.models.student import load_v7
from train.models.teacher import identify_teacher, load_teacher
from train.models.xlsr import (
    DIRECTION,
    GAIN,
    POSITIONS,
    Encoder,
    encoder_sha256,
    flops,
    load_encoder,
    normal,
    read_tensors,
    tensor_names,
)
from train.scoring.score import load

TOLERANCE = STUDENT
HEAD = rounding(1920, layers=16)
"""Of a logit: four layers of four sums each, over at most 1920 features."""
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "conv_dim": [16] * 7}
E2E_CONFIGS = {
    "300m": "XLSR_300M_TRANSFORMER_32DEEP_CONFIG",
    "2b": "XLSR_2B_TRANSFORMER_32DEEP_CONFIG",
}
PUBLISHED = {
    name: spec for name, spec in teacher_table().teachers.items() if isinstance(spec, PublishedHead)
}


def small_config(layers: int = 4):
    return config_of("300m", layers, **SMALL, num_conv_pos_embedding_groups=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four small layers, one file."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), small_config())


def whole_model(folder: Path):
    from transformers import Wav2Vec2Model

    return Wav2Vec2Model.from_pretrained(folder, attn_implementation="eager").eval()


# --- the published package ------------------------------------------------------------------------


@needs_shared
@pytest.mark.shared
@pytest.mark.parametrize("variant", ["subset", "full"])
def test_mfcc_is_the_package_on_its_own_samples(variant: str):
    config = pytest.importorskip("xls_r_sqa.config")
    e2e = pytest.importorskip("xls_r_sqa.e2e_model")
    package = e2e.E2EModel(config.MFCC_TRANSFORMER_32DEEP_CONFIG, dataset_variant=variant).eval()
    teacher = load_teacher("mfcc" if variant == "subset" else "mfcc-full")
    paths = sorted((SHARED / "data/mos/xlsr_sqa_samples").glob("*.flac"))
    assert len(paths) == 5
    for path in paths:
        wave_1T = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
        with torch.inference_mode():
            expected = package(wave_1T).item()
        logit_1 = teacher.logits(wave_1T)
        assert 1 + 4 * torch.sigmoid(logit_1).item() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_head_is_the_packages(name: str):
    config = pytest.importorskip("xls_r_sqa.config")
    model = pytest.importorskip("xls_r_sqa.sqa_model")
    spec, sizes = PUBLISHED[name], {"300m": 1024, "1b": 1280, "2b": 1920}
    size = next((size for size in sizes if f"-{size}-" in name), None)
    which = f"XLSR_{size.upper()}" if size else "MFCC"
    settings = getattr(config, f"{which}_TRANSFORMER_32DEEP_CONFIG")
    ours, _ = published_head(spec.file, sizes.get(size, 40))
    fusion = "fusion" in name
    theirs = (model.FusionModel if fusion else model.SingleLayerModel)(settings).eval()
    path = Path(model.__file__).parent / "models/sqa-v2" / spec.file
    theirs.load_state_dict(torch.load(path, weights_only=True))
    features = torch.randn(2, 384, sizes.get(size, 40), 2 if fusion else 1)
    given = tuple(features.unbind(-1)) if fusion else features[..., 0]
    with torch.inference_mode():
        expected_B = theirs(given).flatten()
        logits_B = ours(features if fusion else features[..., 0])
    torch.testing.assert_close(torch.sigmoid(logits_B), expected_B, rtol=0, atol=HEAD)


def same_as_package(size: str, layer: int, folder: Path, clip: torch.Tensor) -> None:
    config = pytest.importorskip("xls_r_sqa.config")
    e2e = pytest.importorskip("xls_r_sqa.e2e_model")
    spec = PUBLISHED[f"xlsr-{size}-l{layer}"]
    path = Path(e2e.__file__).parent / "models/sqa-v2" / spec.file
    settings = getattr(config, E2E_CONFIGS[size])
    package = e2e.E2EModel(settings, layer, folder, path, auto_download=False).eval()
    with torch.inference_mode():
        expected = package(clip).item()
    del package
    ours = load_xlsr("test", folder, [layer], precision="fp32")
    head, sha256 = published_head(spec.file, ours.channels)
    logit_1 = HeadTeacher("test", ours, head, sha256).logits(clip)
    assert 1 + 4 * torch.sigmoid(logit_1).item() == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(3.0, marks=pytest.mark.slow), 7.68, pytest.param(10.0, marks=pytest.mark.slow)],
)
def test_the_real_300m_shape_is_the_package(
    seconds: float, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
):
    folder = request.getfixturevalue("real_300m")
    same_as_package("300m", 5, folder, tones(1, int(seconds * 16_000)))


@pytest.fixture(scope="module")
def real_300m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of the 300M model, as the published cut has it: 0.4 GB."""
    return write_checkpoint(tmp_path_factory.mktemp("xls-r-300m"), config_of("300m", 6))


@pytest.mark.slow
def test_the_real_2b_shape_is_the_package(tmp_path: Path):
    folder = write_checkpoint(tmp_path, config_of("2b", 11), ending="bin", shard_bytes=1 << 34)
    same_as_package("2b", 10, folder, tones(1))
    shutil.rmtree(folder)


def test_the_2b_cut_has_477_million_parameters():
    with torch.device("meta"):
        encoder = Encoder(config_of("2b"), [10])
    count = sum(parameter.numel() for parameter in encoder.parameters())
    assert round(count / 1e6) == 477
    assert len(encoder.encoder.layers) == 10


def test_operations_of_a_clip():
    parts = flops(config_of("2b"), 10, CROP_SAMPLES)
    assert parts["layers"] == 10 * 2 * 383 * (4 * 1920**2 + 2 * 1920 * 7680)
    assert 400e9 < sum(parts.values()) < 430e9
    assert sorted(SIZES) == ["1b", "2b", "300m"]


# --- the cut --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[1], [2], [3], [1, 3]])
def test_hidden_states_are_the_whole_models(small: Path, layers: list[int]):
    """The longest sum is over 128 positions; 8 convolutions, and 6 sums in each of 3 layers."""
    encoder, _ = load_encoder(small, layers)
    assert len(encoder.encoder.layers) == max(layers)
    waves_BT = tones(2, 16_000)
    with torch.inference_mode():
        whole = whole_model(small)(normal(waves_BT), output_hidden_states=True)
        states = encoder(waves_BT)
    for layer, found in zip(layers, states, strict=True):
        expected = whole.hidden_states[layer]
        atol = rounding(8 * 128, expected.abs().max(), layers=26)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["wav2vec2.", ""])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_every_form_of_a_checkpoint_gives_the_same_encoder(
    small: Path, tmp_path: Path, ending: str, prefix: str, shard_bytes: int
):
    folder = write_checkpoint(
        tmp_path, small_config(3), ending=ending, prefix=prefix, shard_bytes=shard_bytes
    )
    sharded = len(list(folder.glob(f"*.{ending}"))) > 1
    assert sharded == (shard_bytes < 1 << 30)
    expected, expected_sha256 = load_encoder(small, [2])
    encoder, sha256 = load_encoder(folder, [2])
    # The whole model's and the cut's are the same weights.
    assert sha256 == expected_sha256 == encoder_sha256(folder, [2])
    state = encoder.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_small_portions_read_the_same(small: Path, monkeypatch: pytest.MonkeyPatch):
    expected = {name: tensor.clone() for name, tensor in read_tensors(small, wanted(small))}
    monkeypatch.setattr("train.models.xlsr.PORTION", 1)
    found = {name: tensor.clone() for name, tensor in read_tensors(small, wanted(small))}
    assert found.keys() == expected.keys() and len(found) > 20
    assert all(torch.equal(found[name], expected[name]) for name in found)


def wanted(folder: Path) -> set[str]:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    return {name.removeprefix("wav2vec2.") for name in state}


def test_names_of_weight_norm_as_they_are_now(small: Path, tmp_path: Path):
    state = safetensors.torch.load_file(small / "model.safetensors")
    renamed = {
        name.replace("conv.weight_g", "conv.parametrizations.weight.original0").replace(
            "conv.weight_v", "conv.parametrizations.weight.original1"
        ): tensor
        for name, tensor in state.items()
    }
    shutil.copy(small / "config.json", tmp_path)
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    assert load_encoder(tmp_path, [2])[1] == load_encoder(small, [2])[1]


def test_other_weights_have_another_hash(small: Path, tmp_path: Path):
    other = write_checkpoint(tmp_path, small_config(), seed=1)
    assert load_encoder(other, [2])[1] != load_encoder(small, [2])[1]
    assert load_encoder(small, [1])[1] != load_encoder(small, [2])[1]


def change(folder: Path, small: Path, what: str) -> Path:
    shutil.copytree(small, folder, dirs_exist_ok=True)
    weights_path, config_path = folder / "model.safetensors", folder / "config.json"
    state, config = safetensors.torch.load_file(weights_path), json.loads(config_path.read_text())
    name = "wav2vec2.encoder.layers.1.attention.k_proj.weight"
    if what == "tensor":
        del state[name]
    elif what == "shape":
        state[name] = state[name][:3]
    elif what == "nan":
        state[name][0, 0] = float("nan")
    elif what == "norm":
        del state["wav2vec2.encoder.pos_conv_embed.conv.weight_g"]
    elif what == "kind":
        config["do_stable_layer_norm"] = False
    safetensors.torch.save_file(state, weights_path)
    config_path.write_text(json.dumps(config))
    if what == "cut":
        weights_path.write_bytes(weights_path.read_bytes()[:-100])
    elif what == "config":
        config_path.write_text("{")
    elif what in ("model.safetensors", "config.json"):
        (folder / what).unlink()
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tensor", "lacks 1 tensors, such as 'encoder.layers.1.attention.k_proj.weight'"),
        ("shape", r"k_proj.weight' has shape \(3, 32\), config.json says \(32, 32\)"),
        ("nan", "tensor 'encoder.layers.1.*k_proj.weight' holds values that are not finite"),
        ("norm", "lacks 1 tensors, such as 'encoder.pos_conv_embed.conv.weight_g'"),
        ("kind", "config.json: not an XLS-R"),
        ("cut", "model.safetensors: damaged or no checkpoint"),
        ("config", "config.json: not JSON"),
        ("model.safetensors", "holds none of model.safetensors, pytorch_model.bin"),
        ("config.json", "config.json is missing"),
    ],
)
def test_a_bad_checkpoint_is_told_by_name(small: Path, tmp_path: Path, what: str, message: str):
    folder = change(tmp_path / "model", small, what)
    with pytest.raises(ValueError, match=message):
        load_encoder(folder, [2])
    if what not in ("shape", "nan"):  # no matter for a hash
        with pytest.raises(ValueError, match=message):
            encoder_sha256(folder, [2])


def test_a_shard_that_is_missing_is_named(tmp_path: Path):
    write_checkpoint(tmp_path, small_config(), shard_bytes=40_000)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} is missing"):
        load_encoder(tmp_path, [2])


def test_a_layer_that_the_model_has_not(small: Path):
    with pytest.raises(ValueError, match="layer 5: the model has 4"):
        load_encoder(small, [5])


# --- as a teacher ---------------------------------------------------------------------------------


@pytest.fixture
def small_teacher(small: Path) -> HeadTeacher:
    torch.manual_seed(0)
    ours = load_xlsr("small", small, [2], precision="fp32")
    return HeadTeacher("small", ours, build_head(HeadConfig(features=32)), "0" * 64)


def test_a_score_does_not_depend_on_its_neighbours(small_teacher: HeadTeacher):
    waves_BT = tones(3)
    mos_B, logit_B = small_teacher.score(waves_BT)
    assert logit_B is not None and mos_B.shape == logit_B.shape == (3,)
    np.testing.assert_allclose(mos_B, 1 + 4 / (1 + np.exp(-logit_B)), atol=rounding(1, 5))
    for number in range(3):
        one, _ = small_teacher.score(waves_BT[number : number + 1])
        assert one[0] == mos_B[number]
    assert small_teacher.score(waves_BT[:0])[0].shape == (0,)


def test_mfcc_of_a_clip_does_not_depend_on_a_loud_neighbour():
    quiet_BT = 0.001 * tones(1)
    both_BT = torch.cat([quiet_BT, tones(1)])
    ours = load_front_end("mfcc")
    quiet = ours.frames(quiet_BT)
    atol = rounding(400, quiet.abs().max())  # a frame's samples
    torch.testing.assert_close(ours.frames(both_BT)[:1], quiet, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("clips", "sizes"),
    [(1, [8]), (8, [8]), (9, [16]), (32, [32]), (50, [32, 32]), (70, [32, 32, 8])],
)
def test_sizes_of_batches_on_a_gpu_are_few(clips: int, sizes: list[int]):
    assert _cuda_sizes(clips) == sizes


def test_level_is_normalised(small_teacher: HeadTeacher):
    waves_BT = tones(1)
    loud, quiet = (small_teacher.score(gain * waves_BT)[0] for gain in (1, 0.1))
    np.testing.assert_allclose(loud, quiet, atol=1e-3)  # variance + 1e-7 under the root
    assert np.isfinite(small_teacher.score(torch.zeros(1, CROP_SAMPLES))[0]).all()


@pytest.mark.parametrize(("frames", "first"), [(384, 0), (385, 0), (386, 1), (1000, 308)])
def test_the_middle_is_cropped(frames: int, first: int):
    frames_BLC = torch.arange(frames)[None, :, None].float()
    assert centre_crop(frames_BLC)[0, 0, 0] == first
    assert centre_crop(frames_BLC).shape == (1, 384, 1)


def test_short_features_end_in_zeros():
    assert centre_crop(torch.ones(1, 383, 2))[0, -1].tolist() == [0, 0]


def test_the_mean_of_teachers():
    waves_BT = tones(1)
    mean = load_teacher("mean:distillmos+mfcc", precision="fp32")
    scores = [load_teacher(n, precision="fp32").score(waves_BT)[0] for n in ("distillmos", "mfcc")]
    mos_B, logit_B = mean.score(waves_BT)
    assert mean.name == "mean:distillmos+mfcc" and logit_B is None
    np.testing.assert_allclose(mos_B, np.mean(scores, axis=0), atol=rounding(2, 5))
    other = load_teacher("mean:mfcc+distillmos", precision="fp32")
    assert other.weights_sha256 != mean.weights_sha256


def test_the_open_teacher_hears_short_clips_again_and_is_a_weighted_mean():
    """Two parts of v7 to one of DNSMOS P.808; zeros behind a clip are no part of what is heard."""
    pytest.importorskip("speechmos")
    names = ("open", "distillmos", "dnsmos-p808")
    ours, v7, p808 = (load_teacher(name, precision="fp32") for name in names)
    short_T, full_T = talk(2.1, 3), talk(7.68, 4)[:CROP_SAMPLES]
    given_BT = np.stack([np.pad(short_T, (0, CROP_SAMPLES - len(short_T))), full_T])
    heard_BT = np.stack([filled(short_T[: audible_samples(short_T)], "repeat"), full_T])
    mos_B, logit_B = ours.score(given_BT)
    right_B = (2 * v7.score(heard_BT)[0] + p808.score(heard_BT)[0]) / 3
    np.testing.assert_allclose(mos_B, right_B, atol=rounding(2, 5))
    assert abs(v7.score(given_BT)[0][0] - v7.score(heard_BT)[0][0]) > 0.05
    assert ours.name == "open" and logit_B is None
    assert identify_teacher("open", precision="fp32").weights_sha256 == ours.weights_sha256
    assert packages_of("open") == {"onnxruntime", "librosa"}
    # DNSMOS stays on the CPU, in fp32, wherever v7 is.
    assert identify_teacher("open", "cuda", "fp16").weights_sha256 == ours.weights_sha256
    assert load_teacher("open", precision="bf16").weights_sha256 == ours.weights_sha256
    with pytest.raises(UserError, match="runs on the CPU only"):
        identify_teacher("dnsmos-p808", "cuda")


def test_names_and_what_to_do_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(front_end, "_in_hub_cache", lambda name: None)
    with pytest.raises(ValueError, match="did you mean 'xlsr-2b-l41'"):
        load_teacher("xlsr-2b-l11")
    with pytest.raises(ValueError, match="make weights NAMES=xls-r-2b-lay10"):
        load_teacher("xlsr-2b-l10")
    with pytest.raises(ValueError, match="run make teacher"):
        load_teacher("xlsr-2b-l10-ba")
    with pytest.raises(ValueError, match="fp16 is for CUDA"):
        load_teacher("distillmos", precision="fp16")


def test_every_teacher_of_the_table_has_its_files():
    table = teacher_table()
    assert {"distillmos", "dnsmos", "mfcc", "xlsr-2b-l10", "xlsr-2b-l10-ba"} <= set(table.teachers)
    for spec in table.front_ends.values():
        if isinstance(spec, XlsR):
            assert all(weights.entry_of(name) for name in spec.weights)


def test_an_encoder_in_the_cache_is_found_in_any_form(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path))
    write_checkpoint(tmp_path / "xls-r-300m", small_config(6), shard_bytes=40_000)
    ours = load_front_end("xlsr-300m-l5", precision="fp32")
    assert ours.name == "xlsr-300m-l5" and ours.channels == 32
    assert ours.frames(tones(1)).shape == (1, 384, 32)


def no_network(*_: object) -> None:
    pytest.fail("a network is built")


def test_an_encoder_is_known_by_its_files_tensors_alone(
    small: Path, monkeypatch: pytest.MonkeyPatch
):
    _, expected = load_encoder(small, [2])
    monkeypatch.setattr(torch.nn.Module, "__init__", no_network)
    assert encoder_sha256(small, [2]) == expected
    assert encoder_sha256(small, [1]) != expected
    with pytest.raises(ValueError, match="layer 5: the model has 4"):
        encoder_sha256(small, [5])


@pytest.mark.parametrize("layers", [[1], [10], [1, 3]])
def test_the_names_of_the_tensors_are_the_networks(layers: list[int]):
    for size in SIZES:
        with torch.device("meta"):
            names = set(Encoder(config_of(size), layers).state_dict())
        in_checkpoints = names - {f"{POSITIONS}weight"} | {GAIN, DIRECTION}
        assert tensor_names(config_of(size), layers) == in_checkpoints


def test_every_kind_of_teacher_is_identified_as_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path))
    write_checkpoint(tmp_path / "xls-r-300m", small_config(6))
    heard = load_front_end("xlsr-300m-l5", precision="fp32")
    about = {"front_end": "xlsr-300m-l5", "front_end_sha256": heard.weights_sha256}
    trained_head(tmp_path / "mine", features=32, **about)
    names = ["distillmos", "mine", str(tmp_path / "mine"), "mean:distillmos+mine"]
    loaded = {name: load_teacher(name, precision="fp32") for name in names}
    monkeypatch.setattr(xlsr, "Encoder", no_network)
    monkeypatch.setattr(teacher_models, "load_v7", no_network)
    for name, teacher in loaded.items():
        found = identify_teacher(name, "cuda", "fp16")  # no GPU is needed to know it
        assert (found.name, found.weights_sha256) == (teacher.name, teacher.weights_sha256)
        assert found.calibration == teacher.calibration
    with pytest.raises(ValueError, match="fp16 is for CUDA"):
        identify_teacher("mine", "cpu", "fp16")
    with pytest.raises(ValueError, match="trained on another 'mfcc'"):
        identify_teacher(str(trained_head(tmp_path / "other", front_end_sha256="f" * 64)))


def trained_head(folder: Path, features: int = 40, **changes: object) -> Path:
    torch.manual_seed(1)
    config = HeadConfig(features=features)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(build_head(config).state_dict(), folder / "head.safetensors")
    about = {
        "front_end": "mfcc",
        "front_end_sha256": load_front_end("mfcc").weights_sha256,
        "head": config.model_dump(),
        "calibration": {
            "universal": {"scale": 2.0, "shift": 0.5},
            "datasets": {"a": {"scale": 1.0, "shift": 0.0}},
        },
    }
    (folder / "head.json").write_text(json.dumps(about | changes))
    return folder


def test_a_trained_head_scores_on_the_universal_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw = load_trained("raw", trained_head(tmp_path / "raw", calibration=None))
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path))
    trained_head(tmp_path / "mine")
    ours = load_teacher("mine")  # by its name in the cache, or by its folder
    assert load_teacher(str(tmp_path / "mine")).name == ours.name == "mine"
    assert ours.calibration is not None and raw.calibration is None
    waves_BT = tones(1)
    np.testing.assert_allclose(
        ours.score(waves_BT)[1], 2 * raw.score(waves_BT)[1] + 0.5, rtol=0, atol=2 * HEAD
    )
    assert ours.weights_sha256 != raw.weights_sha256


def test_a_trained_head_of_another_front_end_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="trained on another 'mfcc'"):
        load_trained("x", trained_head(tmp_path, front_end_sha256="f" * 64))
    with pytest.raises(ValueError, match="does not describe a head"):
        load_trained("x", trained_head(tmp_path, head={"features": 41}))
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no head.safetensors"):
        load_trained("x", tmp_path)
    for field in ("front_end", "front_end_sha256"):
        for wrong in (7, None, {}):
            with pytest.raises(UserError, match=f"no '{field}' of kind str"):
                load_trained("raw", trained_head(tmp_path / "wrong", **{field: wrong}))


# --- any length -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1.0, 4.0, 7.68])
def test_a_clip_up_to_a_window_is_heard_as_the_package_hears_it(seconds: float):
    config = pytest.importorskip("xls_r_sqa.config")
    e2e = pytest.importorskip("xls_r_sqa.e2e_model")
    package = e2e.E2EModel(config.MFCC_TRANSFORMER_32DEEP_CONFIG).eval()
    wave_1T = tones(1, int(seconds * 16_000))
    with torch.inference_mode():
        expected = package(wave_1T).item()
    scorer = load("mfcc")
    assert scorer.score(wave_1T[0], 16_000) == pytest.approx(expected, abs=TOLERANCE)
    assert (scorer.score(wave_1T[0], 16_000, "repeat") != scorer.score(wave_1T[0], 16_000)) == (
        seconds < 7.68
    )


def test_windows_of_files_of_any_length_share_batches(tmp_path: Path):
    lengths = [300, 30_000, CROP_SAMPLES, CROP_SAMPLES + 20_000, 9_000, 3 * CROP_SAMPLES]
    clips = [tones(1, samples)[0].numpy() for samples in lengths]
    for number, wave_T in enumerate(clips):
        soundfile.write(tmp_path / f"{number}.wav", wave_T, 16_000, subtype="FLOAT")
    scorer = load("mfcc")
    together = [score.mos for score in scorer.score_files(sorted(tmp_path.glob("*.wav")))]
    alone = [scorer.score(wave_T, 16_000) for wave_T in clips]
    np.testing.assert_allclose(together, alone, atol=HEAD)


def test_a_long_clip_is_the_mean_of_its_windows():
    wave_T = tones(1, CROP_SAMPLES + 30_000)[0].numpy()
    scorer, teacher = load("mfcc"), load_teacher("mfcc")
    parts = scorer.parts(clip_of(wave_T, 16_000), "zero", "exact")
    cut = np.stack([part.wave_T for part in parts])
    assert len(cut) == 3
    expected = float(np.mean(teacher.score(cut)[0]))
    assert scorer.score(wave_T, 16_000) == pytest.approx(expected, abs=HEAD)


def test_a_trained_head_and_a_mean_score_files(tmp_path: Path):
    head = trained_head(tmp_path / "mine")
    wave_T = tones(1)[0]
    for name in (head, "mean:mfcc+distillmos"):
        scorer = load(name)
        assert 1 <= scorer.score(wave_T, 16_000) <= 5 and len(scorer.weights_sha256) == 64
    with pytest.raises(ValueError, match="no such model"):
        load(tmp_path / "nothing")


@pytest.mark.slow
def test_the_bench_tells_what_bf16_does_to_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shards = write_dataset(tmp_path / "shards", shards=1, samples=3)
    bench = ["teacher", "precision", "--teacher", "distillmos", "--shards", str(shards)]
    assert run_bench([*bench, "--clips", "3"]) == 0
    said = capsys.readouterr().out
    assert "distillmos: 3 clips" in said and "99th percentile 0.0" in said
    assert run_bench([*bench, "--clips", "4"]) == 2
    assert run_bench(["teacher", "sped"]) == 2
    assert "unknown bench 'sped'" in capsys.readouterr().err


# --- features of the published student ------------------------------------------------------------


@pytest.fixture(scope="module")
def v7_conv():
    return load_front_end("v7-conv", precision="fp32")


def test_v7_conv_is_what_the_students_head_reads(v7_conv):
    student, waves_BT = load_v7(), tones(2)
    with torch.inference_mode():
        expected = student.tokens(compressed_spectrum(peak_normalise(waves_BT)))
    found = v7_conv.frames(waves_BT)
    assert found.shape == (2, v7_conv.tokens, v7_conv.channels) == (2, 384, 1024)
    atol = rounding(9 * 128, expected.abs().max(), layers=12)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    quiet = v7_conv.frames(0.1 * waves_BT)  # its peak is not exactly a tenth, nor 1e-8 below it
    torch.testing.assert_close(quiet, found, rtol=0, atol=10 * atol)


def test_v7_conv_hears_the_middle_of_a_long_clip_and_zeros_after_a_short_one(v7_conv):
    long_BT = tones(1, CROP_SAMPLES + 20_001)
    middle = v7_conv.frames(long_BT[:, 10_000 : 10_000 + CROP_SAMPLES])
    assert torch.equal(v7_conv.frames(long_BT), middle)
    short_BT = tones(1, 8_000)
    padded = functional.pad(short_BT, (0, CROP_SAMPLES - 8_000))
    assert torch.equal(v7_conv.frames(short_BT), v7_conv.frames(padded))


def test_a_teacher_is_trained_on_v7_conv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, v7_conv: StudentFrontEnd
):
    labels = write_rated(tmp_path / "rated", clips=6, seconds=0.2)
    run = tmp_path / "heads/mine"
    command = ["teacher", "--front-end", "v7-conv", "--rated", str(labels), "--out", str(run)]
    command += ["--steps", "2", "--batch", "2", "--dim", "4", "--heads", "2", "--layers", "1"]
    assert main([*command, "--precision", "fp32"]) == 0
    assert json.loads((run / "head.json").read_text())["front_end_sha256"] == v7_conv.weights_sha256
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(run.parent))
    assert 1 <= load_teacher("mine", precision="fp32").score(tones(1))[0][0] <= 5


def test_packages_whose_versions_decide_a_score():
    assert packages_of("mfcc") == {"torchaudio"}
    assert packages_of("mean:dnsmos+xlsr-2b-l10-ba") == {"onnxruntime", "transformers"}
    assert teacher_table().front_ends["v7-conv"].packages == packages_of("distillmos") == set()
