"""`python -m jaxprompt`: the command line without the installed script."""

import sys

from jaxprompt.cli import main

if __name__ == "__main__":
    sys.exit(main())
