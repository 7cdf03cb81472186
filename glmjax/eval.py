"""``python -m glmjax.eval``: measure a checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import tyro

from glmjax.evaluation.agreement import Agreement
from glmjax.evaluation.drafts import Drafts
from glmjax.evaluation.needle import Needle
from glmjax.evaluation.text import Text

_SUBCOMMANDS = {"text": Text, "needle": Needle, "drafts": Drafts, "agreement": Agreement}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 0, or 2 after a message where it cannot be done.

    Args:
        argv: the command line; default the process's own.

    Raises:
        SystemExit: after --help (0) or arguments that cannot be read (2).
    """
    evaluation = tyro.extras.subcommand_cli_from_dict(
        _SUBCOMMANDS, prog="python -m glmjax.eval", description="Measure a checkpoint.", args=argv
    )
    try:
        report = evaluation.run()
        print(report.text)
        if evaluation.json is not None:
            numbers = {"model": str(evaluation.model_path), **report.numbers}
            evaluation.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"glmjax.eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
