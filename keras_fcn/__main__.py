"""`python -m keras_fcn`: the same as the command `keras-fcn`."""

import sys

from keras_fcn.cli import main

if __name__ == "__main__":
    sys.exit(main())
