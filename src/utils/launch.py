"""What surrounds an entry script's main(): errors as one line, on one rank, with an exit status that ends every rank."""

import os
import sys
import time
import traceback

from src.utils.errors import UserError

# A mistake in the command shows on every rank at about the same time. Rank 0 tells of it and its end takes the others
# along; another rank speaks only when rank 0 did not, in which case the error is that rank's own.
_PATIENCE_S = 5.0


def run_main(main, rank=0):
    """Run ``main(arguments)``; status 0, 2 after a UserError, 130 after Ctrl-C, 1 after a defect. ``--help`` prints its module's text.

    Args:
        main: takes the list of command-line arguments.
        rank: this process's number as its launcher gave it.
    """
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{sys.modules[main.__module__].__doc__}Every key of default_config.yaml is a flag: --lr=0.1; that file says what each means.")
        return
    try:
        main(arguments)
    except UserError as failure:
        _end(f"error: {failure}", 2, rank)
    except KeyboardInterrupt:
        _end("error: interrupted", 130, rank)
    except ImportError as failure:
        _end(f"error: {failure}; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'", 2, rank)
    except Exception as failure:  # a defect or an exhausted machine: still one line, and no rank left waiting
        if os.environ.get("ACNET_TRACEBACK"):
            traceback.print_exc()
        reason = (str(failure).strip().splitlines() or [""])[0]
        _end(f"error: rank {rank}: {type(failure).__name__}: {reason} (ACNET_TRACEBACK=1 shows where)", 1, rank)


def _end(line, status, rank):
    sys.stdout.flush()
    if rank != 0:
        time.sleep(_PATIENCE_S)
    sys.stderr.write(line.replace("\n", " ") + "\n")
    sys.stderr.flush()
    # Not sys.exit: MPI's own finalisation would wait for ranks that wait for this one.
    os._exit(status)
