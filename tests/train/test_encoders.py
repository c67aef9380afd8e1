"""Encoders: official checkpoints through one interface, padding, saving; a student's own output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from data_specs.io.errors import UserError
from tests.train_helpers import tones
from train.models.encoders.interface import SpeechEncoder, weights_sha256
from train.models.encoders.loading import load_encoder, save_encoder
from train.models.encoders.student_encoder import StudentEncoder
from train.models.front_end import front_end_sha256, load_front_end
from train.models.student import Student, variant
from train.pruning.encoder_units import split_encoder

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
SMALL_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "vocab_size": 16,
    "max_source_positions": 50,
    "max_target_positions": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}


def write_checkpoint(folder: Path, kind: str) -> Any:
    """A small random model in the official format; returns it."""
    from transformers import AutoConfig, AutoModel, AutoModelForCTC

    torch.manual_seed(12)
    config = AutoConfig.for_model(kind, **(SMALL_WHISPER if kind == "whisper" else SMALL))
    family = AutoModel if kind in ("whisper", "wavlm") else AutoModelForCTC
    model = family.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def states(encoder: SpeechEncoder, waves_BT: torch.Tensor, *lengths: int) -> Any:
    with torch.no_grad():
        return encoder(waves_BT, torch.tensor(lengths))


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm"])
def test_a_checkpoint_of_the_family_gives_the_published_states(kind, tmp_path):
    whole = write_checkpoint(tmp_path, kind)
    model = getattr(whole, kind, whole)
    waves_BT = tones(1, 8000)
    centred = waves_BT - waves_BT.mean()
    normal_BT = centred / torch.sqrt(centred.square().mean() + 1e-7)
    with torch.no_grad():
        published = model(normal_BT, output_hidden_states=True).hidden_states
    ours = states(load_encoder(tmp_path), waves_BT, 8000)
    # Weight norm's product is rounded once more: float32's steps at states of size 10.
    torch.testing.assert_close(ours.layers, tuple(published), rtol=1e-4, atol=1e-4)
    assert ours.lengths_B.tolist() == [published[0].shape[1]]


def test_whisper_gives_the_published_states_of_a_whole_window(tmp_path):
    from transformers import WhisperFeatureExtractor

    model = write_checkpoint(tmp_path, "whisper")
    waves_BT = tones(1, 16_000)
    extractor = WhisperFeatureExtractor(chunk_length=1)
    mel = extractor(waves_BT[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        published = model.encoder(mel, output_hidden_states=True).hidden_states
    ours = states(load_encoder(tmp_path), waves_BT, 16_000)
    # The last frame's spectrum is of a wave that Whisper mirrors at its end.
    for mine, theirs in zip(ours.layers[:1], published[:1], strict=True):
        torch.testing.assert_close(mine[:, :-2], theirs[:, :-2], rtol=1e-4, atol=1e-4)
    assert len(ours.layers) == len(published) == 3


@pytest.mark.parametrize("kind", ["wav2vec2", "hubert", "wavlm", "whisper"])
def test_what_lies_behind_a_clip_is_not_heard(kind, tmp_path):
    write_checkpoint(tmp_path, kind)
    encoder = load_encoder(tmp_path)
    waves_BT = tones(2, 12_000)
    waves_BT[1, 7000:] = 0
    both, alone = (
        states(encoder, w, *n)
        for w, n in ((waves_BT, (12_000, 7000)), (waves_BT[1:, :7000], (7000,)))
    )
    frames = int(alone.lengths_B[0])
    assert both.lengths_B[1] == frames
    for joint, single in zip(both.layers, alone.layers, strict=True):
        torch.testing.assert_close(joint[1:, :frames], single[:, :frames], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hubert", "whisper", "student", "log-mel"])
def test_an_encoder_is_written_and_read_back_bit_for_bit(kind, tmp_path):
    if kind == "student":
        encoder: SpeechEncoder = StudentEncoder(Student(variant("v1"))).eval()
    elif kind == "log-mel":
        encoder = load_encoder(kind)
    else:
        write_checkpoint(tmp_path / "official", kind)
        encoder = load_encoder(tmp_path / "official")
    save_encoder(tmp_path / "saved", encoder)
    again = load_encoder(tmp_path / "saved")
    waves_BT = tones(1, 8000)
    for one, other in zip(
        states(encoder, waves_BT, 8000).layers, states(again, waves_BT, 8000).layers, strict=True
    ):
        assert torch.equal(one, other)
    assert again.sizes() == encoder.sizes()
    assert (
        again.dims
        == encoder.dims
        == tuple(s.shape[2] for s in states(again, waves_BT, 8000).layers)
    )


def test_a_narrower_layer_is_read_as_wide_as_its_weights(tmp_path):
    write_checkpoint(tmp_path / "official", "whisper")
    encoder = load_encoder(tmp_path / "official")
    layer: Any = encoder.encoder.layers[0]
    layer.fc1, layer.fc2 = torch.nn.Linear(32, 5), torch.nn.Linear(5, 32)
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(layer.self_attn, name, torch.nn.Linear(32, 16, bias=name != "k_proj"))
    layer.self_attn.out_proj, layer.self_attn.num_heads = torch.nn.Linear(16, 32), 1
    save_encoder(tmp_path / "cut", encoder)
    again = load_encoder(tmp_path / "cut")
    one, other = (states(e, tones(1, 8000), 8000).layers[-1] for e in (encoder, again))
    assert torch.equal(one, other)
    fresh = again.fresh()
    assert fresh.sizes() == again.sizes() and weights_sha256(fresh) != weights_sha256(again)
    split_encoder(again)
    assert again.fresh().sizes() == again.sizes()
    save_encoder(tmp_path / "split", again)
    assert load_encoder(tmp_path / "split").sizes() == again.sizes()


def test_a_students_states_end_in_its_own_score():
    student = Student(variant("v1")).eval()
    waves_BT = tones(2, 122_880)
    last_BLD = states(StudentEncoder(student), waves_BT, 122_880, 122_880).layers[-1]
    head = student.head
    logits_B = head.pool(head.norm_output(last_BLD.transpose(1, 2)).transpose(1, 2))
    # In eval mode PyTorch's encoder takes another kernel: rounding of a few layers.
    torch.testing.assert_close(logits_B, student.logits(waves_BT), rtol=1e-4, atol=1e-5)


def test_fresh_weights_have_the_same_shapes_and_follow_the_seed(tmp_path):
    write_checkpoint(tmp_path, "whisper")
    encoder = load_encoder(tmp_path)
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(encoder.fresh().state_dict())
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(made[0][name], made[1][name]) and made[0][name].shape == tensor.shape
    name = "encoder.layers.0.fc1.weight"
    assert not torch.equal(made[0][name], encoder.state_dict()[name])


def test_bad_checkpoints_are_told_by_name(tmp_path):
    write_checkpoint(tmp_path, "whisper")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"encoder_ffn_dim": 49}))
    with pytest.raises(UserError, match=r"fc1.*\(48,\d* .*says \(49,"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UserError, match="'bert' is no encoder of speech"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(name for name in tensors if name.endswith("encoder.layers.1.fc2.bias"))
    safetensors.torch.save_file(tensors | {name: tensors[name] * torch.nan}, path)
    with pytest.raises(UserError, match=r"fc2.bias.* not finite"):
        load_encoder(tmp_path)
    safetensors.torch.save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(UserError, match=r"layers\.1\.fc2\.bias': nothing there"):
        load_encoder(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model.safetensors: damaged"):
        load_encoder(tmp_path)
    with pytest.raises(UserError, match="no encoder: give"):
        load_encoder(tmp_path / "nothing")


def test_a_front_end_gives_the_states_of_its_layer(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "whisper-tiny-en", "whisper")
    monkeypatch.setenv("SPEECH_WEIGHTS", str(tmp_path))
    front_end = load_front_end("whisper-tiny-en-l2")
    encoder, waves_BT = load_encoder("whisper-tiny-en"), tones(2, 8000)
    found = front_end.frames(waves_BT)
    published = states(encoder, waves_BT, 8000, 8000).layers[2]
    assert found.shape == (2, 384, 32) and not found[:, 25:].any()
    # One clip at a time and two together: rounding of the matrix products.
    torch.testing.assert_close(found[:, :25], published, rtol=1e-4, atol=1e-5)
    assert front_end.weights_sha256 == front_end_sha256("whisper-tiny-en-l2")
    with pytest.raises(UserError, match="layer 4, but it has 2"):
        load_front_end("whisper-tiny-en-l4")
