"""What a job may be asked for, and the one line about what it may not."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.launch import LaunchSettings
from bytelatent.launch.slurm import SlurmNode, largest_node, time_limit_seconds
from tests.launch.conftest import Cluster

SMALL = st.integers(0, 200)


@given(days=SMALL, hours=SMALL, minutes=SMALL, seconds=st.integers(1, 99))
def test_a_time_limit_in_every_form_of_slurm(days: int, hours: int, minutes: int, seconds: int) -> None:
    def total(**parts: int) -> float:
        return datetime.timedelta(**parts).total_seconds()

    assert time_limit_seconds(f"{minutes}:{seconds}") == total(minutes=minutes, seconds=seconds)
    assert time_limit_seconds(f"{hours}:{minutes}:{seconds}") == total(hours=hours, minutes=minutes, seconds=seconds)
    assert time_limit_seconds(f"{days}-{hours}:{minutes}:{seconds}") == total(
        days=days, hours=hours, minutes=minutes, seconds=seconds
    )
    assert time_limit_seconds(f"{days}-{hours + 1}:{minutes}") == total(days=days, hours=hours + 1, minutes=minutes)
    assert time_limit_seconds(f"{days}-{hours + 1}") == total(days=days, hours=hours + 1)
    assert time_limit_seconds(f"{minutes + 1}") == total(minutes=minutes + 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodez": "2"}, "nodez: unknown key; did you mean 'nodes'?"),
        ({"nodes": "0"}, "nodes: Input should be greater than or equal to 1"),
        ({"ngpu": "-1"}, "ngpu: Input should be greater than or equal to 0"),
        ({"nproc": "0"}, "nproc: Input should be greater than or equal to 1"),
        ({"nproc": "2"}, "nproc=2 is for CPUs; add ngpu=0"),
        ({"nproc": "2", "ngpu": "8"}, "nproc=2 is for CPUs; add ngpu=0"),
        ({"time": "a day"}, "time: 'a day' is no time limit; write minutes, 12:00:00 or 2-00:00:00"),
        ({"time": "1:2:3:4"}, "is no time limit"),
        ({"time": "0"}, "is no time at all"),
        ({"mem": "a lot"}, "mem: 'a lot' is no memory"),
        ({"launcher": "mpirun"}, "launcher: Input should be 'torchrun' or 'srun'"),
        ({"script": "train.py; rm"}, "script: 'train.py; rm' is no module"),
        ({"name": "a\nb"}, "holds a line break"),
        ({"dump_dir": "runs/100%"}, "holds '%'"),
        ({"dump_dir": "a:b"}, "holds ':'"),
        ({"dry_run": "perhaps"}, "dry_run: "),
    ],
)
def test_what_will_not_do_is_one_line(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        LaunchSettings.parse(values)
    assert message in str(caught.value)


def test_values_are_read_from_text() -> None:
    settings = LaunchSettings.parse({"nodes": "2", "ngpu": "0", "copy_code": "false", "time": "90", "partition": "1"})
    assert (settings.nodes, settings.ngpu, settings.copy_code, settings.time, settings.partition) == (
        2,
        0,
        False,
        "90",
        "1",
    )


def test_the_node_of_a_partition(cluster: Cluster) -> None:
    assert largest_node("gpu") == largest_node(None) == largest_node("cpu,gpu") == SlurmNode(num_gpus=8, num_cores=64)
    assert largest_node("cpu") == SlurmNode(num_gpus=0, num_cores=2)
    with pytest.raises(UserError, match=r"partition: the cluster has no 'gpus'; did you mean 'gpu'.*: cpu, gpu"):
        largest_node("gpus")


@pytest.mark.parametrize("sinfo", ["exit 1\n", "true\n"])
def test_where_sinfo_logs_nothing(cluster: Cluster, sinfo: str) -> None:
    cluster.install("sinfo", sinfo)
    assert largest_node("gpu") is None
