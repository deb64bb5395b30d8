"""The page as a Hugging Face Space: this folder is one, and everything else is in the package.

On a Space the page is public on purpose, and the Space's own proxy stands before it; elsewhere it is for this machine
alone, as `nearid demo`, which has options.
"""

import os

from nearid_personalize.commands.options import Demo
from nearid_personalize.demo.server import serve

if __name__ == "__main__":
    on_a_space = "SPACE_ID" in os.environ
    serve(Demo(host="0.0.0.0" if on_a_space else "127.0.0.1", keep_hours=1), public=on_a_space)
