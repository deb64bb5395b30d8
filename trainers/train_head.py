"""Train an identity head: `accelerate launch --quiet trainers/train_head.py --help`.

The door of a checkout; the program is `nearid_personalize.train_head`.
"""

import sys

from nearid_personalize.commands.flags import run_program
from nearid_personalize.train_head import main

if __name__ == "__main__":
    sys.exit(run_program(main))
