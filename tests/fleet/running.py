"""A fleet as a process of its own, as an operator starts it: a small model, random weights, the tokenizer of the box's."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.serve.served import children, free_ports
from glmjax.fleet.gateway import healthy_workers
from glmjax.nano import NANO

TINY = Path(__file__).parents[1] / "tiny.json"
CONTEXT = 256
PAGE = 64


def small(folder):
    """A checkpoint without weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    own = json.loads((NANO / "config.json").read_text())
    sizes = json.loads(TINY.read_text()) | {"vocab_size": own["vocab_size"], "eos_token_id": own["eos_token_id"]}
    (folder / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": CONTEXT}))
    return folder


class RunningFleet:
    """A fleet, until it is ended.

    Args:
        model: folder of the model.
        log: file for what it says.
        flags: of the command line.
    """

    def __init__(self, model, log, *flags, replicas=1):
        self.first, self.log, self.replicas = free_ports(8), log, replicas
        self.url = f"http://127.0.0.1:{self.first + 7}"
        command = [
            *(sys.executable, "-m", "glmjax.serve", "--gateway", "--model-path", model, "--load-format", "dummy"),
            *("--port", self.first, "--metrics-port", self.first + 3, "--gateway-port", self.first + 7),
            *("--replicas", replicas, "--max-running-requests", 1, "--page-size", PAGE, "--chunked-prefill-size", 64),
            *("--served-model-name", "small", "--drain-seconds", 20, *flags),
        ]
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file)

    def ready(self, workers=None, seconds=240):
        """Once the gateway knows as many workers."""
        self.until(lambda: len(healthy_workers(self.url)) == (workers or self.replicas), seconds)
        return self

    def until(self, true, seconds=120):
        """Wait for something, as long as the fleet runs."""
        end = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def signal(self, which):
        self.process.send_signal(which)

    def pids(self):
        """Of the workers, in the order in which they began."""
        return children(self.process.pid)

    def leave(self):
        """End it; the exit status."""
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
