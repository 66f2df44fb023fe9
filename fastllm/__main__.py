"""`python -m fastllm VERB ...`: what torchrun starts."""

import sys

from fastllm.cli import main

sys.exit(main())
