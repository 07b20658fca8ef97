"""`python -m keras_rq` is the `keras-rq` command."""

import sys

from keras_rq.cli import main

sys.exit(main())
