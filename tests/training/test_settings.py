"""Settings that will not do are one line and exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest

from bytelatent.command_line import from_command_line
from bytelatent.commands.train import USAGE
from bytelatent.config import warn_renamed
from bytelatent.errors import UserError
from bytelatent.model import BLTSettings, preset
from bytelatent.training import TrainSettings, train
from tests.training.tiny_runs import BLT, blt_run, byte_lm_run, command, finished, settings, write_text


def refused(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        from_command_line(TrainSettings, arguments, USAGE)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


ENOUGH = ["model=demo-byte-lm", "data.train=x", "steps=3"]
ENOUGH_BLT = ["model=demo-blt", "data.train=x", "steps=3"]
NO_TABLES = json.dumps({**BLT, "ngram_hash": None})
WITHOUT_TABLES = [f"model={NO_TABLES}", "patching.mode=space", *ENOUGH_BLT[1:]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ENOUGH, "optimizer.lrr=1"], "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ([*ENOUGH, "data.trian=x"], "data.trian: unknown key; did you mean 'train'?"),
        ([*ENOUGH, "stepz=1"], "stepz: unknown key; did you mean 'steps'?"),
        ([*ENOUGH_BLT, "model.encoder.dmi=3"], "model.encoder.dmi: unknown key; did you mean 'dim'?"),
        ([*ENOUGH, "minutes=1"], "steps and minutes are both set"),
        (ENOUGH[:2], "set steps or minutes: how long to train"),
        ([*ENOUGH, "patching.mode=space"], "patching: this model is a byte LM and has no patches; leave patching, "),
        ([*ENOUGH, "patching.mode=entropy"], "patching: this model is a byte LM and has no patches; leave patching, "),
        ([*ENOUGH, "calibration.patch_bytes=4"], "this model is a byte LM and has no patches; leave patching, calib"),
        (
            [*ENOUGH, "entropy_model=x"],
            "entropy_model: this model is a byte LM and has no patches; leave patching, calibration and",
        ),
        ([*ENOUGH, "float8=rowwise"], "float8 is for the global transformer, and a byte LM has none; leave it out"),
        (
            [*ENOUGH_BLT, "patching.mode=space", "float8=row"],
            "float8: Input should be 'rowwise', 'rowwise_with_gw_hp' or 'tensorwise', not 'row'",
        ),
        (ENOUGH_BLT, "patching: a BLT needs patching settings"),
        ([*ENOUGH_BLT, "patching.mode=entropy"], "needs a threshold"),
        ([*ENOUGH_BLT, "patching.mode=space", "calibration.patch_bytes=4"], "patching.mode 'space' has none"),
        (["model=demo-bl", *ENOUGH[1:]], "model: no preset 'demo-bl'; did you mean 'demo-blt'?"),
        (["model=zzz", *ENOUGH[1:]], "model: no preset 'zzz'"),
        (["model=null", *ENOUGH[1:]], "model: no model but None; name a preset or give its shapes"),
        ([*ENOUGH, "run="], "run: the path is empty; name a folder"),
        ([*ENOUGH, "data.train="], "data.train.0.path: the path is empty; name a file"),
        ([*ENOUGH, "compile=maybe"], "compile: Input should be a valid boolean"),
        ([*ENOUGH, "dtype=float16"], "dtype: Input should be 'auto', 'float32' or 'bfloat16', not 'float16'"),
        ([*ENOUGH, "optimizer.lr=-1"], "optimizer.lr: "),
        ([*ENOUGH, "optimizer.name=adam"], "optimizer.name: Input should be 'adamw' or 'muon', not 'adam'"),
        ([*ENOUGH, "optimizer.lr_scale.embeding=2"], "optimizer.lr_scale.embeding: unknown key; "),
        ([*ENOUGH, "optimizer.lr_scale.decoder=-1"], "optimizer.lr_scale.decoder: "),
        ([*ENOUGH, "optimizer.lr_scale.encoder=2"], "optimizer.lr_scale.encoder belongs to a BLT"),
        ([*ENOUGH, "data.batch_patches=64"], "data.batch_patches is for a BLT, and a byte LM has no patches"),
        ([*ENOUGH, "data.patch_bytes=4"], "data.patch_bytes is for a BLT, and a byte LM has no patches"),
        ([*ENOUGH, "data.patch_bytes=4", "data.batch_patches=64"], "data: batch_patches and patch_bytes both say how"),
        ([*ENOUGH, "optimizer.hash_gradients=rows"], "optimizer.hash_gradients: this model has no hash tables"),
        ([*WITHOUT_TABLES, "optimizer.hash_gradients=rows"], "optimizer.hash_gradients: this model has no hash tables"),
        ([*ENOUGH, "optimizer.hash_weight_decay=0.1"], "optimizer.hash_weight_decay: this model has no hash tables"),
        ([*ENOUGH_BLT, "optimizer.hash_weight_decay=-1"], "optimizer.hash_weight_decay: Input should be greater"),
        (
            [*ENOUGH_BLT, "optimizer.lr=0.01", "optimizer.lr_scale.hash_tables=2", "optimizer.hash_weight_decay=50"],
            "optimizer: hash_weight_decay: 50 times the tables' learning rate 0.02 leaves nothing of a weight; take",
        ),
        ([*WITHOUT_TABLES, "optimizer.lr_scale.hash_tables=2"], "optimizer.lr_scale.hash_tables: this model has no"),
        (["config=absent.yaml"], "config: 'absent.yaml' does not exist"),
        ([], "name a configuration or settings"),
        ([*ENOUGH_BLT, "model.global_transformer.width=7"], "model.global_transformer.width: unknown key; "),
        (
            [*ENOUGH, "model.kind=byte_lm", "model.encoder=1"],
            "model.encoder: does not go together with the other keys here",
        ),
        (["config="], "config: no file is named; as in config=apps/"),
        ([*ENOUGH, "seed=-1"], "seed: Input should be greater than or equal to 0, not -1"),
        ([*ENOUGH, "data.train=null"], "data.train: there is no text to train on; name it, as in data.train='text/"),
        ([*ENOUGH, "data.train=[*.jsonl]"], "data.train: '[*.jsonl]' is no list or mapping ("),
        ([*ENOUGH_BLT, "model.dim=2"], "model.dim: does not go together with the other keys here; did you mean '"),
        ([*ENOUGH_BLT, "model.dim=2"], "'model.encoder.dim' or 'model.global_transformer.dim' or 'model.decoder.dim'"),
        (["model.dim=256", *ENOUGH], "'model=demo-byte-lm' comes after model.dim=... and would drop it; write it"),
        ([*ENOUGH, "data.train.weight=2"], "data.train.weight: data.train is 'x', which has no keys; set it whole: "),
        ([*ENOUGH, "optimizer.lr=nan"], "optimizer.lr: Input should be a finite number, not 'nan'"),
        ([*ENOUGH, "optimizer.lr=1e999"], "optimizer.lr: Input should be a finite number, not inf"),
        ([*ENOUGH[:2], "minutes=inf"], "minutes: Input should be a finite number, not 'inf'"),
        ([*ENOUGH, "steps=-1"], "steps: Input should be greater than or equal to 1, not -1"),
        ([*ENOUGH, f"steps={10**30}"], f"steps: Input should be less than or equal to {10**12}, not {10**30}"),
        ([*ENOUGH, f"data.batch_bytes={10**12}"], f"data.batch_bytes: Input should be less than or equal to {2**26}"),
        ([*ENOUGH, f"data.context={10**12}"], f"data.context: Input should be less than or equal to {2**24}"),
        (
            [*ENOUGH, "data.max_row_bytes=2147483647"],
            "data.max_row_bytes: Input should be less than or equal to 2147483646",
        ),
        ([*ENOUGH, f"data.workers={10**6}"], "data.workers: Input should be less than or equal to 1024, not 1000000"),
        ([*ENOUGH, f"optimizer.accumulation={10**12}"], "optimizer.accumulation: Input should be less than or equal"),
        ([*ENOUGH, "faults.watchdog_minutes=1e300"], "faults.watchdog_minutes: Input should be less than or equal"),
        ([*ENOUGH, "steps"], "'steps' is not a setting"),
    ],
)
def test_settings_that_will_not_do(arguments: list[str], message: str) -> None:
    said = refused(arguments)
    assert message in said
    assert "model: model:" not in said


def test_later_settings_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: demo-byte-lm\nsteps: 3\ndata: {train: x}\noptimizer: {lr: 1.0, clip: 2.0}\n")
    read = from_command_line(TrainSettings, [f"config={path}", "optimizer.lr=1e-3", "steps=7"], USAGE)
    assert (read.steps, read.optimizer.lr, read.optimizer.clip) == (7, 1e-3, 2.0)


def test_a_length_on_the_command_line_replaces_the_other_one_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: demo-byte-lm\nminutes: 3\ndata: {train: x}\n")
    read = from_command_line(TrainSettings, [f"config={path}", "steps=7"], USAGE)
    assert (read.steps, read.minutes) == (7, None)
    assert from_command_line(TrainSettings, [f"config={path}", "minutes=null", "steps=7"], USAGE) == read
    assert from_command_line(TrainSettings, [f"config={path}"], USAGE).minutes == 3


def test_fields_of_a_preset_can_be_set(tmp_path: Path) -> None:
    plain = from_command_line(TrainSettings, [*ENOUGH_BLT, "patching.mode=space"], USAGE).model
    changes = ["model.encoder.window=9", "model.ngram_hash.vocab_size=77"]
    read = from_command_line(TrainSettings, [*ENOUGH_BLT, "patching.mode=space", *changes], USAGE).model
    assert isinstance(read, BLTSettings)
    assert isinstance(plain, BLTSettings)
    assert plain.ngram_hash is not None
    assert read == plain.model_copy(
        update={
            "encoder": plain.encoder.model_copy(update={"window": 9}),
            "ngram_hash": plain.ngram_hash.model_copy(update={"vocab_size": 77}),
        }
    )
    path = tmp_path / "run.yaml"
    shapes = "{preset: demo-blt, encoder: {window: 9}}"
    path.write_text(f"model: {shapes}\npatching: {{mode: space}}\nsteps: 3\ndata: {{train: x}}\n")
    assert from_command_line(TrainSettings, [f"config={path}", changes[1]], USAGE).model == read
    without = from_command_line(TrainSettings, [f"config={path}", "model.ngram_hash=null"], USAGE).model
    assert isinstance(without, BLTSettings)
    assert without.ngram_hash is None
    dim = from_command_line(TrainSettings, [*ENOUGH, "model.dim=64"], USAGE).model
    assert dim == preset("demo-byte-lm").model_copy(update={"dim": 64})


def test_resolved_settings_name_their_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: demo-blt\nrun: a\nsteps: 3\ndata: {train: x}\ncalibration: {patch_bytes: 4}\n")
    given = [f"config={path}", "model.decoder.window=9", "run=b #1"]
    with pytest.raises(SystemExit) as ended:
        from_command_line(TrainSettings, [*given, "--print-config"], USAGE)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    sources = {line.split()[0]: line.rpartition("  # ")[2] for line in shown.splitlines() if "  # " in line}
    assert (sources["run:"], sources["patch_bytes:"], sources["seed:"]) == ("command line", str(path), "default")
    assert sources["num_layers:"] == "preset demo-blt"
    assert sources["threshold:"] == "calibration"
    assert "    window: 9 " in shown
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    expected = from_command_line(TrainSettings, given, USAGE)
    assert from_command_line(TrainSettings, [f"config={again}"], USAGE) == expected


def test_the_shipped_configurations_are_read(whole: Path) -> None:
    configs = sorted((Path(__file__).parents[2] / "apps" / "bytelatent" / "configs").glob("*.yaml"))
    assert len(configs) >= 8
    for config in configs:
        more = [f"init={whole}", "optimizer.hash_gradients=dense"] if config.stem == "finetune" else []
        assert from_command_line(TrainSettings, [f"config={config}", *more], USAGE).data.train


@pytest.mark.parametrize("where", ["train", "valid"])
@pytest.mark.parametrize("what", ["missing", "empty"])
def test_text_that_is_not_there_is_said_before_the_first_step(
    tmp_path: Path, text: Path, where: str, what: str
) -> None:
    path = tmp_path / "nothing.txt"
    if what == "empty":
        path.touch()
    run = tmp_path / "run"
    values = byte_lm_run(run, text, data={where: str(path)})
    with pytest.raises(UserError, match=str(path)):
        train(settings(values))
    assert not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text() == ""
    path.write_bytes(b"now it is there " * 20)
    train(settings(values))  # the same folder


@pytest.mark.parametrize(
    "more",
    [
        {"optimizer": {"lrr": 1}},
        {"data": {"train": "absent.jsonl"}},
        {"device": "gpu"},
        {"model": BLT},
    ],
    ids=lambda more: next(iter(more)),
)
def test_the_command_ends_with_one_line_and_code_2(tmp_path: Path, text: Path, more: dict[str, Any]) -> None:
    ended = finished(command(byte_lm_run(tmp_path / "run", text, **more)), folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: ")
    assert next(iter(more)) in ended.stderr or "patching" in ended.stderr


def test_a_byte_lm_that_is_not_there_is_named(tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match="'nowhere' is not a folder"):
        train(settings(blt_run(tmp_path / "run", text, Path("nowhere"))))


def test_patches_out_of_reach_are_refused_and_another_byte_lm_may_be_named(
    tmp_path: Path, text: Path, byte_lm: Path
) -> None:
    """What an attempt that failed left behind is not taken for the run's byte LM."""
    run = tmp_path / "run"
    other = train(settings(byte_lm_run(tmp_path / "other", text, steps=2, seed=4)))
    with pytest.raises(UserError, match="a mean patch of 5000 bytes is out of reach"):
        train(settings(blt_run(run, text, other, calibration={"patch_bytes": 5000})))
    train(settings(blt_run(run, text, byte_lm, steps=2)))
    newest = max((byte_lm / "checkpoints").iterdir())
    assert (run / "byte_lm" / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()


def test_what_is_written_reads_back(tmp_path: Path, text: Path) -> None:
    write_text(tmp_path / "valid.jsonl", 2)
    read = settings(byte_lm_run(tmp_path / "run", text, data={"valid": str(tmp_path / "valid.jsonl")}))
    path = tmp_path / "settings.yaml"
    path.write_text(read.to_yaml())
    assert from_command_line(TrainSettings, [f"config={path}"], USAGE) == read


def test_held_out_text_can_be_unset() -> None:
    given = [*ENOUGH, "data.valid=held-out.jsonl"]
    assert from_command_line(TrainSettings, given, USAGE).data.valid
    assert from_command_line(TrainSettings, [*given, "data.valid=null"], USAGE).data.valid == []


def test_held_out_text_that_is_not_there_may_be_left_out(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0)
    with pytest.raises(UserError, match=r"^data.valid: 'nowhere' does not exist; .*; or train .*: data.valid=null$"):
        train(settings(byte_lm_run(tmp_path / "run", text, data={"valid": "nowhere"})))
    with pytest.raises(
        UserError, match=r"^data.train: 'nowhere' does not exist; give a file, a folder or a pattern[^;]*$"
    ):
        train(settings(byte_lm_run(tmp_path / "run", Path("nowhere"))))


@pytest.mark.parametrize("ask", [["--help"], ["-h"], [*ENOUGH, "--help"]])
def test_help(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        from_command_line(TrainSettings, ask, USAGE)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(USAGE)
    assert "optimizer" in shown


def test_the_entropy_model_by_its_old_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_renamed.cache_clear()
    path = tmp_path / "run.yaml"
    path.write_text("model: demo-blt\npatching: {mode: space}\nsteps: 3\ndata: {train: x}\nbyte_lm: a\n")
    assert from_command_line(TrainSettings, [f"config={path}"], USAGE).entropy_model == "a"
    assert from_command_line(TrainSettings, [f"config={path}", "byte_lm=b"], USAGE).entropy_model == "b"
    assert from_command_line(TrainSettings, [f"config={path}", "entropy_model=c"], USAGE).entropy_model == "c"
    assert caplog.messages == ["byte_lm is now entropy_model; the old name still works"]


def test_a_run_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_command_line(TrainSettings, [*ENOUGH, "run=~/a run"], USAGE).run == str(tmp_path / "a run")
    assert from_command_line(TrainSettings, [*ENOUGH, "run=a/~"], USAGE).run == "a/~"


def test_a_buffer_that_memory_does_not_hold(tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl", 0)
    given = byte_lm_run(tmp_path / "run", tmp_path / "text.jsonl")
    given["data"] |= {"shuffle_buffer": 2**26, "context": 2**24, "batch_bytes": 2**24}
    with pytest.raises(UserError, match=r"^data\.shuffle_buffer: 67,108,864 pieces .* [GTP]B are free; take fewer$"):
        train(settings(given))
