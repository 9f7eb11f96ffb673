"""``python -m lm_eval_adainfer.cli ...`` does what ``adainfer ...`` does."""

import sys

from lm_eval_adainfer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
