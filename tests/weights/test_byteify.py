"""Blocks of Llama, Mistral, Qwen2 and Qwen3: as transformers computes them, in a token LM and in a BLT around them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BltForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bytelatent import BLT
from bytelatent.commands.byteify import run
from bytelatent.commands.byteify_options import ByteifySettings
from bytelatent.errors import UserError
from bytelatent.inference import packed
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.step import PrefillDecoder
from bytelatent.model import ByteLM, ByteLMSettings, TokenLMSettings, add_patches, pack_rows
from bytelatent.patching import PatchSettings
from bytelatent.text.tokenizer import TOKENIZER, train_tokenizer
from bytelatent.weights import (
    Config,
    StoredModel,
    StoredTensor,
    blt_around,
    byteify,
    convert,
    load,
    open_pretrained,
    write_model,
)
from bytelatent.weights.llama import LlamaFormat
from tests.model.tiny import make, tiny_blt, tiny_byte_lm
from tests.weights.test_hugging_face import random_rows, their_logits

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "vocab_size": 300, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-4,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=SCALED, tie_word_embeddings=True)),
    "llama-wide-heads": (LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_attention_heads": 2}, head_dim=20)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, rope_parameters=SCALED, tie_word_embeddings=True)),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
IDS = torch.randint(4, 260, [40], generator=torch.Generator().manual_seed(5))


def theirs(name: str, folder: Path, config: Any = None) -> Any:
    """A random model of a family, with random norms and biases, saved in a folder."""
    kind, own = FAMILIES[name]
    torch.manual_seed(0)
    model = kind(config or own).eval()
    for key, weight in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    return model


def exact_norms(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes norms in float32 whatever the precision of the model."""
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):

            def forward(self: Any, x: Tensor) -> Tensor:
                return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

            monkeypatch.setattr(type(part), "forward", forward)


def byteified(folder: Path, **options: Any) -> Path:
    out = folder / "blt"
    run(ByteifySettings(source=str(folder), out=str(out), **{"local_dim": 16, "decoder_layers": 2, **options}))
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_block_is_that_of_transformers(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is the whole token LM, and its gradients."""
    model = theirs(name, tmp_path).to(dtype)
    exact_norms(model, monkeypatch)
    how = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    blt = BLT.from_pretrained(byteified(tmp_path), device="cpu")
    stack = blt.model.global_transformer.stack.to(dtype)
    hidden = torch.randn(30, SIZES["hidden_size"], dtype=dtype, generator=torch.Generator().manual_seed(1))
    position = torch.arange(30)
    mask = stack.mask(torch.zeros(30, dtype=torch.long), 1)
    rotary = stack.rotary(position)
    cos_sin = model.model.rotary_emb(hidden[None], position[None])
    with torch.no_grad():
        for own, their in zip(stack.blocks, model.model.layers, strict=True):
            expected = their(hidden[None], position_embeddings=cos_sin, position_ids=position[None])
            torch.testing.assert_close(own(hidden, rotary, mask), expected[0], **how)
            hidden = expected[0]

    found: Any = load(tmp_path).model.to(dtype)
    logits, expected = found(pack_rows([IDS])), model(IDS[None]).logits[0]
    torch.testing.assert_close(logits, expected.float(), atol=1e-5, rtol=1e-5)
    F.cross_entropy(found(pack_rows([IDS]))[:-1], IDS[1:]).backward()
    F.cross_entropy(model(IDS[None]).logits[0, :-1].float(), IDS[1:]).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    if model.config.tie_word_embeddings:  # ours has two
        found.embedding.weight.grad += found.output.weight.grad
    stored = StoredModel.of(found, Config(model=found.settings, context=40))
    own = replace(stored, tensors={name: StoredTensor.of(weight.grad) for name, weight in found.named_parameters()})
    for key, gradient in LlamaFormat().stored_tensors(own).items():
        if key in gradients:
            torch.testing.assert_close(gradient.load(), gradients[key], atol=2e-6, rtol=1e-4)


def test_windows_of_a_token_lm(tmp_path: Path) -> None:
    """Of all layers alike; a global transformer has none."""
    sliding = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 0}
    for name, config in (
        ("mistral", MistralConfig(**SIZES, sliding_window=7)),
        ("qwen2", Qwen2Config(**SIZES, **sliding)),
    ):
        model = theirs(name, tmp_path / name, config)
        found = load(tmp_path / name)
        assert isinstance(found.config.model, TokenLMSettings)
        assert found.config.model.window == 7
        with torch.no_grad():
            torch.testing.assert_close(found.model(pack_rows([IDS])), model(IDS[None]).logits[0], atol=1e-5, rtol=1e-5)
        with pytest.raises(UserError, match=r"source: '.*' sees a window of 7 tokens, and a global"):
            byteified(tmp_path / name)
    theirs("qwen2", tmp_path / "mixed", Qwen2Config(**SIZES, **{**sliding, "max_window_layers": 1}))
    with pytest.raises(UserError, match="sliding_window: some layers have it and others none"):
        load(tmp_path / "mixed")


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_token_lms_are_written_as_their_family(name: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(train_tokenizer([b"the cat sat on the mat"] * 9, 264))
    settings = open_pretrained_of(name, tmp_path / "source")
    model = make(settings)
    stored = replace(StoredModel.of(model, Config(model=settings, context=40)), tokenizer=tmp_path / "tokenizer.json")
    write_model(stored, tmp_path / "hf", "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(again).__name__.lower() == f"{name}forcausallm"
    with torch.no_grad():
        torch.testing.assert_close(again(IDS[None]).logits[0], model(pack_rows([IDS])), atol=1e-5, rtol=1e-5)
    convert(open_pretrained(tmp_path / "hf"), tmp_path / "back", "native")
    assert load(tmp_path / "back").config.model == settings
    assert (tmp_path / "back" / TOKENIZER).is_file()
    both = settings.model_copy(update={"attention_bias": True, "qk_norm": True})
    stored = replace(StoredModel.of(make(both), Config(model=both, context=40)), tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="hf: Qwen2 has biases and Qwen3 has q/k norms, and this model both"):
        write_model(stored, tmp_path / "no", "hf")


def open_pretrained_of(name: str, folder: Path) -> Any:
    theirs(name, folder)
    return open_pretrained(folder, weights=False).config.model


def test_of_shards_in_bfloat16(tmp_path: Path) -> None:
    """Each tensor of the blocks is taken bit for bit; the same seed gives the same new ones."""
    kind, config = FAMILIES["llama"]
    kind(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    before = open_pretrained(tmp_path).tensors
    byteified(tmp_path, hash_rows=4001).rename(tmp_path / "first")
    found = open_pretrained(tmp_path / "first").tensors
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    blocks = {name: tensor for name, tensor in before.items() if name.startswith("stack.blocks.")}
    for name, tensor in blocks.items():
        assert torch.equal(found[f"global_transformer.{name}"].load(), tensor.load()), name
    table = found["encoder.ngram_hash.tables.weight"].load().float()
    assert table.shape == (6 * 4001, 16)
    assert float(table.std()) == pytest.approx(0.25, rel=0.03)
    assert float(table.abs().max()) <= 0.75
    assert not torch.equal(table[:4001], table[4001:8002])
    for seed, same in ((0, True), (1, False)):
        again = open_pretrained(byteified(tmp_path, hash_rows=4001, seed=seed)).tensors
        for name in ("encoder.ngram_hash.tables.weight", "decoder.output.weight"):
            assert torch.equal(again[name].load(), found[name].load()) == same


def test_new_weights_fit_the_old_ones(tmp_path: Path) -> None:
    """Patches come in as large as token embeddings were, and the last norm is in the projection behind the blocks."""
    model = theirs("qwen2", tmp_path)
    folder = byteified(tmp_path)
    blt = BLT.from_pretrained(folder, device="cpu")
    model_of_bytes = blt.model
    ids = torch.randint(4, 260, [400], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        patches = model_of_bytes.encoder(add_patches(pack_rows([ids]), ids % 4 == 0))[1]
    size = float(patches.square().mean().sqrt())
    assert size == pytest.approx(float(model.model.embed_tokens.weight.detach().square().mean().sqrt()), rel=0.3)
    stored = open_pretrained(tmp_path)
    ones = {**stored.tensors, "norm.weight": StoredTensor.of(torch.ones(32))}
    plain = byteify(replace(stored, tensors=ones), blt.config)
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    to_keys = model_of_bytes.decoder.patch_to_keys.weight.detach()

    def first(keys: Tensor) -> Tensor:
        return F.rms_norm(keys.unflatten(1, (2, 16)), (16,), eps=1e-6)

    own = first(hidden @ to_keys.T)
    normed = F.rms_norm(hidden, (32,), model.model.norm.weight, 1e-4)
    expected = first(normed @ plain.tensors["decoder.patch_to_keys.weight"].load().T)
    torch.testing.assert_close(own, expected, atol=1e-3, rtol=1e-3)  # but for eps
    assert not torch.allclose(own, first(hidden @ plain.tensors["decoder.patch_to_keys.weight"].load().T), atol=1e-2)


@pytest.mark.parametrize(
    ("width", "layers", "expected"),
    [
        (1280, 24, (768, 2, 6)),
        (2048, 16, (1024, 2, 4)),
        (2560, 28, (1024, 3, 7)),
        (4096, 32, (1280, 4, 8)),
        (64, 2, (64, 1, 1)),
    ],
)
def test_sizes_that_nobody_chose(width: int, layers: int, expected: tuple[int, int, int]) -> None:
    """The paper's widths and k for its global transformers."""
    model = TokenLMSettings(dim=width, num_layers=layers, num_heads=width // 64, vocab_size=300)
    shape = blt_around(StoredModel(Config(model=model, context=9), {}, None, "", "x"), hash_rows=0)
    assert shape.cross_attention is not None
    assert (shape.encoder.dim, shape.cross_attention.k, shape.decoder.num_layers) == expected
    assert shape.ngram_hash is None
    assert shape.global_transformer.hidden_dim == model.hidden_dim


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_generation_is_the_forward_pass(name: str, tmp_path: Path) -> None:
    """Byte by byte, quantized, and from text to text."""
    theirs(name, tmp_path)
    folder = byteified(tmp_path)
    prompt = "The history of "
    for options in ({}, {"quantize": "int8"}):
        blt = BLT.from_pretrained(folder, device="cpu", dtype="float32", **options)
        made = blt.generate(prompt, max_new_bytes=40, temperature=0.0, return_log_probabilities=True)
        ids = torch.tensor([1, *(byte + 4 for byte in prompt.encode()), *made.ids])
        best = blt.logits(ids[None])[0].argmax(-1)
        assert ids[len(prompt) + 1 :].tolist() == best[len(prompt) : -1].tolist()


def test_kernels_take_the_options(tmp_path: Path) -> None:
    """The blocks that read prompts and whole texts on a GPU, in their plain form."""
    more = {"num_layers": 2, "attention_bias": True, "qk_norm": True, "rope_scaling": scaling(tmp_path)}
    model = make(ByteLMSettings(dim=32, num_heads=2, multiple_of=8, head_size=32, **more))
    assert isinstance(model, ByteLM)
    fast, slow = PrefillDecoder(model, None, None), Decoder(model, None, None)
    assert fast._prompt_model is not model
    torch.testing.assert_close(fast.prefill([IDS])[1], slow.prefill([IDS])[1], atol=1e-5, rtol=1e-5)
    stream = pack_rows([torch.cat([IDS, IDS, IDS, IDS[:8]])])
    with torch.no_grad():
        torch.testing.assert_close(packed.packed_form(model)(stream), model(stream), atol=1e-5, rtol=1e-5)


def scaling(folder: Path) -> Any:
    theirs("llama", folder)
    return open_pretrained(folder, weights=False).config.model.rope_scaling


def test_other_formats(tmp_path: Path) -> None:
    """BltForCausalLM has the rotary embedding of Llama 3.1, but neither biases nor norms nor wider heads."""
    theirs("llama", tmp_path / "llama")
    folder = byteified(tmp_path / "llama", patching="byte")
    convert(open_pretrained(folder), tmp_path / "hf", "hf")
    rows = random_rows(0)
    their = their_logits(BltForCausalLM.from_pretrained(tmp_path / "hf"), rows)
    torch.testing.assert_close(BLT.from_pretrained(folder, device="cpu").logits(rows), their, atol=1e-4, rtol=0)
    assert load(tmp_path / "hf").config.model.plain() == load(folder).config.model.plain()
    for name, format, line in (
        ("llama", "meta", "meta: the format has no key for global_transformer.rope_scaling"),
        ("llama-wide-heads", "hf", r"hf: the format has no key for global_transformer.head_size \(20\); use native"),
        ("qwen2", "hf", r"hf: the format has no key for global_transformer.attention_bias \(True\); use native"),
        ("qwen3", "hf", r"hf: the format has no key for global_transformer.head_size"),
    ):
        if name != "llama":
            theirs(name, tmp_path / name)
            folder = byteified(tmp_path / name, patching="byte")
        else:
            folder = tmp_path / "llama" / "blt"
        with pytest.raises(UserError, match=line):
            convert(open_pretrained(folder), tmp_path / "no", format)


def test_patching_settings(tmp_path: Path) -> None:
    theirs("llama", tmp_path)
    write_model(
        StoredModel.of(tiny_byte_lm(), Config(model=tiny_byte_lm().settings, context=64)), tmp_path / "lm", "native"
    )
    own = tiny_blt()
    patching = PatchSettings(threshold=1.5, reset_at_newline=True)
    config = Config(model=own.settings, context=64, patching=patching)
    BLT(own, config, tiny_byte_lm(seed=3)).save_pretrained(tmp_path / "other")
    lm, other = {"entropy_model": str(tmp_path / "lm")}, {"entropy_model": str(tmp_path / "other")}

    def found(**options: Any) -> Any:
        shutil.rmtree(tmp_path / "blt", ignore_errors=True)
        return load(byteified(tmp_path, **options))

    assert found().config.patching == PatchSettings(mode="space")
    assert found(patching="static", patch_size=4).config.patching == PatchSettings(mode="static", patch_size=4)
    taken = found(**other)
    assert taken.config.patching == patching
    assert torch.equal(taken.byte_lm.output.weight, tiny_byte_lm(seed=3).output.weight)
    assert found(**other, threshold=2.0).config.patching == patching.model_copy(update={"threshold": 2.0})
    assert found(**lm, threshold=2.0).config.patching == PatchSettings(threshold=2.0)
    for options, line in (
        (lm, r"threshold: '.*lm' states none; find one, and give it as --threshold: blt calibrate TEXT --model"),
        (
            {"patching": "entropy"},
            "entropy_model: patching 'entropy' needs a byte LM; name one",
        ),
        ({**other, "patching": "space"}, "entropy_model: patching 'space' reads no entropies"),
        ({"patching": "static"}, "--patching: mode 'static' needs"),
        ({"threshold": 1.0}, "--patching: threshold belongs to mode 'entropy', not to 'space'"),
    ):
        with pytest.raises(UserError, match=line):
            byteified(tmp_path, **options)


def test_what_is_refused(tmp_path: Path) -> None:
    gemma = GemmaForCausalLM(GemmaConfig(**{**SIZES, "head_dim": 8}))
    gemma.save_pretrained(tmp_path / "gemma")
    line = "holds a model of transformers' type 'gemma'; known here are blt, llama, mistral, qwen2, qwen3"
    with pytest.raises(UserError, match=line):
        byteified(tmp_path / "gemma")
    own = tiny_blt()
    BLT(own, Config(model=own.settings, context=9, patching=PatchSettings(mode="space")), None).save_pretrained(
        tmp_path / "own"
    )
    with pytest.raises(UserError, match=r"source: '.*own' holds a BLT; name a token LM: a Llama or a Qwen"):
        byteified(tmp_path / "own")
    theirs("llama", tmp_path / "llama")
    config = tmp_path / "llama" / "config.json"
    values = json.loads(config.read_text())
    for change, line in (
        ({"attention_bias": True}, "attention_bias is True; only False is known here"),
        ({"mlp_bias": True}, "mlp_bias is True; only False is known here"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; only 'default' and 'llama3' are known here"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "lacks low_freq_factor, which rope_type",
        ),
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is known here"),
        ({"head_dim": "8"}, "head_dim is '8'; it should be a number"),
        ({"head_dim": 7}, "head_size: Input should be a multiple of 2"),
    ):
        config.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=line):
            open_pretrained(tmp_path / "llama")
