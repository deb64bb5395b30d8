"""Train a DreamBooth-LoRA: `accelerate launch --quiet trainers/train_lora.py --help`.

The door of a checkout; the program is `nearid_personalize.train_lora`.
"""

import sys

from nearid_personalize.commands.flags import run_program
from nearid_personalize.train_lora import main

if __name__ == "__main__":
    sys.exit(run_program(main))
