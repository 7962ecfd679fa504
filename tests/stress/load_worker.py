"""Loads the models that its standard input names, one JSON line each, and says what came of it."""

import json
import resource
import sys
import time

import lookonce


def main() -> None:
    for line in sys.stdin:
        given = json.loads(line)
        started = time.monotonic()
        try:
            lookonce.load(given["model"], mmproj=given["mmproj"], store=False, threads=1).close()
            outcome = "loaded"
        except lookonce.LookonceError as error:
            outcome = f"{type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001  that is what is looked for
            outcome = f"FOREIGN {type(error).__name__}: {error}"
        used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        facts = {"outcome": outcome, "seconds": time.monotonic() - started, "peak_bytes": max(used) * 1024}
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
