"""Measure a policy: ``python -m training.router_r1 --config FILE --policy FOLDER``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from training.errors import TrainingError


def main(argv: Sequence[str] | None = None) -> int:
    """Print a policy's figures on the config's questions for tests as JSON."""
    from training.router_r1.measure import measure_policy
    from training.router_r1.spec import read_spec

    parser = argparse.ArgumentParser(prog="python -m training.router_r1", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="as for `router-service train router_r1`")
    parser.add_argument("--policy", help="folder or hub name; else that of the config")
    parser.add_argument("--seed", type=int, help="of the questions")
    parser.add_argument("--episodes", type=Path, help="file to write every conversation to, as JSON lines")
    args = parser.parse_args(argv)
    try:
        spec = read_spec(args.config, policy=args.policy, seed=args.seed)
        sys.stdout.write(json.dumps(measure_policy(spec, args.episodes), indent=2) + "\n")
    except TrainingError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
