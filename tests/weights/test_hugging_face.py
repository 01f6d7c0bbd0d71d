"""Against transformers itself: tiny random models, logits in both directions, and what it computes differently."""

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoTokenizer, BltConfig, BltForCausalLM
from transformers.utils import logging as transformers_logging

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.model import BLTModel, BLTSettings, ByteLM, ByteLMSettings
from bytelatent.model.settings import CrossAttentionSettings, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights import FORMATS, Config, load, open_pretrained
from bytelatent.weights.hugging_face import read_model
from tests.model.tiny import make, tiny_blt, tiny_blt_settings, tiny_byte_lm

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = st.sampled_from([{"rope_type": "default"}, {"rope_type": "llama3", **LLAMA3}])
EXAMPLES = settings(max_examples=20, deadline=None)


@st.composite
def stack_configs(draw: st.DrawFn, dim: int, heads: tuple[int, int] | None = None) -> dict[str, Any]:
    """One part's configuration in transformers' own words."""
    num_heads, num_kv_heads = heads or draw(head_counts(dim))
    return {
        "hidden_size": dim,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": draw(st.sampled_from([dim, 2 * dim + 3, 8 * dim // 3, 48])),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "rope_parameters": {"rope_theta": draw(st.sampled_from([100.0, 10_000.0, 500_000.0])), **draw(ROPES)},
    }


@st.composite
def head_counts(draw: st.DrawFn, dim: int) -> tuple[int, int]:
    heads = draw(st.sampled_from([n for n in (1, 2, 4) if dim % (2 * n) == 0]))
    return heads, draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))


@st.composite
def configs(draw: st.DrawFn) -> BltConfig:
    k, dim = draw(st.integers(1, 4)), draw(st.sampled_from([8, 16]))
    middle = draw(st.sampled_from([k * dim, 24]))
    heads = draw(head_counts(dim))
    encoder = draw(stack_configs(dim, heads))
    return BltConfig(
        patching_threshold=5.0,  # other tests choose it
        max_patch_length=None,
        local_attention_window_len=draw(st.none() | st.integers(2, 12)),
        cross_attn_k=k,
        encoder_hash_byte_group_size=draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)),
        encoder_hash_byte_group_vocab=101,
        encoder_hash_byte_group_nb_functions=draw(st.integers(1, 3)),
        use_cache=False,
        patcher_config={**draw(stack_configs(16)), "sliding_window": draw(st.none() | st.integers(2, 12))},
        encoder_config={**encoder, "cross_attn_k": k, "cross_attn_all_layers": encoder["num_hidden_layers"] == 1},
        decoder_config={
            **draw(stack_configs(dim, heads)),
            "cross_attn_k": k,
            "hidden_size_global": middle,
            "cross_attn_all_layers": draw(st.booleans()),
        },
        global_config=draw(stack_configs(middle)),
    )


def random_model(config: BltConfig, seed: int) -> Any:
    """With random norms, too, which would otherwise be ones."""
    torch.manual_seed(seed)
    model = BltForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def random_rows(seed: int, sizes: tuple[int, ...] = (30, 17, 30, 5)) -> Tensor:
    """Documents that begin with BOS, padded at their right with -1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.full([len(sizes), max(sizes)], -1)
    for row, size in zip(rows, sizes, strict=True):
        row[:size] = torch.randint(4, 260, [size], generator=generator)
        row[0] = 1
    return rows


def random_lengths(rows: Tensor, seed: int) -> Tensor:
    """Patch lengths that cover the ids and the one to come; BOS stands alone."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.zeros(len(rows), rows.shape[1] + 1, dtype=torch.long)
    for row, out in zip(rows, lengths, strict=True):
        starts = torch.rand(int((row >= 0).sum()) + 1, generator=generator) < 0.4
        starts[:2] = True
        places = [*starts.nonzero()[:, 0].tolist(), len(starts)]
        for number, (begin, end) in enumerate(itertools.pairwise(places)):
            out[number] = end - begin
    return lengths


def their_logits(model: Any, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Of transformers, on right-padded rows; zero where there is padding."""
    padded = rows < 0
    with torch.no_grad():
        ids, mask = rows.masked_fill(padded, 0), (~padded).long()
        logits = model(ids, attention_mask=mask, patch_lengths=lengths, use_cache=False).logits
    return logits.masked_fill(padded.unsqueeze(-1), 0.0)


def between(entropies: Tensor) -> float:
    """A threshold in the widest gap between the middle entropies, so that rounding decides nothing."""
    middle = entropies.flatten().sort().values[len(entropies.flatten()) // 4 : -len(entropies.flatten()) // 4]
    widest = int(middle.diff().argmax())
    return float(middle[widest] + middle[widest + 1]) / 2


def real_entropies(byte_lm: ByteLM, rows: Tensor) -> Tensor:
    from bytelatent.model import pack_rows

    return byte_lm.entropies(pack_rows([row[row >= 0] for row in rows]))


@EXAMPLES
@given(config=configs(), seed=st.integers(0, 1000))
def test_theirs_here(config: BltConfig, seed: int) -> None:
    rows = random_rows(seed)
    lengths = random_lengths(rows, seed)
    model = random_model(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        byte_lm = load(folder).byte_lm
        assert byte_lm is not None
        threshold = between(real_entropies(byte_lm, rows))
        model.config.patching_threshold = model.model.config.patching_threshold = threshold
        model.save_pretrained(folder)
        ours = BLT.from_pretrained(folder, device="cpu")
    assert ours.patching == PatchSettings(mode="entropy", threshold=threshold)
    torch.testing.assert_close(ours.logits(rows, lengths), their_logits(model, rows, lengths), **TOLERANCE)
    torch.testing.assert_close(ours.logits(rows), their_logits(model, rows), **TOLERANCE)


@st.composite
def our_settings(draw: st.DrawFn) -> tuple[BLTSettings, ByteLMSettings]:
    """Those that transformers can express, read off a configuration of its own."""
    values = draw(configs()).to_dict()
    model = read_model(values, "").model
    patcher = {**values, "encoder_config": values["patcher_config"]}["encoder_config"]
    byte_lm = ByteLMSettings(
        dim=patcher["hidden_size"],
        num_layers=patcher["num_hidden_layers"],
        num_heads=patcher["num_attention_heads"],
        num_kv_heads=patcher["num_key_value_heads"],
        window=patcher["sliding_window"],
        rope_theta=patcher["rope_parameters"]["rope_theta"],
        multiple_of=draw(st.sampled_from([1, 8, 256])),
        ffn_dim_multiplier=draw(st.sampled_from([1.0, 1.3])),
    )
    if draw(st.booleans()):
        model = model.model_copy(update={"ngram_hash": None})
    return model, byte_lm


@EXAMPLES
@given(shapes=our_settings(), seed=st.integers(0, 1000))
def test_ours_there(shapes: tuple[BLTSettings, ByteLMSettings], seed: int) -> None:
    rows = random_rows(seed)
    lengths = random_lengths(rows, seed)
    model, byte_lm = make(shapes[0], seed), make(shapes[1], seed + 1)
    patching = PatchSettings(mode="entropy", threshold=between(real_entropies(byte_lm, rows)))
    ours = BLT(model, Config(model=model.settings, context=64, patching=patching), byte_lm)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(Path(folder) / "hf", format="hf")
        theirs, report = BltForCausalLM.from_pretrained(Path(folder) / "hf", output_loading_info=True)
        again = open_pretrained(Path(folder) / "hf")
        assert {name: tensor.load() for name, tensor in again.tensors.items()}.keys() == model.state_dict().keys()
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (again.config.model, again.config.patching, again.config.context) == (model.settings, patching, 64)
    torch.testing.assert_close(their_logits(theirs, rows, lengths), ours.logits(rows, lengths), **TOLERANCE)
    torch.testing.assert_close(their_logits(theirs, rows), ours.logits(rows), **TOLERANCE)


def write_theirs(folder: Path, **changes: Any) -> Any:
    """A small model of transformers in a folder; `encoder_config__num_hidden_layers=2` reaches into a part."""
    stack = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    values: dict[str, Any] = {
        "patching_threshold": 5.0,
        "encoder_hash_byte_group_vocab": 53,
        "local_attention_window_len": 6,
        "use_cache": False,
        "patcher_config": {**stack, "sliding_window": 6},
        "encoder_config": {**stack},
        "decoder_config": {**stack, "hidden_size_global": 32},
        "global_config": {**stack, "hidden_size": 32},
    }
    for key, value in changes.items():
        part, _, inner = key.rpartition("__")
        (values[part] if part else values)[inner] = value
    model = random_model(BltConfig(**values), seed=1)
    model.save_pretrained(folder)
    return model


def test_generation_works_there(tmp_path: Path) -> None:
    """Their cache fails; what we write does not use it. Bytes go through their tokenizer unchanged."""
    patching = PatchSettings(mode="entropy", threshold=5.0)
    model, byte_lm = tiny_hugging_face_blt(), tiny_byte_lm(window=6)
    ours = BLT(model, Config(model=model.settings, context=64, patching=patching), byte_lm)
    ours.save_pretrained(tmp_path / "hf", format="hf")
    theirs = BltForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = 'bytes: \u00e9\u4f60\U0001f600 \x00\x7f <s></s> <boe> "\n\t'
    inputs = tokenizer(text, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [1, *(byte + 4 for byte in text.encode())]
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == text
    out = theirs.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=8)[0, 4:].tolist()
    ids = [1, *(byte + 4 for byte in b"The")]
    for chosen in out:
        assert chosen == int(ours.logits(torch.tensor([ids]))[0, -1].argmax())
        ids.append(chosen)
    assert len(out) > 0


def tiny_hugging_face_blt(**changes: Any) -> BLTModel:
    """Ours, with as many cross-attention heads as the local models have."""
    return tiny_blt(seed=3, window=6, cross_attention=CrossAttentionSettings(k=2, num_heads=2), **changes)


# What transformers computes differently: each test describes how, and checks both.


def test_they_pool_again_after_each_encoder_layer(tmp_path: Path) -> None:
    """The published model pools once and refines; theirs keeps only what the last layer's pooling gives."""
    model = write_theirs(tmp_path, encoder_config__num_hidden_layers=2, encoder_config__cross_attn_all_layers=True)
    with pytest.raises(UserError, match=r"encoder_config.cross_attn_all_layers is true with 2 layers"):
        load(tmp_path)
    rows = random_rows(0)
    lengths = random_lengths(rows, 0)
    theirs = their_logits(model, rows, lengths)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder_config"]["cross_attn_all_layers"] = False
    found = read_model(config, "")
    settings, patching = found.model, found.patching
    assert isinstance(settings, BLTSettings)
    only_last = BLTModel(settings)
    state = {name: model.state_dict()[their_name(name)] for name in only_last.state_dict()}
    only_last.load_state_dict(state)
    ours = BLT(only_last, Config(model=settings, context=64, patching=patching), None)
    torch.testing.assert_close(ours.logits(rows, lengths), theirs, **TOLERANCE)
    published = tiny_blt(cross_attention=CrossAttentionSettings(k=2, num_heads=2, all_layers_encoder=True))
    ours = BLT(published, Config(model=published.settings, context=64, patching=patching), tiny_byte_lm())
    with pytest.raises(UserError, match=r"hf: cross_attention.all_layers_encoder with several encoder layers"):
        ours.save_pretrained(tmp_path / "new", format="hf")
    assert not (tmp_path / "new").exists()


def their_name(name: str) -> str:
    [theirs] = FORMATS["hf"].names(tiny_blt_settings())[name]
    return theirs.replace("local_encoder.cross_attn_layers.0", "local_encoder.cross_attn_layers.1")


def test_they_split_long_patches_without_the_id_to_come(tmp_path: Path) -> None:
    """Their lengths sum to N, so a patch that is full at the last id is not closed there; all other ids agree."""
    model = write_theirs(tmp_path, patching_threshold=100.0, max_patch_length=3)
    ours = BLT.from_pretrained(tmp_path, device="cpu")
    assert ours.patching == PatchSettings(mode="entropy", threshold=100.0, max_patch_length=3)
    rows = random_rows(0, sizes=(10,))  # BOS, then three full patches of three
    found, theirs = ours.logits(rows), their_logits(model, rows)
    torch.testing.assert_close(found[:, :-1], theirs[:, :-1], **TOLERANCE)
    assert (found[:, -1] - theirs[:, -1]).abs().max() > 1e-2
    published = torch.tensor([[1, 3, 3, 3, 1]])  # N + 1
    torch.testing.assert_close(found, their_logits(model, rows, published), **TOLERANCE)


def test_they_take_the_first_patch_for_bos_alone(tmp_path: Path) -> None:
    """A byte reads the newest patch that is closed; theirs counts from the first patch's end, wherever that is."""
    model = write_theirs(tmp_path)
    ours = BLT.from_pretrained(tmp_path, device="cpu")
    rows = random_rows(0, sizes=(9,))
    lengths = torch.tensor([[3, 4, 3]])
    assert (ours.logits(rows, lengths) - their_logits(model, rows, lengths)).abs().max() > 1e-2
    alone = torch.tensor([[1, 2, 4, 3]])
    torch.testing.assert_close(ours.logits(rows, alone), their_logits(model, rows, alone), **TOLERANCE)


@pytest.mark.parametrize("mode", ["space", "static", "byte", "bpe"])
def test_they_make_each_byte_a_patch_in_all_other_modes(mode: str, tmp_path: Path) -> None:
    model = write_theirs(tmp_path, patching_mode=mode)
    ours = BLT.from_pretrained(tmp_path, device="cpu")
    assert ours.patching == PatchSettings(mode="byte")
    rows = random_rows(0)
    torch.testing.assert_close(ours.logits(rows), their_logits(model, rows), **TOLERANCE)


def test_a_model_without_a_patcher(tmp_path: Path) -> None:
    """It takes the patches from outside; here the byte LM can be named."""
    model = write_theirs(tmp_path / "a", patch_in_forward=False)
    ours = BLT.from_pretrained(tmp_path / "a", device="cpu")
    assert ours.entropy_model is None
    rows = random_rows(0)
    lengths = random_lengths(rows, 0)
    torch.testing.assert_close(ours.logits(rows, lengths), their_logits(model, rows, lengths), **TOLERANCE)
    with pytest.raises(UserError, match="patching mode 'entropy' needs the byte LM"):
        ours.save_pretrained(tmp_path / "b", format="hf")


def test_older_files(tmp_path: Path) -> None:
    """Before version 5 theta stood alone; a file may also leave out what transformers knows by itself."""
    write_theirs(tmp_path, local_attention_window_len=512)
    now = load(tmp_path).config
    values = json.loads((tmp_path / "config.json").read_text())
    for part in ("patcher", "encoder", "decoder", "global"):
        inner = values[f"{part}_config"]
        inner["rope_theta"] = inner.pop("rope_parameters")["rope_theta"]
        inner["rope_scaling"] = None
    for key in ("local_attention_window_len", "cross_attn_k", "encoder_hash_byte_group_size", "patch_in_forward"):
        values.pop(key)
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load(tmp_path).config == now


@pytest.mark.parametrize("part", ["", "patcher_config", "encoder_config", "decoder_config", "global_config"])
def test_defaults_are_those_of_transformers(part: str) -> None:
    from bytelatent.weights.hugging_face import DEFAULTS

    values = BltConfig().to_dict()
    for key, value in DEFAULTS[part].items():
        theirs = (values[part] if part else values)[key]
        if value is not None:
            assert theirs == value, key
        elif key == "intermediate_size":
            assert theirs == 8 * values[part]["hidden_size"] // 3


def edit(folder: Path, key: str, value: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    part, _, inner = key.rpartition(".")
    (values[part] if part else values)[inner] = value
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tie_word_embeddings", True, "tie_word_embeddings is True; only False"),
        ("vocab_size", 300, "vocab_size is 300; only 260"),
        ("encoder_config.cross_attn_k", 3, r"encoder_config.cross_attn_k is 3; only 2"),
        ("decoder_config.cross_attn_k", 3, r"decoder_config.cross_attn_k is 3; only 2"),
        ("decoder_config.hidden_size_global", 48, r"hidden_size_global is 48; only 32"),
        ("decoder_config.num_attention_heads", 4, r"decoder_config.num_attention_heads is 4; only 2"),
        ("decoder_config.num_key_value_heads", 1, r"decoder_config.num_key_value_heads is 1; only 2"),
        ("global_config.hidden_act", "gelu", r"global_config.hidden_act is 'gelu'; only 'silu'"),
        ("encoder_config.head_dim", 4, r"encoder_config.head_dim is 4; only 8"),
        (
            "patcher_config.rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1.0},
            "rope_type is 'linear'; only 'default'",
        ),
        ("patch_size", None, "patch_size is None; transformers then makes each byte a patch"),
        ("patching_threshold", None, "needs a threshold"),
        ("global_config.num_attention_heads", 5, "global_config.head_dim is 16; only 6"),
        ("encoder_hash_byte_group_nb_functions", 2, r"encoder_hash_tok_embedding.weight is \[318, 16\]"),
        ("global_config.num_hidden_layers", 2, r"missing model.global_transformer.layers.1"),
        ("patcher_config.num_hidden_layers", 2, r"missing model.patcher.layers.1"),
        ("patch_in_forward", False, r"unknown model.patcher"),
    ],
)
def test_refused_by_name(key: str, value: Any, message: str, tmp_path: Path) -> None:
    write_theirs(tmp_path)
    edit(tmp_path, key, value)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "patching", "message"),
    [
        (
            {},
            PatchSettings(mode="space"),
            "patching modes entropy, byte, not 'space'; use native or meta",
        ),
        ({}, PatchSettings(mode="static", patch_size=4), "not 'static, 4 ids each'"),
        ({}, PatchSettings(threshold=0.1, monotonicity=True), "not 'rise of the entropy, threshold 0.1 nats'"),
        ({}, PatchSettings(threshold=0.1, threshold_add=0.2), "not 'entropy, threshold 0.1 nats, rise above 0.2'"),
        (
            {"encoder": StackSettings(dim=16, num_layers=1, num_heads=2, window=8, multiple_of=8)},
            None,
            r"hf: .* one local_attention_window_len for encoder.window, decoder.window, .* differ \(\[8, 6\]\)",
        ),
        (
            {"encoder": StackSettings(dim=16, num_layers=1, num_heads=4, window=6, multiple_of=8)},
            None,
            r"hf: .* one encoder_config.num_attention_heads for .*, cross_attention.num_heads, .* differ \(\[4, 2\]\)",
        ),
        (
            {"decoder": StackSettings(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, window=6, multiple_of=8)},
            None,
            r"one decoder_config.num_key_value_heads for .*, cross_attention.kv_heads, .* differ \(\[1, 2\]\)",
        ),
    ],
)
def test_what_they_have_no_room_for(
    changes: dict[str, Any], patching: PatchSettings | None, message: str, tmp_path: Path
) -> None:
    model = tiny_hugging_face_blt(**changes)
    config = Config(model=model.settings, context=64, patching=patching or PatchSettings(threshold=5.0))
    with pytest.raises(UserError, match=message):
        BLT(model, config, tiny_byte_lm()).save_pretrained(tmp_path / "a", format="hf")
    assert list(tmp_path.iterdir()) == []


def test_shards(tmp_path: Path) -> None:
    """As they write them, and as they read ours."""
    model = write_theirs(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    whole, shards = load(tmp_path / "whole"), load(tmp_path / "shards")
    ours, theirs = whole.model.state_dict(), shards.model.state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    first = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    shutil.move(first, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="does not exist; the folder is not complete"):
        load(tmp_path / "shards")
