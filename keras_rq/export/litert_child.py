"""The TensorFlow process of an export from another backend: a request on stdin, JSON on stdout."""

from __future__ import annotations

import json
import sys

from keras_rq.export.litert import child_main

if __name__ == "__main__":
    print(json.dumps(child_main(json.load(sys.stdin))))
