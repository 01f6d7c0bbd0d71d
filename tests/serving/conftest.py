"""The server and its page; `make test-serve` installs what these tests need, and runs them."""

import os

if "TEST_SERVE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
