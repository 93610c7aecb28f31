"""What surrounds an entry script's main(): errors as one line, on one rank, with an exit status that ends every rank."""

import atexit
import os
import signal
import sys
import time
import traceback

from src.utils.errors import Stopped, UserError
from src.utils.signals import Signals

# A mistake in the command shows on every rank at about the same time. Rank 0 tells of it and its end takes the others
# along; another rank speaks only when rank 0 did not, in which case the error is that rank's own.
_PATIENCE_S = 5.0
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def run_main(main, rank=0, defers_signals=False):
    """Run ``main(arguments)``, or ``main(arguments, signals)`` with ``defers_signals``; status 0, 2 after a UserError,
    1 after a defect, 128 + a signal's number after that signal. ``--help`` prints its module's text.

    Args:
        main: takes the list of command-line arguments.
        rank: this process's number as its launcher gave it.
        defers_signals: give it a Signals too, by which it can finish what it is doing when it is told to stop.
    """
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{sys.modules[main.__module__].__doc__}"
              "Every key of default_config.yaml is a flag: --lr=0.1; that file says what each means.")
        return
    signals = Signals(lambda number: end_process(f"error: {_WORDS.get(number, 'stopped')}", 128 + number, rank))
    try:
        main(arguments, *([signals] if defers_signals else []))
        sys.stdout.flush()
    except BrokenPipeError:
        # Nobody reads the output any more, as behind `| head`: the status that a shell gives such a command.
        os._exit(128 + signal.SIGPIPE)
    except UserError as failure:
        whose = f"rank {rank}: " if rank else ""
        end_process(f"error: {whose}{failure}", 2, rank)
    except Stopped as stop:
        sys.stdout.flush()
        if rank != 0:
            # Rank 0 first: the launcher reports the status of the first that ends.
            time.sleep(_PATIENCE_S)
        os._exit(128 + stop.signal)
    except ImportError as failure:
        end_process(f"error: {failure}; run 'bash scripts/setup.sh', then 'source .venv/bin/activate'", 2, rank)
    except Exception as failure:  # a defect or an exhausted machine: still one line, and no rank left waiting
        if os.environ.get("ACNET_TRACEBACK"):
            traceback.print_exc()
        # MindSpore's messages have headings between dashes.
        reason = next((text for text in str(failure).splitlines() if text.strip() and text[0] != "-"), "")
        end_process(f"error: rank {rank}: {type(failure).__name__}: {reason} (ACNET_TRACEBACK=1 shows where)", 1, rank)
    # What Python and the libraries registered for the end, MPI's finalisation too, but not the 0.5 s in which MindSpore takes
    # its libraries down piece by piece: the operating system does that at once.
    atexit._run_exitfuncs()
    os._exit(0)


def end_process(line, status, rank):
    """Print ``line`` on standard error, if no lower rank ends the job first, and end this process at once."""
    sys.stdout.flush()
    if rank != 0:
        time.sleep(_PATIENCE_S)
    sys.stderr.write(line.replace("\n", " ") + "\n")
    sys.stderr.flush()
    # Not sys.exit: MPI's own finalisation would wait for ranks that wait for this one.
    os._exit(status)
