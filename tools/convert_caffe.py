"""Ports a .caffemodel to an .h5 file: `keras-fcn convert`, which says what it takes."""

import sys

from keras_fcn.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
