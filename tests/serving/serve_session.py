"""A Ray cluster of its own with the service on it, for tests that kill parts of it: STATE PORT TEMP_DIR.

It ends, and the cluster with it, when its standard input does: a killed test run leaves nothing behind.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import ray

from raycomplete.serving.deployment import ChatModel, build_application, start
from raycomplete.serving.requests import digest
from tests.serving.conftest import TOKEN, make_config
from tests.serving.fakes import FakeModel, make_fake_backend


def main(state: str, port: str, temp_dir: str) -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
        _temp_dir=temp_dir,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}},
    )
    config = make_config(Path(state), port=int(port), max_queued=100, chat=True)
    chat = [ChatModel(FakeModel, role, {"num_cpus": 0}) for role in ("base", "aligned")]
    application = build_application(config, digest(TOKEN), make_fake_backend, chat)
    start(application, host="127.0.0.1", port=int(port))
    print("ready", flush=True)
    sys.stdin.read()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
