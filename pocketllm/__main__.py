"""``python -m pocketllm``."""

import sys

from .cli import main

sys.exit(main())
