"""Schemathesis over the OpenAPI document: no server error, and answers are as the document has them."""

import re
import subprocess
import sys
from collections.abc import Callable

from tests.serving.conftest import ENVIRONMENT, Served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
CHECKS += ",negative_data_rejection,unsupported_method"
PHASES = "examples,coverage,fuzzing"


def test_schemathesis_finds_no_fault(start: Callable[..., Served]) -> None:
    served = start("--max-new-bytes", "16", "--max-samples", "8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json"]
    how = ["--checks", CHECKS, "--phases", PHASES, "--max-examples", "25", "--seed", "1", "--no-color"]
    ended = subprocess.run([*command, *how], env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    [(made, passed)] = re.findall(r"(\d+) generated, (\d+) passed", ended.stdout)
    assert int(made) == int(passed) > 500
    served.must_become_idle()
    assert "Traceback" not in served.log()
