"""Model folders: a round trip is exact, and anything that does not fit is an error that names it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_config, load_pretrained, save_pretrained


@pytest.fixture
def folder(tmp_path, make_model):
    save_pretrained(make_model(), tmp_path, bos_token_id=1, eos_token_id=[2, 8], pad_token_id=3)
    return tmp_path


def change_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"qk_norm": True, "head_dim": 16}])
def test_a_round_trip_is_exact(tmp_path, make_model, changes):
    model = make_model(**changes)
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_what_a_folder_holds(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 3
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 8]
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights  # the head is the embedding
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_weights_of_a_sharded_model_are_taken_from_outside(tmp_path, make_model):
    model, other = make_model(), make_model(seed=1)
    save_pretrained(model, tmp_path, weights=other.state_dict())
    assert torch.equal(load_pretrained(tmp_path).head_weight, other.head_weight)


def test_weights_open_in_another_precision(folder):
    assert {p.dtype for p in load_pretrained(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_missing_extra_and_misshapen_weights_are_listed(folder):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
        weights["model.norm.weight"] = torch.zeros(33)

    change_weights(folder, change)
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert "3 keys" in str(error.value) and str(folder) in str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight (48, 32)" in str(error.value)
    assert "not in this model: model.layers.2.mlp.up_proj.weight (48, 32)" in str(error.value)
    assert "shape of model.norm.weight: found (33,), expected (32,)" in str(error.value)


def test_a_file_of_2_layers_is_not_loaded_into_40(folder):
    change_config(folder, num_hidden_layers=40)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.(.|\n)*and 322 more"):
        load_pretrained(folder)  # 38 layers of 9 weights, 20 of them shown


def test_a_tied_head_stored_twice_is_fine_when_equal(folder):
    expected = load_pretrained(folder).head_weight
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert torch.equal(load_pretrained(folder).head_weight, expected)


def test_a_tied_head_stored_twice_is_refused_when_different(folder):
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="not in this model: lm_head.weight"):
        load_pretrained(folder)


def test_rotary_tables_of_old_exports_are_let_pass(folder):
    change_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load_pretrained(folder).config.n_layers == 2


def test_pickles_are_not_opened(folder, make_model):
    (folder / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing; weights are read from safetensors"):
        load_pretrained(folder)


def test_a_truncated_file_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_pretrained(folder)


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn' is not supported"),
    ],
)
def test_networks_that_are_not_these_are_refused(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_config(folder)


def test_a_broken_config_is_named(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="config.json: the key '[a-z_]+' is missing"):
        load_config(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json: "):
        load_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="not a model folder"):
        load_config(folder)
