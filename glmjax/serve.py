"""``python -m glmjax.serve``: a gRPC worker that gateways of vLLM's protocol know how to use."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence

import tyro

from glmjax.fleet import fleet
from glmjax.worker import lifecycle
from glmjax.worker.arguments import Arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; returns the exit status: 0 after SIGTERM or Ctrl-C, 1 where the engine has died, 2 where it cannot be served.

    Args:
        argv: the command line; default the process's own.

    Raises:
        SystemExit: after --help (0) or flags that cannot be read (2).
    """
    try:
        arguments = tyro.cli(Arguments, prog="python -m glmjax.serve", args=argv)
        logging.basicConfig(
            level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        key = arguments.api_key or os.environ.get("GLMJAX_API_KEY") or None  # as a flag's default, --help would show it
        arguments = dataclasses.replace(arguments, api_key=key)
        several = arguments.gateway or arguments.replicas > 1
        return (fleet.run if several else lifecycle.run)(arguments)
    except (ValueError, OSError) as error:
        print(f"glmjax.serve: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # what is still being compiled is not waited for
