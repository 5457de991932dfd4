"""`python training/train.py --data DIR --output-dir DIR --recipe NAME` trains a network."""

import sys

from asag_training.cli import main

if __name__ == "__main__":
    sys.exit(main())
