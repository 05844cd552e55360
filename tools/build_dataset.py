"""Turns a folder of rendered objects into ArrayRecord shards: `build_dataset.py FOLDER OUT`.

FOLDER has OpenLRM's layout, as `tools/render_objects.py` writes it. Train from OUT with `--config.data.name=records
--config.data.root=OUT`. Any number of processes can read it, from any disk, and they decode only what a batch needs. This is worth it from
about ten thousand objects, or if the images are too large for a decoded cache. For small data, `--config.data.name=objects` reads FOLDER
itself.

Every image is decoded once, to check that it is complete. Objects that cannot be used are left out and named on stderr. The data set
appears in OUT only when it is complete. The names of the objects decide, at reading, which of them are held out for "val" (8 %, with all
variants of an object on one side). This is the same for FOLDER.

Exit code: 0 built from all objects; 1 some objects could not be used, built from the others; 2 nothing was built, or wrong usage; 130 interrupted.
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
    parser.add_argument("out", type=Path, help="folder to write the data set to")
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
