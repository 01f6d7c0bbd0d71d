"""Sequences in rows: greedy bytes are those of the plain forward pass, alone or among any others."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference import Continuation, Decoder, Engine, Sampling, prompt_ids
from bytelatent.inference.settings import MAX_NEW_BYTES
from bytelatent.inference.step import CapturedSlots, supports
from bytelatent.inference.step import step as step_module
from bytelatent.inference.step.cuda_graph import SideStream
from bytelatent.inference.step.step import BLTStep
from bytelatent.inference.utf8 import state_after
from bytelatent.model import ByteLM
from bytelatent.model.settings import CrossAttentionSettings, NgramHashSettings, StackSettings
from bytelatent.patching import MODES, PatchSettings
from bytelatent.vocab import EOS, NEWLINE, decode
from tests.inference.test_decoder import full_logits
from tests.model.tiny import tiny_blt, tiny_byte_lm

PROMPTS = ["The", "", "a longer prompt than the others", "it", "The"]
GREEDY = Sampling(temperature=0)


def wide_blt(seed: int, **changes: Any) -> Any:
    """One whose heads the kernels take: of 16."""
    local = StackSettings(dim=32, num_layers=2, num_heads=2, num_kv_heads=1, multiple_of=8, window=7)
    values: dict[str, Any] = {
        "encoder": local,
        "global_transformer": StackSettings(dim=32, num_layers=2, num_heads=2, multiple_of=8),
        "decoder": local,
        "cross_attention": CrossAttentionSettings(k=2, num_heads=2, num_kv_heads=1),
        "ngram_hash": NgramHashSettings(sizes=[3, 5], num_functions=2, vocab_size=53),
    }
    return tiny_blt(seed, **values | changes)


EVERY = CrossAttentionSettings(k=3, num_heads=2, all_layers_encoder=True, all_layers_decoder=False)
PATCHINGS: dict[str, PatchSettings] = {
    "entropy": PatchSettings(threshold=5.12),
    "split": PatchSettings(threshold=5.3, max_patch_length=3),
    "rises": PatchSettings(threshold=0.0, monotonicity=True),
    "all layers": PatchSettings(mode="space"),
    "lines": PatchSettings(threshold=5.12, reset_at_newline=True),
    "joined": PatchSettings(mode="static", patch_size=3),
    "added where patches close": PatchSettings(threshold=5.12),
    "static": PatchSettings(mode="static", patch_size=3),
}
CHANGES: dict[str, dict[str, Any]] = {
    "all layers": {"cross_attention": EVERY, "ngram_hash": None},
    "joined": {"cross_attention": None, "joined_bytes": 4},
    "added where patches close": {"cross_attention": None, "added_to": "closing"},
}
OTHERS = ["lines", "joined", "added where patches close"]
NAMES = ["byte LM", *(name for name in PATCHINGS if name not in OTHERS)]


def decoder_of(name: str, seed: int = 0) -> Decoder:
    """A new one, always of the same weights."""
    if name == "byte LM":
        return Decoder(tiny_byte_lm(seed, dim=32, window=6), None, None)
    byte_lm = tiny_byte_lm(seed, dim=32, window=6) if PATCHINGS[name].mode == "entropy" else None
    model = wide_blt(seed, **CHANGES.get(name, {}))
    if name == "lines":  # it writes many
        model.decoder.output.weight.data[NEWLINE] *= 4
    return Decoder(model, PATCHINGS[name], byte_lm)


@cache
def shared_decoder(name: str, seed: int = 0) -> Decoder:
    """One for many examples, none of which changes it."""
    return decoder_of(name, seed)


def engine_of(decoder: Decoder, kind: str, batch_size: int) -> Engine:
    """Plain rows; the fast ones as they run on a CPU; the same where the global transformer runs seldom, for few; as
    on a GPU, where the decoder does not wait for the byte LM; and where others do not wait for the global one."""
    if kind == "plain":
        return Engine.plain(decoder, batch_size)
    assert supports(decoder.model, decoder.byte_lm)
    slots = CapturedSlots(decoder, batch_size, **FAST[kind])
    if isinstance(slots.step, BLTStep):
        slots.step.assumes_open |= kind in ASSUMING
    return Engine(decoder, slots, batch_size)


FAST: dict[str, dict[str, Any]] = {
    "fast": {},
    "fast, seldom": {"quorum": 0.7, "max_closing": 1},
    "fast, few": {"max_closing": 2},
    "assuming": {},
    "assuming, seldom": {"quorum": 0.6},
    "beside": {"beside": True},
    "beside, seldom": {"beside": True, "quorum": 0.6, "max_closing": 2},
}
ASSUMING = ["assuming", "assuming, seldom"]
KINDS = ["plain", *(kind for kind in FAST if kind != "beside")]  # "beside, seldom" shows as much


@cache
def slow_greedy(name: str, prompt: str, count: int) -> list[int]:
    """The likeliest byte again and again, by the full forward pass."""
    decoder = decoder_of(name)
    ids = prompt_ids(prompt)
    new: list[int] = []
    while len(new) < count and (not new or new[-1] != EOS):
        last = full_logits(decoder, [ids])[0][-1]
        last[[0, 1, 3]] = -torch.inf
        new.append(int(last.argmax()))
        ids = torch.cat([ids, torch.tensor(new[-1:])])
    return new


def generated(engine: Engine, prompts: list[str], count: int, sampling: Sampling = GREEDY) -> list[Continuation]:
    asked = [engine.submit(prompt_ids(prompt), sampling, count)[0] for prompt in prompts]
    engine.run()
    assert all(continuation.ended for continuation in asked)
    return asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_bytes(name: str, kind: str, batch_size: int) -> None:
    found = generated(engine_of(decoder_of(name), kind, batch_size), PROMPTS, 20)
    for prompt, continuation in zip(PROMPTS, found, strict=True):
        assert continuation.ids == slow_greedy(name, prompt, 20)
        assert len(continuation.log_probabilities) == len(continuation.ids)
    assert found[0].ids == found[4].ids


@pytest.mark.parametrize("kind", ["fast, seldom", "assuming"])
@pytest.mark.parametrize("name", OTHERS)
def test_greedy_bytes_of_other_models(name: str, kind: str) -> None:
    """Plain slots are those of `Decoder`, whose own tests try such models."""
    decoder, prompts = decoder_of(name), ["The", "two\nlines", "it"]
    found = generated(engine_of(decoder, kind, 2), prompts, 20)
    assert [one.ids for one in found] == [slow_greedy(name, prompt, 20) for prompt in prompts]
    assert name != "lines" or {NEWLINE} < set(found[0].ids)


@cache
def alone(prompt: tuple[int, ...], temperature: float, seed: int, max_new_bytes: int) -> Continuation:
    engine = Engine.plain(shared_decoder("entropy", seed=1), 1)
    [found] = engine.submit(torch.tensor(prompt), Sampling(temperature=temperature, seed=seed), max_new_bytes)
    engine.run()
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(data=st.data())
def test_rows_are_independent(kind: str, data: st.DataObject) -> None:
    """Sequences join and leave at any time; each has the bytes and log-probabilities that it has alone."""
    engine = engine_of(shared_decoder("entropy", seed=1), kind, data.draw(st.integers(1, 4)))
    asked: list[Continuation] = []
    for number in range(data.draw(st.integers(1, 7))):
        prompt = data.draw(st.sampled_from(PROMPTS))
        sampling = Sampling(temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=number % 3)
        asked += engine.submit(
            prompt_ids(prompt), sampling, data.draw(st.integers(1, 15)), data.draw(st.integers(1, 2))
        )
        for _ in range(data.draw(st.integers(0, 8))):
            engine.advance()
        if data.draw(st.integers(0, 3)) == 0:
            engine.cancel(data.draw(st.sampled_from(asked)))
    engine.run()
    for continuation in asked:
        drawn = continuation.sampling
        alone_one = alone(
            tuple(continuation.prompt.tolist()), drawn.temperature, drawn.seed, continuation.max_new_bytes
        )
        if continuation.ended == "cancelled":
            assert continuation.ids == alone_one.ids[: len(continuation.ids)]
        else:
            assert continuation.ids == alone_one.ids
            assert continuation.ended == alone_one.ended
        torch.testing.assert_close(
            torch.tensor(continuation.log_probabilities),
            torch.tensor(alone_one.log_probabilities[: len(continuation.ids)]),
            atol=1e-4,
            rtol=0,
        )


@pytest.mark.parametrize("name", ["entropy", "all layers"])
def test_patches_read_beside_bytes_are_read_in_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU patches come before the bytes beside them; here after them."""
    late: list[Callable[[], None]] = []

    class Late(SideStream):
        def join(self) -> None:
            while late:
                late.pop()()

    def keep(run: Tensor, work: Callable[[], None]) -> None:
        if bool(run):
            late.append(work)

    monkeypatch.setattr(step_module, "run_if", keep)
    engine = engine_of(decoder_of(name), "beside", 3)
    step: Any = engine.slots.step  # pyright: ignore[reportAttributeAccessIssue]
    step.closing_side = Late(torch.device("cpu"))
    hot = Sampling(temperature=1.0, seed=4)
    found = generated(engine, PROMPTS, 40, hot)
    expected = generated(engine_of(decoder_of(name), "plain", 1), PROMPTS, 40, hot)
    assert [one.ids for one in found] == [one.ids for one in expected]


@pytest.mark.parametrize("size", [200, 300])
@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_long_texts_and_patches(kind: str, size: int) -> None:
    """Beyond the first size of every table, on the way or with the prompt."""
    patching = PatchSettings(mode="static", patch_size=300)
    for decoder in (Decoder(wide_blt(2), patching, None), Decoder(wide_blt(2), PatchSettings(mode="byte"), None)):
        [found] = generated(engine_of(decoder, kind, 1), ["x" * size], 400)
        ids = torch.cat([prompt_ids("x" * size), torch.tensor(found.ids)])
        logits = full_logits(decoder, [ids])[0][size:-1]
        logits[:, [0, 1, 3]] = -torch.inf
        ours = logits.gather(1, ids[size + 1 :, None])[:, 0]
        assert (logits.amax(1) - ours).max() < 1e-4  # each was the likeliest, or as likely


def test_samples_share_a_prompt() -> None:
    decoder = decoder_of("entropy")
    engine = Engine.plain(decoder, 3)
    reads: list[int] = []
    prefill = decoder.prefill

    def counted(prompts: list[Tensor], last_only: bool) -> Any:
        reads.append(len(prompts))
        return prefill(prompts, last_only)

    decoder.prefill = counted  # type: ignore[method-assign]
    asked = engine.submit(prompt_ids("abc"), Sampling(temperature=1.0, seed=5), 10, samples=3)
    engine.run()
    assert reads == [1]
    for number, continuation in enumerate(asked):
        [alone] = generated(Engine.plain(decoder, 1), ["abc"], 10, Sampling(temperature=1.0, seed=5 + number))
        assert continuation.ids == alone.ids
    assert len({tuple(continuation.ids) for continuation in asked}) == 3


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_stop_texts(kind: str) -> None:
    """Matched on bytes, shown neither in the end nor on the way."""
    decoder = decoder_of("entropy")
    [whole] = generated(engine_of(decoder, kind, 1), ["The"], 30)
    stop = whole.data[7:10]
    at = whole.data.find(stop)
    engine = engine_of(decoder, kind, 1)
    [found] = engine.submit(prompt_ids("The"), Sampling(temperature=0, stop=[stop, b"\x00never"]), 30)
    shown = b""
    while found.ended is None:
        engine.advance()
        shown += found.new_bytes()
        assert whole.data[:at].startswith(shown)
    assert found.ended == "stop"
    assert shown == found.data == whole.data[:at]
    assert bytes(i - 4 for i in found.ids) == whole.data[: at + 3]


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_valid_utf8(kind: str) -> None:
    decoder = decoder_of("entropy")
    engine = engine_of(decoder, kind, 2)
    asked = [
        engine.submit(prompt_ids("\u4f60"), Sampling(temperature=5.0, seed=seed, valid_utf8=True), 40)[0]
        for seed in range(4)
    ]
    shown = ["" for _ in asked]
    while not engine.is_idle:
        engine.advance()
        shown = [text + continuation.new_text() for text, continuation in zip(shown, asked, strict=True)]
    for text, continuation in zip(shown, asked, strict=True):
        assert continuation.data.decode() == text + continuation.new_text()
        assert any(byte > 127 for byte in continuation.data)


def test_it_ends_at_the_end_of_the_text() -> None:
    """A head of zeros: all ids are as likely, and of those that may be drawn the end is the lowest."""
    decoder = decoder_of("entropy")
    head: Any = decoder.model.decoder.output
    with torch.no_grad():
        head.weight.zero_()
    for kind in KINDS:
        [found] = generated(engine_of(decoder, kind, 1), ["abc"], 50)
        assert (found.ended, found.data, found.ids) == ("end of text", b"", [EOS])


def test_what_will_not_do() -> None:
    engine = Engine.plain(decoder_of("entropy"), 1)
    for wrong in (0, MAX_NEW_BYTES + 1, 2**64, True, 2.5, "5"):
        with pytest.raises(UserError, match=f"max_new_bytes: {wrong!r} is not a number from 1 to 1,000,000,000$"):
            engine.submit(prompt_ids("x"), GREEDY, wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="it holds no ids"):
        engine.submit(torch.zeros(0, dtype=torch.long), GREEDY, 1)
    assert engine.is_idle
    assert isinstance(decoder_of("byte LM").model, ByteLM)


STOPS = st.lists(
    st.binary(min_size=1, max_size=3)
    | st.text(min_size=1, max_size=2).map(str.encode)
    | st.integers(0x80, 0xBF).map(lambda byte: bytes([byte])),
    max_size=4,
)


@pytest.mark.parametrize("kind", ["plain", "fast"])
@settings(max_examples=12)
@given(data=st.data())
def test_valid_utf8_is_valid_whatever_ends_it(kind: str, data: st.DataObject) -> None:
    """Also where a stop text begins within a character, on the way, and where a sequence is cancelled."""
    decoder = shared_decoder("entropy", data.draw(st.integers(0, 3)))
    batch_size = data.draw(st.integers(1, 3))
    engine = engine_of(decoder, kind, batch_size)
    asked = [
        engine.submit(
            prompt_ids(prompt),
            Sampling(temperature=4.0, seed=seed, valid_utf8=True, stop=data.draw(STOPS)),
            data.draw(st.integers(4, 40)),
        )[0]
        for seed, prompt in enumerate([b"x", "é".encode(), "\u8a9e".encode()[:1], "\U0001f642".encode()[:2]])
    ]
    given_out, texts = [b""] * len(asked), [""] * len(asked)
    watched = data.draw(st.sampled_from([Continuation.new_bytes, Continuation.new_text]))
    stopped = data.draw(st.integers(1, 60))
    for step in range(1000):
        if engine.is_idle:
            break
        if step == stopped:
            engine.cancel(asked[0])
        engine.advance()
        for number, one in enumerate(asked):
            new = watched(one)
            given_out[number] += new if isinstance(new, bytes) else b""
            texts[number] += new if isinstance(new, str) else ""
    for one, shown, text in zip(asked, given_out, texts, strict=True):
        before = decode(one.prompt.numpy())
        assert one.ended
        if one.data or state_after(before) == 0:
            (before + one.data).decode()  # raises where it is no UTF-8
        assert text == one.text if watched is Continuation.new_text else shown == one.data


@pytest.mark.parametrize("change", [{"repetition_penalty": 1.5}, {"valid_utf8": True, "top_k": 9}])
def test_slots_follow_every_sampling_setting(change: dict[str, Any]) -> None:
    """Penalties and UTF-8 depend on what was drawn before."""
    decoder = decoder_of("entropy")
    for sampling in (Sampling(temperature=0, **change), Sampling(temperature=5.0, seed=3, **change)):
        prompts = [*PROMPTS, "\u4f60"]
        plain = generated(Engine.plain(decoder, 3), prompts, 25, sampling)
        for found, expected in zip(generated(engine_of(decoder, "fast", 3), prompts, 25, sampling), plain, strict=True):
            assert (found.ids, found.ended) == (expected.ids, expected.ended)


@pytest.mark.parametrize("mode", [mode for mode, its in MODES.items() if not its.on_host])
def test_slots_in_every_mode(mode: str) -> None:
    settings: dict[str, Any] = {"static": {"patch_size": 3}, "entropy": {"threshold": 5.12}}.get(mode, {})
    patching = PatchSettings.parse({"mode": mode} | settings)
    decoder = Decoder(wide_blt(0), patching, decoder_of("entropy").byte_lm)
    hot = Sampling(temperature=1.0, seed=1)
    plain = generated(Engine.plain(decoder, 2), PROMPTS[:3], 40, hot)
    for found, expected in zip(generated(engine_of(decoder, "fast", 2), PROMPTS[:3], 40, hot), plain, strict=True):
        assert (found.ids, found.ended) == (expected.ids, expected.ended)


def test_texts_that_may_end_anywhere() -> None:
    """Heads of zeros: every id is as likely."""
    decoder = decoder_of("entropy", seed=3)
    head: Any = decoder.model.decoder.output
    with torch.no_grad():
        head.weight.zero_()
    hot = Sampling(temperature=1.0)
    plain, fast = Engine.plain(decoder, 12), engine_of(decoder, "fast", 12)
    asked = [engine.submit(prompt_ids("x"), hot, 300, samples=12) for engine in (plain, fast)]
    plain.run()
    fast.run()
    assert sum(one.ended == "end of text" for one in asked[1]) > 4  # one in 257 ids
    for expected, found in zip(*asked, strict=True):
        assert (found.ids, found.ended) == (expected.ids, expected.ended)
