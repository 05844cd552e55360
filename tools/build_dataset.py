"""Turns a folder of rendered objects into ArrayRecord shards: `build_dataset.py FOLDER OUT`.

FOLDER has OpenLRM's layout (`tools/render_objects.py` writes it). OUT is then read with `--config.data.name=records
--config.data.root=OUT`: by any number of processes, from any disk, decoding only what a batch needs. Worth it from some ten
thousand objects or for images too large for a decoded cache; for small data `--config.data.name=objects` reads FOLDER itself.

Every image is decoded once, to know that it is whole. Objects that cannot be used are left out and named on stderr. The
data set appears in OUT when it is complete. Which objects are held out for "val" (8 %, variants of an object on one side) is
decided by their names at reading, as for FOLDER.

Exit code: 0 built of all objects; 1 some objects could not be used, built of the others; 2 nothing was built, or wrong usage; 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from lrm_jax.data import records
from lrm_jax.types import InputError


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="objects in OpenLRM's layout")
    parser.add_argument("out", type=Path, help="where the data set is written")
    args = parser.parse_args(argv)
    try:
        builder = records.build(args.folder, args.out)
    except InputError as error:
        print(f"build_dataset: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_dataset: interrupted: nothing is kept, run again", file=sys.stderr)
        return 130
    for uid, cause in builder.skipped.items():
        print(f"{args.folder}: left out {uid}: {cause}", file=sys.stderr)
    count = len(builder.info.metadata["names"])
    print(f"{args.out}: {count} objects, {len(builder.skipped)} left out", file=sys.stderr)
    return 1 if builder.skipped else 0


if __name__ == "__main__":
    sys.exit(main())
