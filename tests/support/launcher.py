"""`fastllm-train launch` with another program in the place of `python -m fastllm`:
`launcher.py [launch's options] rank_script.py ...`."""

import sys

from fastllm.config import RunError, UserError
from fastllm.dist import last_words
from fastllm.dist.launch import launch, parse

settings, command = parse(sys.argv[1:])
try:
    sys.exit(launch(settings, command, program=[sys.executable]))
except (RunError, UserError) as error:
    last_words.say(str(error))
    sys.exit(2 if isinstance(error, UserError) else 1)
